"""Finds what ``resume`` means: a checkpoint or a run by its folder, or (auto) the newest unfinished run.

    auto: runs of this name, newest first --> finished? --> its newest whole checkpoint
    a run's folder: that one run     -----'             --> none yet: its folder, if the settings are the same

A run without a checkpoint goes on in its folder, with the rows that it has measured and with its MLflow run.

    <run>/tracking-run    the id of its MLflow run, written when that is opened
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from contextlib import suppress
from pathlib import Path

from cluster.common.errors import CheckpointError, InUseError
from cluster.runs.checkpoint import (
    Checkpoint,
    list_checkpoints,
    load_whole,
    newest_whole,
    recover_checkpoints,
)
from cluster.runs.run_folders import finished_steps, nothing_left, runs_of
from cluster.runs.run_lock import held
from configs.files import write_text
from configs.load import ConfigError, flatten, load_config
from configs.schema import RunConfig

RUN_ID_FILE = "tracking-run"
_log = logging.getLogger(__name__)


def find_checkpoint(folder: Path) -> Checkpoint:
    """Read the checkpoint that a user named, whose files are as they were written. Raises CheckpointError."""
    run_dir = folder.parent.parent
    _recover(run_dir)
    try:
        return load_whole(folder)
    except CheckpointError as error:
        others = [other for other in list_checkpoints(run_dir) if other != folder]
        hint = f"; the run's other checkpoints: {', '.join(map(str, others))}" if others else ""
        raise CheckpointError(f"{error}{hint}") from None


def find_unfinished(
    output_dir: Path, config: RunConfig, refused: Collection[Path] = ()
) -> Checkpoint | Path | None:
    """Find what ``resume=auto`` goes on from: a checkpoint, a run without one, or None: no run of the name.

    ``refused`` are checkpoints that could not be loaded. Raises AllFinished where nothing is left to do, and
    CheckpointError where all that is left is damaged.
    """
    return _find(runs_of(output_dir, config.name), config, refused, str(output_dir))


def is_run(folder: Path) -> bool:
    """Whether ``folder`` is one of a run, and none of a checkpoint."""
    return (folder / "config.yaml").is_file() and folder.parent.name != "checkpoints"


def names_a_checkpoint(resume: str) -> bool:
    """Whether ``resume`` is one checkpoint: not empty, not auto, and no run's folder."""
    return resume not in ("", "auto") and not is_run(Path(resume).expanduser())


def find_in_run(run_dir: Path, config: RunConfig, refused: Collection[Path] = ()) -> Checkpoint | Path:
    """Find what the run in ``run_dir`` goes on from. Raises as ``find_unfinished`` does."""
    found = _find([run_dir], config, refused, str(run_dir))
    if found is None:
        cure = "start anew (resume=)"
        raise CheckpointError(f"{run_dir} has no checkpoint, and began with other settings: {cure}")
    return found


def _find(
    runs: Sequence[Path], config: RunConfig, refused: Collection[Path], where: str
) -> Checkpoint | Path | None:
    finished = [run for run in runs if finished_steps(run) >= config.train.steps]
    damaged = False
    for run_dir in runs:
        if run_dir in finished:
            continue
        _recover(run_dir)
        if (checkpoint := newest_whole(run_dir, refused)) is not None:
            return checkpoint
        if any((run_dir / "checkpoints").glob("step-*/")):
            damaged = True
        elif _has_settings(run_dir, config):
            return run_dir
    if damaged:
        raise CheckpointError(
            f"no checkpoint of {config.name} in {where} is whole: start anew (resume=), or put one back "
            "from a copy"
        )
    if finished:
        raise nothing_left(config.name, where, finished[0].name, finished_steps(finished[0]))
    return None


def note_run_id(run_dir: Path, run_id: str) -> None:
    """Save the id of the run's MLflow run, if it has one."""
    if run_id:
        write_text(run_dir / RUN_ID_FILE, run_id)


def run_id_of(run_dir: Path) -> str:
    """The id of the MLflow run that was opened for ``run_dir``; empty where none was."""
    path = run_dir / RUN_ID_FILE
    return path.read_text(encoding="utf-8").strip() if path.exists() else ""


def _recover(run_dir: Path) -> None:
    """Tidy up what a killed process left; a run that is at work, or that we may not write, stays as it is."""
    if any((run_dir / "checkpoints").glob(".step-*")):
        with suppress(InUseError, OSError), held(run_dir):
            recover_checkpoints(run_dir)


def _has_settings(run_dir: Path, config: RunConfig) -> bool:
    """Whether the run, which has no checkpoint, began with the settings of ``config``; else says it."""
    saved, given = _saved_settings(run_dir), _settings(config)
    if saved is None:
        return False
    if not config.model.date:  # the run keeps its own (day.py)
        given["model.date"] = saved["model.date"]
    other = [key for key in given if saved.get(key) != given[key]]
    if other:
        _log.warning(
            "resume=auto passes over %s, which has no checkpoint: it began with %s=%s, not %s",
            run_dir,
            other[0],
            saved.get(other[0], "nothing"),
            given[other[0]],
        )
    return not other


def _saved_settings(run_dir: Path) -> dict[str, str] | None:
    try:
        return _settings(load_config(run_dir / "config.yaml", []))
    except ConfigError:
        return None


def _settings(config: RunConfig) -> dict[str, str]:
    free = ("resume", "store.")  # another machine may have other folders
    return {key: value for key, value in flatten(config).items() if not key.startswith(free)}
