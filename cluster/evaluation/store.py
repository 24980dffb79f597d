"""The folder of an evaluation: what a killed one leaves behind, and what a resumed one need not run again.

    cells/<key>.jsonl    a running cell: its settings, then a line for each task as it ends
    cells/<key>.json     a finished cell, written in one step; then the .jsonl goes

A last line that was cut off is dropped. Where episodes failed the .jsonl stays, and a resumed evaluation runs
these episodes again. Both files hold every setting that decides the figures; other settings are refused.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TypeVar

from actors.peak_memory import PeakMemory
from cluster.common.errors import CheckpointError, SaveError
from cluster.evaluation.plan import Cell
from cluster.measure.rows import RowResult, TaskResult
from configs.files import FileError, dump_json, parse_json, write_text
from configs.load import flatten

_DECIDING = (
    *("seed", "model.", "environment.", "memory.", "fast_weights.", "write."),
    *("embedder.", "sampling.", "engine.", "rollout.", "evaluation.tasks", "evaluation.temperature"),
)
_RESOURCES = (  # may differ between a killed evaluation and the resumed one
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
class CellResult:
    """A finished cell. ``peak``: the worst of its workers, over all runs of the cell."""

    result: RowResult
    peak: PeakMemory


@dataclass(frozen=True, slots=True)
class _Header:
    """The first line of a running cell."""

    settings: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class _CellFile:
    settings: Mapping[str, str]
    result: RowResult
    peak: PeakMemory


T = TypeVar("T")
_log = logging.getLogger(__name__)


class CellStore:
    """The cells of one evaluation. ``identity``: what decides the figures beside the settings, by name."""

    def __init__(self, folder: Path, identity: Mapping[str, str]) -> None:
        self._folder = folder
        self._identity = dict(identity)

    def finished(self, cell: Cell) -> CellResult | None:
        """The cell's result, None where it is still to be run.

        Raises CheckpointError for a cell of other settings, or a file that this version did not write.
        """
        path = self._final(cell)
        if not path.exists():
            return None
        saved = _parsed(path, path.read_text(encoding="utf-8"), _CellFile)
        self._check_same(path, cell, saved.settings)
        return CellResult(saved.result, saved.peak)

    def begun(self, cell: Cell) -> list[TaskResult]:
        """The finished tasks of a cell that was interrupted, or has failed episodes: those run again.

        Raises as ``finished`` does.
        """
        path = self._running(cell)
        if not path.exists():
            return []
        header, *lines = path.read_text(encoding="utf-8").split("\n")
        if not lines:  # killed while the settings were written
            return []
        self._check_same(path, cell, _parsed(path, header, _Header).settings)
        # Behind the last line break: nothing, or a line that was cut off.
        return [task for line in lines[:-1] if (task := _whole(path, line)) is not None and not task.failed]

    def journal(self, cell: Cell, begun: Sequence[TaskResult]) -> Journal:
        """Continue a cell: its journal is written anew, with the tasks of ``begun``. Raises SaveError."""
        path = self._running(cell)
        lines = [dump_json(line, indent=None) for line in (_Header(self.settings(cell)), *begun)]
        _write(path, "".join(f"{line}\n" for line in lines))
        return Journal(path, begun)

    def finish(self, cell: Cell, tasks: Sequence[TaskResult], peak: PeakMemory) -> None:
        """Raises SaveError."""
        result = RowResult.of(cell.variant.label, tasks)
        _write(self._final(cell), dump_json(_CellFile(self.settings(cell), result, peak)))
        if not result.failed:  # else it says which episodes need not be run again
            self._running(cell).unlink(missing_ok=True)

    def settings(self, cell: Cell) -> dict[str, str]:
        """Everything that decides the cell's figures, with a fingerprint of each data file."""
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
                cure = "use that value, or evaluate into a new folder"
                raise CheckpointError(f"{path}: was measured with {key}={before}, not {now}: {cure}")

    def _running(self, cell: Cell) -> Path:
        return self._folder / f"{cell.key}.jsonl"

    def _final(self, cell: Cell) -> Path:
        return self._folder / f"{cell.key}.json"


def worst(peaks: Sequence[PeakMemory]) -> PeakMemory:
    """The largest of each figure; unknown when one of them is unknown, or there is none."""
    problem = next((peak.problem for peak in peaks if peak.problem), "")
    residents = [peak.resident_bytes for peak in peaks]
    measured = [resident for resident in residents if resident is not None]
    resident = max(measured) if measured and len(measured) == len(residents) else None
    return PeakMemory(resident, max((peak.device_bytes for peak in peaks), default=0), problem)


class Journal:
    """A running cell on disk: a line for each task, out of the process before the next one begins."""

    def __init__(self, path: Path, begun: Sequence[TaskResult]) -> None:
        self.tasks = list(begun)
        self._path = path
        with saving(path):
            self._file = path.open("a", encoding="utf-8")

    def add(self, task: TaskResult) -> None:
        """Raises SaveError."""
        with saving(self._path):
            self._file.write(f"{dump_json(task, indent=None)}\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        self.tasks.append(task)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):  # ``add`` has reported the line that could not be written
            self._file.close()


@contextmanager
def saving(path: Path) -> Iterator[None]:
    """Raise SaveError where the block cannot write ``path`` (a full disk)."""
    try:
        yield
    except OSError as error:
        cure = "what was saved before is whole: make room there and go on with --resume"
        raise SaveError(f"{path}: cannot be written ({error.strerror or error}); {cure}") from error


def _write(path: Path, text: str) -> None:
    with saving(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)


def _whole(path: Path, line: str) -> TaskResult | None:
    """A task's line; None, with a warning, for one that a disk or a crash has spoiled: it runs again."""
    try:
        return parse_json(line, TaskResult)
    except FileError as error:
        _log.warning("warning: %s: a damaged line is left out, its task runs again (%s)", path, error)
        return None


def _parsed(path: Path, text: str, kind: type[T]) -> T:
    try:
        return parse_json(text, kind)
    except FileError as error:
        cure = "delete it to run the cell again"
        raise CheckpointError(f"{path}: is no cell of this version of Engram ({error}); {cure}") from error


@cache
def _fingerprint(path: str) -> str:
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]
