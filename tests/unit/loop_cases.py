"""Scripted parts of the training loop without Ray, and their wiring."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any

from actors.engine.policy import EngineStats
from actors.types import PolicyVersion, Task, TrajectoryGroup
from actors.worker import WorkerReport
from cluster.fleet.broadcast import ObjectStoreWeights
from cluster.fleet.contract import FinishedGroup
from cluster.fleet.fleet import ElasticFleet, FleetPlan
from cluster.fleet.ledger import Ledger
from cluster.fleet.stream import Batch, GroupStream, StreamCalls, StreamPlan
from cluster.runs.checkpoint import TrainState
from cluster.tracking.tracker import NullTracker
from cluster.train.loop import LoopParts, delivery
from cluster.train.metrics import StepSummary
from configs.schema import TrainConfig
from learner.types import LearnerError, StepReport
from tests.unit.cluster_cases import finished_group, group, task_at


class Worker:
    """Finishes a group at once, under the version that it loaded last. A drain shuts its gate."""

    def __init__(self, name: str, version: PolicyVersion = 0) -> None:
        self.name, self.version = name, version
        self.positions: list[int] = []
        self.running = 0
        self.gate = asyncio.Event()
        self.gate.set()
        self.in_flight = False
        self.refused: Exception | None = None
        self.on_refresh: Callable[[PolicyVersion], None] = lambda version: None

    async def ready(self) -> None: ...

    def check(self) -> None:
        """Raise when it is dead."""

    async def group(self, position: int, task: Task) -> FinishedGroup:
        self.positions.append(position)
        await self.gate.wait()
        self.running += 1
        try:
            return finished_group(group(task, await self.play(position)))
        finally:
            self.running -= 1

    async def play(self, position: int) -> PolicyVersion:
        """The time that a group takes. Returns the version of its first token."""
        version = self.version
        await asyncio.sleep(0)
        return version

    async def drain(self) -> None:
        self.gate.clear()
        while self.running:
            await asyncio.sleep(0.001)

    async def refresh(self, weights: ObjectStoreWeights) -> WorkerReport:
        await asyncio.sleep(0)
        try:
            self.check()
            if self.refused is not None:
                raise self.refused
            assert self.in_flight or self.running == 0, "it was not drained"
            assert weights.version > self.version, "never back, and none twice"
            self.version = weights.version
        finally:
            self.gate.set()
        self.on_refresh(self.version)
        return await self.report()

    async def report(self) -> WorkerReport:
        """An engine that acts for 3 s of a version's 4."""
        seconds = {"act": 3.0 * self.version, "idle": 1.0 * self.version}
        stats = EngineStats(10, 5, 2, 2, 0, 0, 0.1, 1, 9, seconds)  # type: ignore[arg-type]
        return WorkerReport(self.name, self.version, len(self.positions), 0, 1, 0.1, 0.0, 0.2, stats)

    def kill(self) -> None: ...


class Trainer:
    """Counts versions as the learner does, and keeps what it was given."""

    def __init__(self, version: PolicyVersion = 0) -> None:
        self.version = version
        self.batches: list[list[str]] = []
        self.fail_at = -1

    def missing(self, groups: Sequence[TrajectoryGroup]) -> list[int]:
        return []

    def step(self, groups: Sequence[TrajectoryGroup]) -> StepReport:
        if self.version == self.fail_at:
            raise LearnerError("learner step: a rank's process died; resume from the last checkpoint")
        self.batches.append([group.task.id for group in groups])
        self.version += 1
        values: dict[str, Any] = {field.name: 0 for field in fields(StepReport)}
        return StepReport(**(values | {"version": self.version, "tokens": 100}))

    def weights_ref(self, trainable_only: bool) -> Any:
        return object()


class Channel:
    def publish(self, source: Trainer) -> ObjectStoreWeights:
        return ObjectStoreWeights(source.version, True, source.weights_ref(False))


class Recorder(NullTracker):
    """A tracker that keeps the figures it is given, by step."""

    def __init__(self) -> None:
        self.steps: dict[int, Mapping[str, float]] = {}

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self.steps[step] = {**self.steps.get(step, {}), **metrics}


def wire(
    workers: Sequence[Worker],
    fleet_plan: FleetPlan[Any],
    trainer: Trainer,
    tracker: Recorder,
    ledger: Ledger,
    plan: TrainConfig,
    state: TrainState,
    on_step: Callable[[StepSummary, Batch], None],
    on_checkpoint: Callable[[TrainState], Awaitable[None]],
) -> LoopParts:
    """Wire the loop as cluster/train/build.py does, with two groups in flight on a worker."""
    fleet = ElasticFleet(workers, fleet_plan, newest=None)
    calls = StreamCalls(task_at, delivery(trainer), on_group=fleet.state.progress, on_lost=fleet.lost)
    steps = plan.steps - state.step
    stream_plan = StreamPlan(steps, plan.tasks_per_step, plan.max_staleness, credits=2, stall_s=5.0)
    stream = GroupStream(stream_plan, workers, state.version, ledger, calls)
    return LoopParts(stream, trainer, fleet, Channel(), tracker, on_step, on_checkpoint)
