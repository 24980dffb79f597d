"""Everything a run needs to go on, in one folder that is complete or absent.

    <run>/checkpoints/step-000050/
        learner/       theta (a Hugging Face folder), optimizer, RNG of every rank          written by the learner
        state.json     step, policy version, task ledger, MLflow run id, rewards so far
        config.yaml    the resolved configuration

A checkpoint is written into a hidden folder and renamed: one that can be seen is complete. Episodes need no RNG state: task and sampling seeds follow
from the run's seed and the task's position.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from actors.types import PolicyVersion
from cluster.errors import CheckpointError
from cluster.ledger import LedgerSnapshot

_FORMAT = "engram-run-1"
_FOLDER = "checkpoints"


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
    run_dir: Path, state: TrainState, config_yaml: str, save_learner: Callable[[Path], Awaitable[None]], keep: int
) -> Checkpoint:
    """Write, rename, and delete all but the newest ``keep``. A crash on the way leaves the earlier checkpoints as they were."""
    folder = run_dir / _FOLDER / f"step-{state.step:06d}"
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    await save_learner(partial / "learner")
    (partial / "config.yaml").write_text(config_yaml, encoding="utf-8")
    (partial / "state.json").write_text(json.dumps({"format": _FORMAT, **asdict(state)}, indent=1), encoding="utf-8")
    if folder.exists():  # a run that was resumed from an earlier step writes this one anew
        shutil.rmtree(folder)
    partial.rename(folder)
    for old in list_checkpoints(run_dir)[:-keep]:
        shutil.rmtree(old)
    return Checkpoint(folder, state)


def load_checkpoint(folder: Path) -> Checkpoint:
    """Read ``folder``'s state. Raises CheckpointError when it is no checkpoint."""
    path = folder / "state.json"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data.pop("format") != _FORMAT:
            raise ValueError(f"its format is not {_FORMAT}")
        ledger = data.pop("ledger")
        ledger["pending"] = tuple(ledger["pending"])
        state = TrainState(ledger=LedgerSnapshot(**ledger), rewards=tuple(data.pop("rewards")), **data)
    except FileNotFoundError:
        hint = f"; did you mean {newest}?" if (newest := _newest_below(folder)) else ""
        raise CheckpointError(f"{folder} is no checkpoint: it has no state.json{hint}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be used: {error}") from None
    return Checkpoint(folder, state)


def find_checkpoint(resume: str, output_dir: Path) -> Checkpoint | None:
    """What ``resume`` names: None for "" (start anew), the newest in ``output_dir`` for "auto" (None when there is none), else a folder."""
    if not resume:
        return None
    if resume == "auto":
        folders = [folder for run in sorted(output_dir.glob("*/")) for folder in list_checkpoints(run)]
        newest = max(folders, key=lambda folder: (folder / "state.json").stat().st_mtime_ns, default=None)
        return None if newest is None else load_checkpoint(newest)
    return load_checkpoint(Path(resume).expanduser().absolute())


def list_checkpoints(run_dir: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return sorted(path.parent for path in (run_dir / _FOLDER).glob("step-*/state.json"))


def _newest_below(folder: Path) -> Path | None:
    """For someone who named the run's folder, or the checkpoints folder, in place of a checkpoint."""
    below = [*list_checkpoints(folder), *list_checkpoints(folder.parent)]
    return below[-1] if below else None
