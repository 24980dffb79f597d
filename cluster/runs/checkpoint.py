"""Saves and finds checkpoints: everything a run needs to go on, in one folder that is complete or absent.

    <run>/checkpoints/step-000050/
        learner/          theta (a Hugging Face folder), optimizer, RNG of every rank; the learner writes it
        state.json        step, generation, policy version, ledger, MLflow run, rewards, curriculum's stage
        config.yaml       the resolved configuration
        SHA256SUMS        a digest of each file above, as ``sha256sum --check`` reads it
        evaluation.json   mean held-out score, where train.evaluate_every measured it

A checkpoint is written into a hidden folder, brought to the disk and renamed: a visible one is complete.
Its digests are checked before a run goes on from it: what the disk has changed since is not trained on.
The newest ``train.keep_checkpoints`` and the best are kept. The scores stand in the checkpoints themselves:
an index or a link beside them could be out of date.
Checkpoints are ordered by generation, then by step. A run that went back to an earlier step is in its next
generation. The clock has no say: it may be set back.
Episodes need no RNG state: task and sampling seeds follow from the run's seed and the task's position.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
import socket
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from pydantic import FiniteFloat, NonNegativeInt

from cluster.common.errors import CheckpointError, SaveError
from cluster.fleet.ledger import LedgerSnapshot
from configs.files import (
    FileError,
    check_digests,
    dump_json,
    new_folder,
    read_json,
    recover_folder,
    remove_folder,
    sync_tree,
    write_digests,
    write_text,
)
from configs.schema import RunConfig
from learner.types import LearnerError, LearnerLost

_FOLDER, STATE_FILE, _SCORE = "checkpoints", "state.json", "evaluation.json"
COMPANION = "engram"
"""A subfolder of an exported model: vLLM reads every safetensors file beside config.json as weights."""
Place = tuple[int, int]  # generation and step of a checkpoint: the order in which they were written
_NOWHERE: Place = (-1, -1)  # of a checkpoint whose state cannot be read
_BEFORE_ALL: Place = (-2, -2)
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StageProgress:
    """Where a run stands in its curriculum (cluster/train/curriculum.py)."""

    stage: NonNegativeInt = 0  # place in curriculum.stages
    steps: NonNegativeInt = 0  # that were made in it
    figures: tuple[float, ...] = ()  # the last ones of its metric


@dataclass(frozen=True, slots=True)
class TrainState:
    """Where a run stands after ``step`` RL steps and, before them, ``warm_steps`` supervised ones.

    ``version`` counts these steps, and the ``lost_versions``: those that a lost learner had made since its
    last checkpoint. Their numbers are never given again. ``learner_restarts`` counts how often that was.
    """

    step: NonNegativeInt
    warm_steps: NonNegativeInt
    version: NonNegativeInt
    ledger: LedgerSnapshot
    tracking_run_id: str
    rewards: tuple[float, ...]
    curriculum: StageProgress = StageProgress()
    lost_versions: NonNegativeInt = 0
    learner_restarts: NonNegativeInt = 0


START = TrainState(step=0, warm_steps=0, version=0, ledger=LedgerSnapshot(), tracking_run_id="", rewards=())


@dataclass(frozen=True, slots=True, kw_only=True)
class _StateFile(TrainState):
    """``state.json``. Older versions of Engram wrote neither ``generation`` nor digests."""

    format: Literal["engram-run-1"]
    generation: NonNegativeInt = 0
    has_digests: bool = False

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

    @property
    def title(self) -> str:
        return f"{self.run_dir.name}/{self.folder.name}"


class ExportedCheckpoint(Checkpoint):
    """What ``engram export`` made of a checkpoint: to be played, not trained on. ``folder``: DIR/engram."""

    @property
    def model(self) -> Path:
        return self.folder.parent

    @property
    def run_dir(self) -> Path:
        """Where its basis lies."""
        return self.folder

    @property
    def title(self) -> str:
        return f"{self.model.name} (exported)"


# --- write ------------------------------------------------------------------------------------------------


async def save_checkpoint(
    run_dir: Path,
    state: TrainState,
    config_yaml: str,
    save_learner: Callable[[Path], Awaitable[None]],
    keep: int,
    in_use: Collection[Path] = (),
) -> Checkpoint:
    """Write a checkpoint, then delete all but the newest ``keep``, the best, and those ``in_use``.

    A crash on the way leaves the earlier checkpoints as they were. Raises SaveError (a full disk) and
    LearnerLost, with nothing half-written left behind.
    """
    folder = run_dir / _FOLDER / f"step-{state.step:06d}"
    try:
        recover_checkpoints(run_dir)
        saved = _state_file(state, _next_generation(run_dir, state.step))
        with new_folder(folder, replace=True) as partial:
            await save_learner(partial / "learner")
            (partial / "config.yaml").write_text(config_yaml, encoding="utf-8")
            (partial / STATE_FILE).write_text(dump_json(saved), encoding="utf-8")
            await asyncio.to_thread(_seal, partial)  # gigabytes: the event loop serves the workers meanwhile
    except (OSError, LearnerError) as error:
        if isinstance(error, LearnerLost):
            raise  # the disk is not to blame, and the learner may come back
        cause = " ".join(str(error).split())
        raise SaveError(
            f"step {state.step} could not be saved in {folder.parent}{_free_space(run_dir)}: {cause}; "
            "earlier checkpoints are whole"
        ) from error
    prune(run_dir, keep, {folder, *in_use})
    return Checkpoint(folder, state)


def _state_file(state: TrainState, generation: int) -> _StateFile:
    values = {item.name: getattr(state, item.name) for item in fields(TrainState)}
    return _StateFile(**values, format="engram-run-1", generation=generation, has_digests=True)


def _next_generation(run_dir: Path, step: int) -> int:
    """The generation of a checkpoint that is written now: a step that does not go on begins the next one."""
    generation, newest = max((place_of(folder) for folder in list_checkpoints(run_dir)), default=(0, -1))
    return max(0, generation) if step > newest else max(0, generation) + 1


def _seal(folder: Path) -> None:
    write_digests(folder)
    sync_tree(folder)


def score_checkpoint(
    run_dir: Path, step: int, name: str, score: float, tasks: int, keep: int, in_use: Collection[Path] = ()
) -> bool:
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
    prune(run_dir, keep, {folder, *in_use})
    return best_checkpoint(run_dir) == folder


def prune(run_dir: Path, keep: int, in_use: Collection[Path] = ()) -> None:
    """Delete all but the newest ``keep``, the best, and those ``in_use``.

    One that cannot be deleted is a warning: it costs space, not the run.
    """
    kept = {*list_checkpoints(run_dir)[-keep:], best_checkpoint(run_dir), *in_use}
    for folder in list_checkpoints(run_dir):
        if folder in kept:
            continue
        try:
            remove_folder(folder)
        except OSError as error:
            _log.warning("warning: the old checkpoint %s cannot be deleted (%s)", folder, error.strerror)


def recover_checkpoints(run_dir: Path) -> None:
    """Tidy up after a process that died while it replaced or deleted a checkpoint. Raises OSError.

    Only for the process that holds the run's lock: another one's work looks the same.
    """
    for hidden in (run_dir / _FOLDER).glob(".step-*"):
        folder = hidden.with_name(hidden.stem.removeprefix("."))
        if hidden.suffix == ".old":
            recover_folder(folder)
        else:
            shutil.rmtree(hidden, ignore_errors=True)


def _free_space(run_dir: Path) -> str:
    try:
        return f" ({shutil.disk_usage(run_dir).free / 2**20:.0f} MiB free)"
    except OSError:
        return ""


# --- find and read ----------------------------------------------------------------------------------------


def load_played(folder: Path) -> Checkpoint:
    """As ``load_checkpoint``, of an exported checkpoint too. Raises CheckpointError."""
    companion = folder / COMPANION
    if not companion.is_dir():
        return load_checkpoint(folder)
    if not (companion / STATE_FILE).exists():
        cure = f"export it again, or evaluate with model.name={folder} (the basis is then made anew)"
        raise CheckpointError(f"{folder} was exported by an older version, without its state; {cure}")
    return ExportedCheckpoint(companion, _read_state(companion).state)


def load_checkpoint(folder: Path) -> Checkpoint:
    """Read the state of the checkpoint in ``folder``. Raises CheckpointError when it is no checkpoint."""
    return Checkpoint(folder, _read_state(folder).state)


def _read_state(folder: Path) -> _StateFile:
    try:
        return read_json(folder / STATE_FILE, _StateFile)
    except FileNotFoundError:
        # for a user who named the run's folder, or its checkpoints folder
        nearby = [*list_checkpoints(folder), *list_checkpoints(folder.parent)]
        hint = f"; did you mean {nearby[-1]}?" if nearby else ""
        raise CheckpointError(f"{folder} is no checkpoint: it has no {STATE_FILE}{hint}") from None
    except FileError as error:
        raise CheckpointError(str(error)[:500]) from None


def newest_whole(
    run_dir: Path, refused: Collection[Path] = (), after: Place = _BEFORE_ALL
) -> Checkpoint | None:
    """Find the newest checkpoint of a run whose files are as they were written; None where there is none.

    Each that is passed over is a warning with its reason. Those ``refused`` could not be loaded before.
    ``after``: only those with a later place count.
    """
    folders = (run_dir / _FOLDER).glob("step-*/")
    places = {folder: place for folder in folders if (place := place_of(folder)) > after}
    unreadable = [folder for folder, place in places.items() if place == _NOWHERE]
    for folder in [*unreadable, *sorted(places.keys() - unreadable, key=places.__getitem__, reverse=True)]:
        try:
            if folder not in refused:
                return load_whole(folder)
        except CheckpointError as error:
            _log.warning("resume=auto passes over a damaged checkpoint: %s", error)
    return None


def load_whole(folder: Path) -> Checkpoint:
    """As ``load_checkpoint``, and check the digest of every file. Raises CheckpointError.

    Checkpoints from before digests were kept are not checked.
    """
    saved = _read_state(folder)
    if saved.has_digests:
        try:
            check_digests(folder)
        except FileError as error:
            raise CheckpointError(str(error)) from None
    return Checkpoint(folder, saved.state)


def list_checkpoints(run_dir: Path) -> list[Path]:
    """List the complete checkpoints of a run in the order in which they were written, damaged ones first.

    After a resume from an earlier step this is not the order of the steps.
    """
    return sorted((path.parent for path in (run_dir / _FOLDER).glob(f"step-*/{STATE_FILE}")), key=place_of)


def best_checkpoint(run_dir: Path) -> Path | None:
    """Find the evaluated checkpoint with the highest mean held-out score, the earliest of equal ones.

    None: none was evaluated. Where some have a reward, F1 does not count: an environment of theirs failed.
    """
    scores = {folder: score for folder in list_checkpoints(run_dir) if (score := score_of(folder))}
    kind = max((name for name, _ in scores.values()), default="")  # "reward" stands behind "f1"
    compared = {folder: value for folder, (name, value) in scores.items() if name == kind}
    return max(compared, key=lambda folder: compared[folder], default=None)


def score_of(folder: Path) -> tuple[str, float] | None:
    """The mean held-out "f1" (0..1) or "reward" of a checkpoint; None where it was not evaluated."""
    try:
        saved = read_json(folder / _SCORE, _Score)
    except (FileNotFoundError, FileError):
        return None
    scores = (("f1", saved.f1), ("reward", saved.reward))
    return next(((name, score) for name, score in scores if score is not None), None)


def place_of(folder: Path) -> Place:
    """(generation, step) of a checkpoint; one whose state cannot be read comes before all others."""
    try:
        saved = read_json(folder / STATE_FILE, _StateFile)
    except (FileNotFoundError, FileError):
        return _NOWHERE
    return saved.generation, saved.step


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
