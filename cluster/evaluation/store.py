"""The folder of an evaluation: what a killed one leaves behind, and what a resumed one need not run again.

    cells/<key>.jsonl    a running cell: first its settings, then each episode as it finishes (a last line that was cut off is dropped)
    cells/<key>.json     a finished cell, written in one step; the .jsonl goes, but where episodes failed, which a resumed evaluation runs again

Both hold every setting that decides the figures. A cell is only gone on with under the same settings.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from actors.peak_memory import PeakMemory
from actors.types import TrajectoryGroup
from cluster.common.errors import CheckpointError, SaveError
from cluster.evaluation.plan import Cell
from cluster.measure.rows import (
    EpisodeScore,
    RowResult,
    episode_from_json,
    failure_text,
    row_from_json,
    score_episode,
)
from configs.load import flatten

_DECIDING = (
    *("seed", "model.", "environment.", "memory.", "fast_weights.", "write."),
    *("embedder.", "sampling.", "engine.", "rollout.", "evaluation.tasks", "evaluation.temperature"),
)
_RESOURCES = (  # what may differ between a killed evaluation and the one that goes on from it
    "engine.slots",
    "engine.kv_cache_gib",
    "engine.gpu_memory_utilization",
    "rollout.workers",
    "rollout.cpus_per_worker",
    "rollout.gpus_per_worker",
    "rollout.threads",
    "rollout.resource",
    "rollout.schedule",
    "rollout.health_s",
    "rollout.refresh",
    "rollout.recover_episodes",
    "environment.rubric.judge.api_key_env",
    "environment.rubric.judge.timeout_s",
    "environment.rubric.judge.retries",
    "environment.rubric.judge.max_concurrent",
    "environment.rubric.judge.cache_dir",
)


@dataclass(frozen=True, slots=True)
class Done:
    """One task of a running cell that is over: an episode, or why there is none."""

    position: int
    policy_version: int
    episodes: tuple[EpisodeScore, ...]
    failed: tuple[str, ...]

    @staticmethod
    def of(position: int, group: TrajectoryGroup) -> Done:
        episodes = tuple(score_episode(trajectory) for trajectory in group.trajectories)
        return Done(
            position, group.policy_version, episodes, tuple(failure_text(failure) for failure in group.failed)
        )


@dataclass(frozen=True, slots=True)
class CellResult:
    """A finished cell. ``peak`` is the worst of its workers while it ran (of its last part, where it was interrupted)."""

    result: RowResult
    peak: PeakMemory


class CellStore:
    """The files of one evaluation's cells. ``identity`` is what decides the figures beside the configuration: the weights, by name."""

    def __init__(self, folder: Path, identity: Mapping[str, str]) -> None:
        self._folder = folder
        self._identity = dict(identity)

    def finished(self, cell: Cell) -> CellResult | None:
        """None where the cell is still to be run. Raises CheckpointError when it was run under other settings, or the file is not one of these."""
        path = self._final(cell)
        if not path.exists():
            return None
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            self._check_same(path, cell, data["settings"])
            return CellResult(row_from_json(data["result"]), PeakMemory(**data["peak"]))
        except (KeyError, TypeError, ValueError) as error:
            raise _unreadable(path, error) from error

    def begun(self, cell: Cell) -> list[Done]:
        """The episodes that a cell has already, where it was interrupted or some failed: those are still to be run. Raises as ``finished`` does."""
        path = self._running(cell)
        if not path.exists():
            return []
        lines = path.read_text(encoding="utf-8").split("\n")
        if len(lines) < 2:  # not even the settings are complete
            return []
        try:
            self._check_same(path, cell, json.loads(lines[0])["settings"])
            found = [
                _done_from_json(json.loads(line)) for line in lines[1:-1]
            ]  # behind the last line break: nothing, or a line that was cut off
            return [done for done in found if not done.failed]
        except (KeyError, TypeError, ValueError) as error:
            raise _unreadable(path, error) from error

    def journal(self, cell: Cell, begun: list[Done]) -> Journal:
        """Go on with a cell: its journal anew, with what is there already. Raises SaveError."""
        path = self._running(cell)
        lines = [json.dumps({"settings": self.settings(cell)}), *(json.dumps(asdict(done)) for done in begun)]
        _write(path, "".join(f"{line}\n" for line in lines))
        return Journal(path, begun)

    def finish(self, cell: Cell, done: list[Done], peak: PeakMemory) -> None:
        """Raises SaveError."""
        ordered = sorted(done, key=lambda one: one.position)
        result = RowResult(
            label=cell.variant.label,
            policy_version=max((one.policy_version for one in ordered), default=0),
            episodes=tuple(episode for one in ordered for episode in one.episodes),
            failed=tuple(message for one in ordered for message in one.failed),
        )
        content = {"settings": self.settings(cell), "result": asdict(result), "peak": asdict(peak)}
        _write(self._final(cell), json.dumps(content, indent=1))
        if not result.failed:  # else it says which episodes need not be run again
            self._running(cell).unlink(missing_ok=True)

    def settings(self, cell: Cell) -> dict[str, str]:
        """Everything that decides the cell's figures, a fingerprint of the data files included."""
        flat = {
            key: value
            for key, value in flatten(cell.config).items()
            if key.startswith(_DECIDING) and key not in _RESOURCES
        }
        files = {
            f"file {key}": _fingerprint(value)
            for key, value in flat.items()
            if key.endswith("path") and value and Path(value).is_file()
        }
        return {**flat, **files, **self._identity}

    def _check_same(self, path: Path, cell: Cell, saved: Mapping[str, str]) -> None:
        given = self.settings(cell)
        for key in sorted({*saved, *given}):
            if saved.get(key) != given.get(key):
                before, now = saved.get(key, "nothing"), given.get(key, "nothing")
                raise CheckpointError(
                    f"{path}: was measured with {key}={before}, not {now}: use that value, or evaluate into a new folder"
                )

    def _running(self, cell: Cell) -> Path:
        return self._folder / f"{cell.key}.jsonl"

    def _final(self, cell: Cell) -> Path:
        return self._folder / f"{cell.key}.json"


class Journal:
    """A running cell on disk: a line for each task, out of the process before the next one begins."""

    def __init__(self, path: Path, begun: list[Done]) -> None:
        self.done = list(begun)
        self._path = path
        with saving(path):
            self._file = path.open("a", encoding="utf-8")

    def add(self, done: Done) -> None:
        """Raises SaveError."""
        with saving(self._path):
            self._file.write(f"{json.dumps(asdict(done))}\n")
            self._file.flush()
        self.done.append(done)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):  # of a line that could not be written, which add has said
            self._file.close()


@contextmanager
def saving(path: Path) -> Iterator[None]:
    """For whoever writes ``path`` in the block. Raises SaveError where that fails (a full disk)."""
    try:
        yield
    except OSError as error:
        cure = "make room there and go on with --resume"
        raise SaveError(
            f"{path}: cannot be written ({error.strerror or error}); what was saved before is whole: {cure}"
        ) from error


def _done_from_json(data: Mapping[str, Any]) -> Done:
    return Done(
        data["position"],
        data["policy_version"],
        tuple(map(episode_from_json, data["episodes"])),
        tuple(data["failed"]),
    )


def _write(path: Path, text: str) -> None:
    """In one step: a reader finds the old file or the new one. Raises SaveError."""
    beside = path.with_name(f"{path.name}.tmp")
    with saving(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with beside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{path}: is no cell as this version of Engram saves it ({type(error).__name__}: {error}); delete it to run it again"
    )


@cache
def _fingerprint(path: str) -> str:
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        for block in _blocks(file):
            digest.update(block)
    return digest.hexdigest()[:16]


def _blocks(file: Any) -> Iterator[bytes]:
    while block := file.read(1 << 20):
        yield block
