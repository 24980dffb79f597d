"""A run that died before its first checkpoint: ``resume=auto`` goes on in its folder, with the rows that it has measured and its MLflow run.

<run>/tracking-run    the id of its MLflow run, written when that is opened
"""

from __future__ import annotations

import re
import time
from pathlib import Path

from cluster.runs.checkpoint import Checkpoint, list_checkpoints, written
from configs.load import ConfigError, flatten, load_config
from configs.schema import RunConfig

RUN_ID_FILE = "tracking-run"
_STAMP = "%Y%m%d-%H%M%S"


def new_run(output_dir: Path, name: str) -> Path:
    """The folder of a run that begins now."""
    return output_dir / f"{name}-{time.strftime(_STAMP)}"


def begun_run(output_dir: Path, config: RunConfig, newest: Checkpoint | None) -> Path | None:
    """The last run of this name, if it began after ``newest`` was written, came to no checkpoint, and had the very settings of ``config``."""
    runs = {
        began: run
        for run in output_dir.glob(f"{config.name}-*/")
        if (began := _began(run, config.name)) is not None
    }
    last = max(runs, default=None)
    if last is None or (newest is not None and last < written(newest.folder)):
        return None
    run = runs[last]
    return run if not list_checkpoints(run) and _settings_of(run) == _settings(config) else None


def note_run_id(run_dir: Path, run_id: str) -> None:
    if run_id:
        (run_dir / RUN_ID_FILE).write_text(run_id, encoding="utf-8")


def run_id_of(run_dir: Path) -> str:
    """Of the MLflow run that was opened for ``run_dir``; empty where none was."""
    path = run_dir / RUN_ID_FILE
    return path.read_text(encoding="utf-8").strip() if path.exists() else ""


def _began(run: Path, name: str) -> float | None:
    """Seconds since the epoch, from the folder's name."""
    stamp = re.fullmatch(re.escape(name) + r"-(\d{8}-\d{6})", run.name)
    try:
        return None if stamp is None else time.mktime(time.strptime(stamp[1], _STAMP))
    except ValueError:  # digits, but no time
        return None


def _settings_of(run: Path) -> dict[str, str] | None:
    try:
        return _settings(load_config(run / "config.yaml", []))
    except ConfigError:
        return None


def _settings(config: RunConfig) -> dict[str, str]:
    return {key: value for key, value in flatten(config).items() if key != "resume"}
