"""Saves and finds checkpoints: everything a run needs to go on, in one folder that is complete or absent.

    <run>/checkpoints/step-000050/
        learner/          theta (a Hugging Face folder), optimizer, RNG of every rank; the learner writes it
        state.json        step, policy version, task ledger, MLflow run id, rewards, sizes of the other files
        config.yaml       the resolved configuration
        evaluation.json   mean held-out score, where train.evaluate_every measured it

A checkpoint is written into a hidden folder, brought to the disk and renamed: a visible one is complete.
The newest ``train.keep_checkpoints`` and the best are kept. The scores stand in the checkpoints themselves:
an index or a link beside them could be out of date.
Episodes need no RNG state: task and sampling seeds follow from the run's seed and the task's position.
"""

from __future__ import annotations

import logging
import shutil
import socket
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

from pydantic import FiniteFloat, NonNegativeInt

from cluster.common.errors import CheckpointError, SaveError
from cluster.fleet.ledger import LedgerSnapshot
from configs.files import FileError, dump_json, new_folder, read_json, sync_tree, write_text
from configs.schema import RunConfig
from learner.types import LearnerError

_FOLDER, _STATE, _SCORE = "checkpoints", "state.json", "evaluation.json"
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StageProgress:
    """Where a run stands in its curriculum (cluster/train/curriculum.py)."""

    stage: NonNegativeInt = 0  # place in curriculum.stages
    steps: NonNegativeInt = 0  # that were made in it
    figures: tuple[float, ...] = ()  # the last ones of its metric


@dataclass(frozen=True, slots=True)
class TrainState:
    """Where a run stands after ``step`` RL steps and, before them, ``warm_steps`` supervised ones."""

    step: NonNegativeInt
    warm_steps: NonNegativeInt
    version: NonNegativeInt
    ledger: LedgerSnapshot
    tracking_run_id: str
    rewards: tuple[float, ...]
    curriculum: StageProgress = StageProgress()


START = TrainState(step=0, warm_steps=0, version=0, ledger=LedgerSnapshot(), tracking_run_id="", rewards=())


@dataclass(frozen=True, slots=True, kw_only=True)
class _StateFile(TrainState):
    """``state.json``. Older versions of Engram wrote neither ``written`` nor ``files``."""

    format: Literal["engram-run-1"]
    written: float | None = None  # seconds since the epoch
    files: dict[str, int] = field(default_factory=dict)  # bytes by path below the checkpoint

    @property
    def state(self) -> TrainState:
        return TrainState(*(getattr(self, part.name) for part in fields(TrainState)))


@dataclass(frozen=True, slots=True)
class _Score:
    """``evaluation.json``."""

    f1: FiniteFloat | None = None  # mean held-out F1, 0..1
    reward: FiniteFloat | None = None  # the mean held-out reward, where no task has an answer
    tasks: NonNegativeInt = 0


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    folder: Path
    state: TrainState

    @property
    def learner(self) -> Path:
        return self.folder / "learner"

    @property
    def model(self) -> Path:
        """Theta as a Hugging Face folder."""
        return self.learner / "model"

    @property
    def run_dir(self) -> Path:
        return self.folder.parent.parent


# --- write ------------------------------------------------------------------------------------------------


async def save_checkpoint(
    run_dir: Path,
    state: TrainState,
    config_yaml: str,
    save_learner: Callable[[Path], Awaitable[None]],
    keep: int,
) -> Checkpoint:
    """Write a checkpoint, then delete all but the newest ``keep`` and the best.

    A crash on the way leaves the earlier checkpoints as they were. Raises SaveError (a full disk), with
    nothing half-written left behind.
    """
    folder = run_dir / _FOLDER / f"step-{state.step:06d}"
    replaced = folder.with_name(f".{folder.name}.old")
    try:
        _restore_replaced(run_dir)
        with new_folder(folder) as partial:
            await save_learner(partial / "learner")
            (partial / "config.yaml").write_text(config_yaml, encoding="utf-8")
            (partial / _STATE).write_text(_state_json(state, partial), encoding="utf-8")
            if folder.exists():  # a run that was resumed from an earlier step writes this step again
                sync_tree(partial)  # first, since no checkpoint of this step is visible between the renames
                folder.rename(replaced)
    except (OSError, LearnerError) as error:
        _restore_replaced(run_dir)
        cause = " ".join(str(error).split())
        raise SaveError(
            f"step {state.step} could not be saved in {folder.parent}{_free_space(run_dir)}: {cause}; "
            "earlier checkpoints are whole"
        ) from error
    shutil.rmtree(replaced, ignore_errors=True)
    _prune(run_dir, keep)
    return Checkpoint(folder, state)


def _state_json(state: TrainState, folder: Path) -> str:
    """The text of ``state.json`` for a checkpoint whose other files are in ``folder``."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return dump_json(
        _StateFile(
            step=state.step,
            warm_steps=state.warm_steps,
            version=state.version,
            ledger=state.ledger,
            tracking_run_id=state.tracking_run_id,
            rewards=state.rewards,
            curriculum=state.curriculum,
            format="engram-run-1",
            written=time.time(),
            files={str(path.relative_to(folder)): path.stat().st_size for path in files},
        )
    )


def score_checkpoint(run_dir: Path, step: int, name: str, score: float, tasks: int, keep: int) -> bool:
    """Save the mean held-out score of a saved step ("f1" or "reward"), and prune.

    Returns whether it is the best so far. Raises SaveError.
    """
    folder = run_dir / _FOLDER / f"step-{step:06d}"
    try:
        write_text(folder / _SCORE, dump_json(_Score(**{name: score}, tasks=tasks)))
    except OSError as error:
        raise SaveError(
            f"the evaluation of step {step} could not be saved in {folder}{_free_space(run_dir)}: {error}"
        ) from error
    _prune(run_dir, keep)
    return best_checkpoint(run_dir) == folder


def _prune(run_dir: Path, keep: int) -> None:
    best = best_checkpoint(run_dir)
    for folder in list_checkpoints(run_dir)[:-keep]:
        if folder != best:
            shutil.rmtree(folder)


def _restore_replaced(run_dir: Path) -> None:
    """Give a checkpoint its name back that was about to be replaced when the process died."""
    for replaced in (run_dir / _FOLDER).glob(".step-*.old"):
        folder = replaced.with_name(replaced.name.removeprefix(".").removesuffix(".old"))
        if folder.exists():
            shutil.rmtree(replaced, ignore_errors=True)
        else:
            replaced.rename(folder)


def _free_space(run_dir: Path) -> str:
    try:
        return f" ({shutil.disk_usage(run_dir).free / 2**20:.0f} MiB free)"
    except OSError:
        return ""


# --- find and read ----------------------------------------------------------------------------------------


def load_checkpoint(folder: Path) -> Checkpoint:
    """Read the state of the checkpoint in ``folder``. Raises CheckpointError when it is no checkpoint."""
    return Checkpoint(folder, _read_state(folder).state)


def _read_state(folder: Path) -> _StateFile:
    try:
        return read_json(folder / _STATE, _StateFile)
    except FileNotFoundError:
        # for a user who named the run's folder, or its checkpoints folder
        nearby = [*list_checkpoints(folder), *list_checkpoints(folder.parent)]
        hint = f"; did you mean {nearby[-1]}?" if nearby else ""
        raise CheckpointError(f"{folder} is no checkpoint: it has no {_STATE}{hint}") from None
    except FileError as error:
        raise CheckpointError(str(error)[:500]) from None


def find_checkpoint(resume: str, output_dir: Path) -> Checkpoint | None:
    """Find the checkpoint that ``resume`` names; all its files are there in full. Raises CheckpointError.

    "" is None (start anew), "auto" the newest in ``output_dir`` (None when there is none), else a folder.
    """
    if not resume:
        return None
    if resume == "auto":
        return _newest_whole(output_dir)
    folder = Path(resume).expanduser().absolute()
    _restore_replaced(folder.parent.parent)
    return _load_whole(folder)


def _newest_whole(output_dir: Path) -> Checkpoint | None:
    """Find the newest undamaged checkpoint; damaged ones are skipped with a warning.

    Raises CheckpointError when every checkpoint is damaged.
    """
    for run_dir in output_dir.glob("*/"):
        _restore_replaced(run_dir)
    folders = [folder for run_dir in output_dir.glob("*/") for folder in (run_dir / _FOLDER).glob("step-*/")]
    for folder in sorted(folders, key=_age_order, reverse=True):
        try:
            return _load_whole(folder)
        except CheckpointError as error:
            _log.warning("resume=auto skips a damaged checkpoint: %s", error)
    if folders:
        raise CheckpointError(
            f"no checkpoint in {output_dir} is whole: start anew (resume=), or put one back from a copy"
        )
    return None


def _load_whole(folder: Path) -> Checkpoint:
    """As ``load_checkpoint``, and check that every file has the size that was written.

    Checkpoints from before sizes were kept are not checked.
    """
    saved = _read_state(folder)
    for name, size in saved.files.items():
        try:
            present = (folder / name).stat().st_size
        except OSError:
            raise CheckpointError(f"{folder} is incomplete: {name} is missing") from None
        if present != size:
            raise CheckpointError(f"{folder} is damaged: {name} has {present} bytes, {size} were written")
    return Checkpoint(folder, saved.state)


def list_checkpoints(run_dir: Path) -> list[Path]:
    """List the complete checkpoints of a run in the order in which they were written.

    After a resume from an earlier step this is not the order of the steps.
    """
    return sorted((path.parent for path in (run_dir / _FOLDER).glob(f"step-*/{_STATE}")), key=_age_order)


def best_checkpoint(run_dir: Path) -> Path | None:
    """Find the evaluated checkpoint with the highest mean held-out score, the earliest of equal ones.

    None where none was evaluated.
    """
    scored = [
        (score[1], folder) for folder in list_checkpoints(run_dir) if (score := score_of(folder)) is not None
    ]
    return max(scored, key=lambda pair: pair[0])[1] if scored else None


def score_of(folder: Path) -> tuple[str, float] | None:
    """The mean held-out "f1" (0..1) or "reward" of a checkpoint; None where it was not evaluated."""
    try:
        saved = read_json(folder / _SCORE, _Score)
    except (FileNotFoundError, FileError):
        return None
    scores = (("f1", saved.f1), ("reward", saved.reward))
    return next(((name, score) for name, score in scores if score is not None), None)


def written(folder: Path) -> float:
    """When the checkpoint was written, in seconds since the epoch, as its own state says.

    File times do not survive a copy. For a damaged checkpoint, the time of its folder.
    """
    try:
        saved = read_json(folder / _STATE, _StateFile).written
    except (FileNotFoundError, FileError):
        saved = None
    return folder.stat().st_mtime if saved is None else saved


def _age_order(folder: Path) -> tuple[float, str]:
    return written(folder), folder.name


# --- for the tracker --------------------------------------------------------------------------------------


def kept_models(config: RunConfig, run_dir: Path) -> list[dict[str, str]]:
    """Describe the undamaged checkpoints of a run for the tracker, oldest first.

    The newest and the best (by the held-out score, where it was measured) have these words as aliases.
    """
    if config.tracking.models == "off":
        return []
    checkpoints: list[Checkpoint] = []
    for folder in list_checkpoints(run_dir):
        try:
            checkpoints.append(load_checkpoint(folder))
        except CheckpointError:  # a user who resumes or evaluates it gets the reason then
            continue
    best = best_checkpoint(run_dir)
    models = []
    for checkpoint in checkpoints:
        aliases = {"newest": checkpoint is checkpoints[-1], "best": checkpoint.folder == best}
        models.append(_model_values(config, checkpoint, [alias for alias, holds in aliases.items() if holds]))
    return models


def _model_values(config: RunConfig, checkpoint: Checkpoint, aliases: list[str]) -> dict[str, str]:
    values = {
        "registered": f"engram-{config.name}",
        "name": f"{checkpoint.run_dir.name}-{checkpoint.folder.name}",
        "folder": str(checkpoint.folder),
        "weights": str(checkpoint.model),
        "host": socket.gethostname(),
        "base": config.model.name,
        "step": str(checkpoint.state.step),
        "policy_version": str(checkpoint.state.version),
        "upload": str(config.tracking.models == "upload"),
        "aliases": " ".join(aliases),
    }
    score = score_of(checkpoint.folder)
    return values if score is None else values | {f"held_out_{score[0]}": f"{score[1]:.6f}"}
