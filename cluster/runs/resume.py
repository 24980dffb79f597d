"""Finds a run that died before its first checkpoint: ``resume=auto`` continues it.

It goes on in its folder, with the rows that it has measured and with its MLflow run.

    <run>/tracking-run    the id of its MLflow run, written when that is opened
"""

from __future__ import annotations

import re
import time
from pathlib import Path

from cluster.runs.checkpoint import Checkpoint, list_checkpoints, written
from configs.files import write_text
from configs.load import ConfigError, flatten, load_config
from configs.schema import RunConfig

RUN_ID_FILE = "tracking-run"
_TIME_FORMAT = "%Y%m%d-%H%M%S"


def new_run(output_dir: Path, name: str) -> Path:
    """Name the folder of a run that begins now."""
    return output_dir / f"{name}-{time.strftime(_TIME_FORMAT)}"


def begun_run(output_dir: Path, config: RunConfig, newest: Checkpoint | None) -> Path | None:
    """Find the folder of the last run of this name, if that run can be continued without a checkpoint.

    It must have begun after ``newest`` was written, have no checkpoint, and have the settings of ``config``.
    """
    runs = {
        began: run_dir
        for run_dir in output_dir.glob(f"{config.name}-*/")
        if (began := _start_time(run_dir, config.name)) is not None
    }
    last = max(runs, default=None)
    if last is None or (newest is not None and last < written(newest.folder)):
        return None
    run_dir = runs[last]
    saved, given = _saved_settings(run_dir), _settings(config)
    if saved is not None and not config.model.date:  # the run keeps its own (day.py)
        given["model.date"] = saved["model.date"]
    return run_dir if not list_checkpoints(run_dir) and saved == given else None


def note_run_id(run_dir: Path, run_id: str) -> None:
    """Save the id of the run's MLflow run, if it has one."""
    if run_id:
        write_text(run_dir / RUN_ID_FILE, run_id)


def run_id_of(run_dir: Path) -> str:
    """The id of the MLflow run that was opened for ``run_dir``; empty where none was."""
    path = run_dir / RUN_ID_FILE
    return path.read_text(encoding="utf-8").strip() if path.exists() else ""


def _start_time(run_dir: Path, name: str) -> float | None:
    """When the run began, in seconds since the epoch, from its folder's name."""
    stamp = re.fullmatch(re.escape(name) + r"-(\d{8}-\d{6})", run_dir.name)
    try:
        return None if stamp is None else time.mktime(time.strptime(stamp[1], _TIME_FORMAT))
    except ValueError:  # digits, but no time
        return None


def _saved_settings(run_dir: Path) -> dict[str, str] | None:
    try:
        return _settings(load_config(run_dir / "config.yaml", []))
    except ConfigError:
        return None


def _settings(config: RunConfig) -> dict[str, str]:
    return {key: value for key, value in flatten(config).items() if key != "resume"}
