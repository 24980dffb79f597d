"""Small cells with made-up results, a comparison over them, and scripted workers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Container, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from functools import cache
from pathlib import Path
from typing import Any, cast

import pytest

from actors.peak_memory import PeakMemory
from actors.types import Answer, Task, TrajectoryGroup
from actors.worker import WorkerSpec
from cluster.common.errors import StartupError, WorkerLost
from cluster.evaluation import run as evaluation_run
from cluster.evaluation.plan import Plan, Request, plan_cells
from cluster.evaluation.prepare import Comparison
from cluster.evaluation.run import Hooks
from cluster.evaluation.store import CellResult, CellStore
from cluster.measure.rows import EpisodeScore, EvaluationRow, RowResult
from configs.models import ResolvedModel
from tests.unit.cluster_cases import group, task_at

MODEL = ResolvedModel(
    *("llama", 2, 64, 128, 2, 1, 32, 100, 512, True, False, False),
    name="tiny",
    path=Path("tiny"),
    stop_token_ids=(2,),
    fingerprint="0123456789abcdef",
)
PEAK = PeakMemory(100, 0, "")
PEAK_OF_A_START = 5000
Counts = dict[tuple[str, int], int]  # by the cell's key and the task's position


@cache
def plan(*rows: str, seeds: tuple[int, ...] = (0, 1), sweep: tuple[str, ...] = ()) -> Plan:
    config = Path("tests/quickstart.yaml")
    return plan_cells(Request(config, (), None, rows, ("recall",), seeds, "", sweep, ""))


def comparison(folder: Path, planned: Plan, tasks: int = 3) -> Comparison:
    """Without weights or a basis: scripted workers need neither."""
    store = CellStore(folder / "cells", {"policy": "the base model"})
    keys = [cell.key for cell in planned.cells]
    by_cell = dict.fromkeys(keys, tuple(task_at(position) for position in range(tasks)))
    return Comparison(planned, MODEL, None, folder, store, by_cell, dict.fromkeys(keys, folder / "basis"))


def scored(
    task: str,
    item: str,
    f1: float,
    category: str = "work",
    tokens: int = 100,
    context: int = 60,
    **parts: float,
) -> EpisodeScore:
    scores = {"f1": f1, "em": float(f1 == 1.0), "official_f1": f1 / 2}
    answer = Answer("Where?", ("here",), "here", category, scores)
    counts = {"accepted": 1, "empty": 0, "rolled_back": 0}
    return EpisodeScore(
        task, item, f1, {"f1": f1, **parts}, (answer,), counts, {"malformed": 1}, tokens, 20, context, 1.5
    )


def result(
    label: str,
    episodes: list[EpisodeScore],
    failed: tuple[str, ...] = (),
    resident: int | None = 512 * 2**20,
    problem: str = "",
) -> CellResult:
    return CellResult(RowResult(label, 0, tuple(episodes), failed), PeakMemory(resident, 0, problem))


def any_worker(worker: object) -> Any:
    return cast("Any", worker)


class Worker:
    """Plays every task. Dies at those of ``fatal`` and fails at those of ``failing`` while their count lasts.

    Its peak is high when it starts, and PEAK after each episode.
    """

    name = "worker-0"

    def __init__(self, fatal: Counts, failing: Counts, log: list[tuple[str, int]]) -> None:
        self._fatal, self._failing, self._log = fatal, failing, log
        self._peak = PeakMemory(PEAK_OF_A_START, 0, "")

    async def episode(self, position: int, task: Task, row: EvaluationRow) -> TrajectoryGroup:
        await asyncio.sleep(0)
        self._peak = max(self._peak, PEAK, key=lambda peak: peak.resident_bytes or 0)
        if self._fatal.get((row.label, position), 0) > 0:
            self._fatal[row.label, position] -= 1
            raise WorkerLost(f"worker-0 died during task {task.id}")
        self._log.append((row.label, position))
        if self._failing.get((row.label, position), 0) > 0:
            self._failing[row.label, position] -= 1
            return group(task, 0, finished=0, failed=1)
        return group(task, 0, rewards=[0.5])

    async def measure(self) -> PeakMemory:
        """The peak since the last call."""
        peak, self._peak = self._peak, PeakMemory(0, 0, "")
        return peak


class Stage:
    """Ray and workers during a test: notes what was started and played. ``broken_starts``: 1 is the first."""

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        fatal: Counts,
        broken_starts: Container[int] = (),
        failing: Counts | None = None,
    ) -> None:
        self.played: list[tuple[str, int]] = []
        self.starts = 0
        self.told: list[str] = []
        self._fatal, self._broken, self._failing = fatal, broken_starts, failing or {}
        monkeypatch.setattr(evaluation_run, "worker_set", self._workers)
        monkeypatch.setattr(evaluation_run, "ray_runtime", _no_ray)
        monkeypatch.setattr(evaluation_run, "cancel_on_sigterm", lambda: None)

    @asynccontextmanager
    async def _workers(self, specs: Sequence[WorkerSpec]) -> AsyncIterator[tuple[object, ...]]:
        self.starts += 1
        if self.starts in self._broken:
            raise StartupError("worker-0 did not start")
        yield (any_worker(Worker(self._fatal, self._failing, self.played)),)

    @property
    def hooks(self) -> Hooks:
        return Hooks(
            lambda cell, left: self.told.append(f"begins {cell.variant.label} {left}"),
            lambda: None,
            lambda cell: self.told.append(f"finished {cell.variant.label}"),
            lambda cell, why: self.told.append(f"retries {cell.variant.label}: {why}"),
            lambda cell, workers: workers,
        )


@contextmanager
def _no_ray(config: object, needed: object) -> Iterator[None]:
    yield
