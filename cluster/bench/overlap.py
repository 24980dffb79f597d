"""What asynchrony is worth: the real loop, stream and fleet over workers and a learner that only take their time, as if each had a device of its own.

Strictly on-policy (max_staleness 0) rollouts and learning take turns, so a step takes the sum of both; with staleness 1 or more they overlap, and it
takes the longer of the two. The devices are simulated here; circle.py does the same with the real parts on this machine.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, cast

from actors.engine.policy import EngineStats
from actors.episodes.group_summary import EpisodeSummary, GroupSummary
from actors.episodes.recovery import Recovered
from actors.types import Outcome as EpisodeOutcome
from actors.types import PolicyVersion, Task, Timings
from actors.worker import WorkerReport
from cluster.bench.values import Case, Context, Goal, Outcome
from cluster.fleet.broadcast import ObjectStoreWeights, WeightSource
from cluster.fleet.contract import FinishedGroup
from cluster.fleet.fleet import ElasticFleet, FleetPlan
from cluster.fleet.ledger import Ledger, LedgerSnapshot
from cluster.fleet.stream import Batch, GroupStream, StreamCalls, StreamPlan
from cluster.measure.report import Table
from cluster.runs.checkpoint import START, TrainState
from cluster.tracking.tracker import RunStatus
from cluster.train.loop import LoopParts, run_loop
from cluster.train.metrics import StepSummary
from configs.schema import TrainConfig
from learner.types import StepReport

WORKERS, PER_STEP = 4, 8
STALENESS = (0, 1, 2)
GAIN = 1.7  # of 2: one step of each kind, refreshes and the run's first and last step do not overlap


@dataclass(frozen=True, slots=True)
class Pace:
    """Seconds of one group on a worker, of a learner step, and of loading weights; ``steps`` of a run."""

    group_s: float
    learn_s: float
    load_s: float
    steps: int


class TimedWorker:
    """Plays two groups at a time, each in ``group_s``; refreshes in ``load_s``."""

    def __init__(self, name: str, pace: Pace) -> None:
        self.name = name
        self._pace = pace
        self._version: PolicyVersion = 0
        self._places = asyncio.Semaphore(2)

    async def ready(self) -> None: ...

    def kill(self) -> None: ...

    async def group(self, position: int, task: Task) -> FinishedGroup:
        async with self._places:
            version = self._version
            await asyncio.sleep(self._pace.group_s)
        episodes = tuple(_episode(f"{task.id}.{number}", float(number)) for number in range(2))
        return FinishedGroup(
            GroupSummary(task.id, version, episodes, (), self.name, Recovered(0, 0)), cast("Any", None)
        )

    async def drain(self) -> None:
        """Wait until both places are free."""
        for _ in range(2):
            await self._places.acquire()
        for _ in range(2):
            self._places.release()

    async def refresh(self, weights: ObjectStoreWeights) -> WorkerReport:
        await asyncio.sleep(self._pace.load_s)
        self._version = weights.version
        return await self.report()

    async def report(self) -> WorkerReport:
        counts: dict[str, Any] = {field.name: 0 for field in fields(EngineStats)}
        return WorkerReport(
            self.name,
            self._version,
            0,
            0,
            0,
            0.0,
            0.0,
            self._pace.load_s,
            EngineStats(**(counts | {"seconds": {"idle": 1.0}})),
        )


class TimedLearner:
    """Takes ``learn_s`` for a step."""

    def __init__(self, pace: Pace) -> None:
        self.version: PolicyVersion = 0
        self._pace = pace

    def missing(self, groups: Sequence[Any]) -> list[int]:
        return []

    def step(self, groups: Sequence[Any]) -> StepReport:
        time.sleep(self._pace.learn_s)
        self.version += 1
        values: dict[str, Any] = {field.name: 0 for field in fields(StepReport)}
        return StepReport(**(values | {"version": self.version}))

    def weights_ref(self, trainable_only: bool) -> Any:
        return None

    def publish(self, source: WeightSource) -> ObjectStoreWeights:
        return ObjectStoreWeights(source.version, True, cast("Any", None))


class WaitingTimes:
    """A tracker that keeps how the learner's time went."""

    run_id = location = ""

    def __init__(self) -> None:
        self.waits: list[float] = []
        self.staleness: list[float] = []

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        if "timeline/learner_wait" in metrics:
            self.waits.append(metrics["timeline/learner_wait"])
            self.staleness.append(metrics["staleness/mean"])

    def artifact(self, path: Path) -> None: ...

    def dataset(self, values: Mapping[str, str]) -> None: ...

    def model(self, values: Mapping[str, str]) -> None: ...

    def finish(self, status: RunStatus) -> None: ...


def run(context: Context) -> Outcome:
    pace = (
        Pace(0.05, 0.05, 0.01, 4) if context.quick else Pace(0.5, 0.5, 0.05, 20)
    )  # eight groups on four workers of two places: one group's time
    seconds: dict[int, list[float]] = {staleness: [] for staleness in STALENESS}
    trackers: dict[int, WaitingTimes] = {}
    for _ in range(context.repeats):
        for staleness in STALENESS:
            trackers[staleness] = WaitingTimes()
            seconds[staleness].append(asyncio.run(_run(pace, staleness, trackers[staleness])) / pace.steps)
    cases = tuple(
        Case(
            f"a step, staleness {staleness}",
            "staleness 0",
            f"staleness {staleness}",
            "s",
            tuple(seconds[0]),
            tuple(seconds[staleness]),
            "baseline/candidate",
            Goal("at least", GAIN),
            f"a group and a learner step take {pace.group_s:g} s each, a refresh {pace.load_s:g} s: 2 would be ideal",
        )
        for staleness in STALENESS[1:]
    )
    return Outcome(cases, (idle_table(trackers),))


async def _run(pace: Pace, staleness: int, tracker: WaitingTimes) -> float:
    """Seconds of a whole run."""
    workers = [TimedWorker(f"worker-{number}", pace) for number in range(WORKERS)]
    plan = TrainConfig(
        steps=pace.steps,
        tasks_per_step=PER_STEP,
        group_size=2,
        max_staleness=staleness,
        checkpoint_every=pace.steps,
    )
    stream_plan = StreamPlan(pace.steps, PER_STEP, staleness, credits=2, stall_s=60.0)
    stream = GroupStream(
        stream_plan,
        workers,
        0,
        Ledger(LedgerSnapshot()),
        StreamCalls(lambda position: Task(f"t{position}", "none", {}, position)),
    )
    at_once = WORKERS if staleness == 0 else WORKERS // 2
    fleet = ElasticFleet(
        workers,
        FleetPlan(None, lambda: WORKERS, 0, at_once, 60.0, lambda text: None, in_flight=False),
        newest=None,
    )
    learner = TimedLearner(pace)

    def on_step(summary: StepSummary, batch: Batch) -> None: ...

    async def on_checkpoint(state: TrainState) -> None: ...

    began = time.perf_counter()
    await run_loop(LoopParts(stream, learner, fleet, learner, tracker, on_step, on_checkpoint), plan, START)
    return time.perf_counter() - began


def _episode(name: str, reward: float) -> EpisodeSummary:
    times = Timings(**{field.name: 1.0 for field in fields(Timings)})
    return EpisodeSummary(name, EpisodeOutcome(reward, {}, ()), (), "done", times, 1, 1, 1)


def idle_table(trackers: Mapping[int, WaitingTimes]) -> Table:
    """By staleness bound."""
    rows = tuple(
        (
            str(staleness),
            f"{100 * sum(one.waits) / len(one.waits):.0f} %",
            f"{sum(one.staleness) / len(one.staleness):.2f}",
        )
        for staleness, one in trackers.items()
    )
    return Table(
        "the learner's idle time (of the last repeat)",
        ("max_staleness", "learner waits", "mean staleness trained on"),
        rows,
    )
