"""Everything a run needs to go on, in one folder that is complete or absent.

    <run>/checkpoints/step-000050/
        learner/          theta (a Hugging Face folder), optimizer, RNG of every rank          written by the learner
        state.json        step, policy version, task ledger, MLflow run id, rewards so far, when it was written, the other files' sizes
        config.yaml       the resolved configuration
        evaluation.json   mean held-out F1, where train.evaluate_every measured it

A checkpoint is written into a hidden folder, brought to the disk and renamed: one that can be seen is complete. Kept are the newest
``train.keep_checkpoints`` and the best. Which is best is read off the checkpoints themselves: an index or a link beside them could be out of date.
Episodes need no RNG state: task and sampling seeds follow from the run's seed and the task's position.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from actors.types import PolicyVersion
from cluster.common.errors import CheckpointError, SaveError
from cluster.fleet.ledger import LedgerSnapshot
from learner.types import LearnerError

_FORMAT = "engram-run-1"
_FOLDER = "checkpoints"
_SCORE = "evaluation.json"
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TrainState:
    """Where a run stands after ``step`` RL steps. ``warm_steps`` of the supervised stage came before them."""

    step: int
    warm_steps: int
    version: PolicyVersion
    ledger: LedgerSnapshot
    tracking_run_id: str
    rewards: tuple[float, ...]


START = TrainState(step=0, warm_steps=0, version=0, ledger=LedgerSnapshot(), tracking_run_id="", rewards=())


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


async def save_checkpoint(
    run_dir: Path,
    state: TrainState,
    config_yaml: str,
    save_learner: Callable[[Path], Awaitable[None]],
    keep: int,
) -> Checkpoint:
    """Write, rename, and delete all but the newest ``keep`` and the best. A crash on the way leaves the earlier checkpoints as they were.

    Raises SaveError (a full disk), with nothing half-written left behind.
    """
    folder = run_dir / _FOLDER / f"step-{state.step:06d}"
    partial, old = folder.with_name(f".{folder.name}.partial"), folder.with_name(f".{folder.name}.old")
    try:
        _bring_back(run_dir)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        await save_learner(partial / "learner")
        (partial / "config.yaml").write_text(config_yaml, encoding="utf-8")
        content = {"format": _FORMAT, "written": time.time(), "files": _sizes(partial), **asdict(state)}
        (partial / "state.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
        _to_disk(partial)
        if folder.exists():  # a run that was resumed from an earlier step writes this one anew
            folder.rename(old)
        partial.rename(folder)
        _sync(folder.parent)
    except (OSError, LearnerError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        cause = " ".join(str(error).split())
        raise SaveError(
            f"step {state.step} could not be saved in {folder.parent}{_room(run_dir)}: {cause}; earlier checkpoints are whole"
        ) from error
    shutil.rmtree(old, ignore_errors=True)
    _prune(run_dir, keep)
    return Checkpoint(folder, state)


def score_checkpoint(run_dir: Path, step: int, f1: float, tasks: int, keep: int) -> bool:
    """Note the mean held-out F1 of a saved step, and prune; whether it is the best so far. Raises SaveError."""
    folder = run_dir / _FOLDER / f"step-{step:06d}"
    partial = folder / f".{_SCORE}.partial"
    try:
        partial.write_text(json.dumps({"f1": f1, "tasks": tasks}), encoding="utf-8")
        _sync(partial)
        partial.rename(folder / _SCORE)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise SaveError(
            f"the evaluation of step {step} could not be saved in {folder}{_room(run_dir)}: {error}"
        ) from error
    _prune(run_dir, keep)
    return best_checkpoint(run_dir) == folder


def load_checkpoint(folder: Path) -> Checkpoint:
    """Read ``folder``'s state. Raises CheckpointError when it is no checkpoint."""
    path = folder / "state.json"
    try:
        state = _state_of(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        hint = f"; did you mean {newest}?" if (newest := _newest_below(folder)) else ""
        raise CheckpointError(f"{folder} is no checkpoint: it has no state.json{hint}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be used: {' '.join(str(error).split())[:300]}") from None
    return Checkpoint(folder, state)


def _state_of(data: Any) -> TrainState:
    """Raises ValueError, naming the field."""
    if not isinstance(data, dict) or data.get("format") != _FORMAT:
        raise ValueError(f"it is no record of format {_FORMAT}")
    ledger, rewards, run_id = data.get("ledger"), data.get("rewards"), data.get("tracking_run_id")
    if not isinstance(ledger, dict) or not isinstance(ledger.get("pending"), list):
        raise ValueError("ledger must be an object with a list of pending tasks")
    if not isinstance(rewards, list) or not all(
        isinstance(reward, int | float) and not isinstance(reward, bool) for reward in rewards
    ):
        raise ValueError("rewards must be a list of numbers")
    if not isinstance(run_id, str):
        raise ValueError("tracking_run_id must be a text")
    pending = tuple(_count({"ledger.pending": position}, "ledger.pending") for position in ledger["pending"])
    books = LedgerSnapshot(
        next_position=_count(ledger, "next_position"),
        pending=pending,
        settled=_counts(ledger, "settled"),
        failures=_counts(ledger, "failures"),
        reissued=_count({"reissued": 0, **ledger}, "reissued"),
        recovered=_counts(ledger, "recovered"),
    )
    return TrainState(
        _count(data, "step"),
        _count(data, "warm_steps"),
        _count(data, "version"),
        books,
        run_id,
        tuple(map(float, rewards)),
    )


def _count(values: Mapping[str, Any], key: str) -> int:
    value = values.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{key} must be a whole number, 0 or more")
    return value


def _counts(values: Mapping[str, Any], key: str) -> dict[str, int]:
    counts = values.get(key, {})
    if not isinstance(counts, dict):
        raise ValueError(f"{key} must be an object of counts")
    return {name: _count(counts, name) for name in counts}


def find_checkpoint(resume: str, output_dir: Path) -> Checkpoint | None:
    """What ``resume`` names: None for "" (start anew), the newest in ``output_dir`` for "auto" (None when there is none), else a folder."""
    if not resume:
        return None
    if resume == "auto":
        return _newest_whole(output_dir)
    folder = Path(resume).expanduser().absolute()
    _bring_back(folder.parent.parent)
    return _whole(folder)


def _newest_whole(output_dir: Path) -> Checkpoint | None:
    """One that was damaged after it was written is passed over, and said to be. Raises CheckpointError when there are some and none is whole."""
    for run in output_dir.glob("*/"):
        _bring_back(run)
    folders = [folder for run in output_dir.glob("*/") for folder in (run / _FOLDER).glob("step-*/")]
    for folder in sorted(folders, key=_written, reverse=True):
        try:
            return _whole(folder)
        except CheckpointError as error:
            _log.warning("resume=auto passes over a damaged checkpoint: %s", error)
    if folders:
        raise CheckpointError(
            f"no checkpoint in {output_dir} is whole: start anew (resume=), or put one back from a copy"
        )
    return None


def _whole(folder: Path) -> Checkpoint:
    """As ``load_checkpoint``, all its files being there in full. What was written before sizes were kept is believed."""
    checkpoint, sizes = load_checkpoint(folder), _json(folder / "state.json").get("files", {})
    if not isinstance(sizes, dict):
        raise CheckpointError(f"{folder / 'state.json'} cannot be used: files must be an object of sizes")
    for name, size in sizes.items():
        try:
            found = (folder / name).stat().st_size
        except OSError:
            raise CheckpointError(f"{folder} is incomplete: {name} is missing") from None
        if found != size:
            raise CheckpointError(f"{folder} is incomplete: {name} has {found} bytes, {size} were written")
    return checkpoint


def _sizes(folder: Path) -> dict[str, int]:
    """Bytes of every file below ``folder``."""
    return {
        str(path.relative_to(folder)): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def list_checkpoints(run_dir: Path) -> list[Path]:
    """The complete checkpoints of a run, in the order in which they were written: after a resume from an earlier step not that of the steps."""
    return sorted((path.parent for path in (run_dir / _FOLDER).glob("step-*/state.json")), key=_written)


def best_checkpoint(run_dir: Path) -> Path | None:
    """The evaluated checkpoint with the highest mean held-out F1; of equal ones the earliest. None where none was evaluated."""
    scored = [
        (score, folder) for folder in list_checkpoints(run_dir) if (score := score_of(folder)) is not None
    ]
    return max(scored, key=lambda one: one[0], default=(0.0, None))[1]


def score_of(folder: Path) -> float | None:
    """Mean held-out F1 (0..1) of the checkpoint in ``folder``; None where it was not evaluated."""
    score = _json(folder / _SCORE).get("f1")
    return float(score) if isinstance(score, int | float) and math.isfinite(score) else None


def _prune(run_dir: Path, keep: int) -> None:
    best = best_checkpoint(run_dir)
    for old in list_checkpoints(run_dir)[:-keep]:
        if old != best:
            shutil.rmtree(old)


def written(folder: Path) -> float:
    """When the checkpoint was, as it says itself: file times do not survive a copy. Of a damaged one the folder's."""
    when = _json(folder / "state.json").get("written")
    return float(when) if isinstance(when, int | float) else folder.stat().st_mtime


def _written(folder: Path) -> tuple[float, str]:
    return written(folder), folder.name


def _json(path: Path) -> dict[str, Any]:
    """Empty for a file that is missing or damaged: who needs it says so (load_checkpoint)."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _bring_back(run_dir: Path) -> None:
    """A checkpoint that was about to be replaced when the process died is put back."""
    for old in (run_dir / _FOLDER).glob(".step-*.old"):
        folder = old.with_name(old.name.removeprefix(".").removesuffix(".old"))
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.rename(folder)


def _to_disk(folder: Path) -> None:
    """All below ``folder`` survives a power cut from here on, so that the rename cannot come before what it renames."""
    for path in sorted(folder.rglob("*"), reverse=True):
        _sync(path)
    _sync(folder)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _room(run_dir: Path) -> str:
    try:
        return f" ({shutil.disk_usage(run_dir).free / 2**20:.0f} MiB free)"
    except OSError:
        return ""


def _newest_below(folder: Path) -> Path | None:
    """For someone who named the run's folder, or the checkpoints folder, in place of a checkpoint."""
    below = [*list_checkpoints(folder), *list_checkpoints(folder.parent)]
    return below[-1] if below else None
