"""Scripted parts of the training loop without Ray, and their wiring."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any

from actors.engine.policy import EngineStats
from actors.types import PolicyVersion, Task, TrajectoryGroup
from actors.worker import WorkerReport
from cluster.common.errors import WorkerLost
from cluster.fleet.broadcast import ObjectStoreWeights
from cluster.fleet.contract import FinishedGroup
from cluster.fleet.fleet import ElasticFleet, FleetPlan
from cluster.fleet.ledger import Ledger, LedgerSnapshot
from cluster.fleet.stream import Batch, GroupStream, StreamCalls, StreamPlan
from cluster.runs.checkpoint import START, TrainState
from cluster.tracking.tracker import Tracker
from cluster.train.curriculum import Curriculum
from cluster.train.loop import LoopParts, delivery, run_loop
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
        self.loads_again = False  # an evaluated step may bring the same weights
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
            assert weights.version >= self.version + (not self.loads_again), "never back, and none twice"
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
        self.idle: set[int] = set()  # steps without signal

    def missing(self, groups: Sequence[TrajectoryGroup]) -> list[int]:
        return []

    def step(self, groups: Sequence[TrajectoryGroup]) -> StepReport:
        if self.version == self.fail_at:
            raise LearnerError("learner step: a rank's process died; resume from the last checkpoint")
        self.batches.append([group.task.id for group in groups])
        moved = len(self.batches) not in self.idle
        self.version += moved
        values: dict[str, Any] = {field.name: 0 for field in fields(StepReport)}
        steps = {"version": self.version, "optimizer_steps": int(moved)}
        return StepReport(**(values | steps | {"tokens": 100}))

    def weights_ref(self, trainable_only: bool) -> Any:
        return object()


class Channel:
    def publish(self, source: Trainer) -> ObjectStoreWeights:
        return ObjectStoreWeights(source.version, True, source.weights_ref(False))

    def metrics(self) -> dict[str, float]:
        return {}


class Recorder(Tracker):
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
    curriculum: Curriculum | None = None,
) -> LoopParts:
    """Wire the loop as cluster/train/build.py does, with two groups in flight on a worker."""
    fleet = ElasticFleet(workers, fleet_plan, newest=None)
    curriculum = curriculum or Curriculum(task_at)
    calls = StreamCalls(
        curriculum.task_at, delivery(trainer), on_group=fleet.state.progress, on_lost=fleet.lost
    )
    steps = plan.steps - state.step
    stream_plan = StreamPlan(steps, plan.tasks_per_step, plan.max_staleness, credits=2, stall_s=5.0)
    stream = GroupStream(stream_plan, workers, state.version, ledger, calls)
    return LoopParts(stream, trainer, fleet, Channel(), tracker, curriculum, on_step, on_checkpoint)


class Mortal(Worker):
    """Dies when ``dies`` says so of a task's position; then every call fails."""

    def __init__(self, name: str, version: PolicyVersion, dies: Callable[[str, int], bool]) -> None:
        super().__init__(name, version)
        self.dead = self.killed = self.hung = False
        self.gone = asyncio.Event()
        self.start_fails = self.asked = False
        self.served: list[tuple[PolicyVersion, int]] = []
        self._dies = dies

    async def ready(self) -> None:
        await asyncio.sleep(0.01)
        if self.start_fails:
            raise WorkerLost(f"{self.name} died during starting: out of memory")

    async def play(self, position: int) -> PolicyVersion:
        version = self.version
        self.served.append((version, position))
        await (self.gone.wait() if self.hung else asyncio.sleep(0.001))
        self.dead = self.dead or self._dies(self.name, position)
        self.check()
        return version

    async def report(self) -> WorkerReport:
        if self.hung and self.asked:
            await self.gone.wait()
        self.asked = True  # the first call is the fleet's own, before the loop begins
        self.check()
        return await super().report()

    def kill(self) -> None:
        self.dead = self.killed = True
        self.gone.set()
        self.gate.set()

    def check(self) -> None:
        if self.dead:
            raise WorkerLost(f"{self.name} died during a task: SIGKILL")


class Lab:
    """A run of the loop whose fleet can launch."""

    def __init__(
        self,
        workers: int,
        steps: int = 6,
        staleness: int = 1,
        dies: Callable[[str, int], bool] = lambda name, position: False,
    ) -> None:
        self.dies, self.wanted, self.said = dies, workers, list[str]()
        self.all: dict[str, Mortal] = {}
        self.plan = TrainConfig(
            steps=steps, tasks_per_step=2, group_size=2, max_staleness=staleness, checkpoint_every=100
        )
        self.trainer, self.tracker, self.ledger = Trainer(), Recorder(), Ledger(LedgerSnapshot())
        self.saved: list[TrainState] = []
        self.settled: set[str] = set()
        self.health_s = 60.0
        self.prepare: Callable[[Mortal], None] = lambda worker: None
        self.in_flight = False
        self.on_step: Callable[[int], None] = lambda step: None
        step = self.trainer.step

        def unhurried(groups: Sequence[TrajectoryGroup]) -> StepReport:
            time.sleep(0.01)  # so that a worker is not always between two versions
            return step(groups)

        self.trainer.step = unhurried  # type: ignore[method-assign]
        for number in range(workers):
            self.launch(f"worker-{number}")

    def launch(self, name: str) -> Mortal:
        worker = self.all[name] = Mortal(name, 0, self.dies)
        self.prepare(worker)
        return worker

    async def run(self) -> TrainState:
        async def save(state: TrainState) -> None:
            self.saved.append(state)

        parts = wire(
            list(self.all.values()),
            FleetPlan(
                self.launch, lambda: self.wanted, 0, 2, self.health_s, self.said.append, self.in_flight
            ),
            self.trainer,
            self.tracker,
            self.ledger,
            self.plan,
            START,
            lambda summary, batch: self.on_step(summary.step),
            save,
        )
        self.fleet, self.stream = parts.fleet, parts.stream
        return await asyncio.wait_for(run_loop(parts, self.plan, START), 20)

    def serving(self) -> set[str]:
        """Those that serve, or are taking newer weights."""
        return {
            name
            for name, member in self.fleet.state.members.items()
            if member.state in ("healthy", "suspect", "refreshing")
        }
