"""One controller over 1 to 1,000 virtual rollout workers: its share of their ideal throughput, and its CPU.

    VirtualWorkers --groups--> RemoteWorker, GroupStream, run_loop, LearnerGroup --batches--> VirtualRank
    (a few actors)             all real

A virtual worker takes GROUP_S for a group and has one group in flight, so the ideal is workers / GROUP_S
groups a second. Why one: an episode lives on one version, so with more in flight the drain before each
refresh leaves slots idle by design. The benchmark would measure that instead of the controller.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from actors.environments.build import build_environment
from actors.episodes.group_summary import GroupSummary
from actors.fast_weights.basis import compute_basis_from_checkpoint
from actors.fast_weights.delta import Basis
from actors.types import PolicyVersion, TrajectoryGroup
from actors.worker import WorkerSpec
from cluster.bench.controller_actors import VirtualRank, VirtualWorkers, group_of, virtual_handle
from cluster.bench.scripted import QUICKSTART, recall_groups
from cluster.bench.values import Case, Context, Goal, Outcome, RatioOf, Spread
from cluster.common.tasks import TaskSource
from cluster.fleet.broadcast import ObjectStoreChannel
from cluster.fleet.fleet import ElasticFleet, FleetPlan
from cluster.fleet.ledger import Ledger, LedgerSnapshot
from cluster.fleet.ray_runtime import Demand, all_ready, ray_runtime
from cluster.fleet.remote_worker import RemoteWorker
from cluster.fleet.stream import Batch, GroupStream, StreamCalls, StreamPlan
from cluster.measure.report import Curve, Panel, Table, save_plot
from cluster.runs.checkpoint import START, TrainState
from cluster.tracking.tracker import Tracker
from cluster.train.curriculum import Curriculum
from cluster.train.loop import LoopParts, delivery, run_loop
from cluster.train.metrics import StepSummary
from configs.load import load_config
from configs.schema import RayConfig, RunConfig, TrainConfig
from learner.types import StepReport
from learner.worker import LearnerGroup, LearnerSpec

if TYPE_CHECKING:
    from ray import ObjectRef

WORKERS, QUICK_WORKERS = (1, 10, 100, 300, 1000), (1, 12)
GROUP_S, QUICK_GROUP_S = 20.0, 0.5  # a real group on a GPU takes 30 to 120 s: this is harder to keep up with
SIBLINGS = 4
PROCESSES = 4  # shared by the virtual workers
STALENESS = 16  # wide: the controller's pace is measured, not the gate's
START_S = 120.0
TIGHT_GOAL, CPU_GOAL = Goal("at least", 0.95), Goal("at most", 0.25)


@dataclass(frozen=True, slots=True)
class Mark:
    """The moment when the learner gets a batch, with the CPU seconds so far.

    ``controller``: of this process. ``ray``: of Ray's own. ``actors``: of the virtual workers and the
    learner.
    """

    wall: float
    controller: float
    ray: float
    actors: float


@dataclass(frozen=True, slots=True)
class Point:
    """The figures of one fleet size.

    ``throughput`` (groups/s) and ``controller`` (cores) have a value for each window of GROUP_S. ``ray`` and
    ``actors`` are cores over all windows. ``staleness`` is the mean of the learner's batches, in versions.
    """

    workers: int
    ideal: float
    throughput: tuple[float, ...]
    controller: tuple[float, ...]
    ray: float
    actors: float
    staleness: float

    @property
    def share(self) -> Spread:
        return Spread.of(tuple(value / self.ideal for value in self.throughput))


class MarkedLearner:
    """A LearnerGroup that marks the beginning of each step."""

    def __init__(self, inner: LearnerGroup) -> None:
        self._inner = inner
        self.marks: list[Mark] = []

    @property
    def version(self) -> PolicyVersion:
        return self._inner.version

    def missing(self, groups: Sequence[ObjectRef[TrajectoryGroup]]) -> list[int]:
        return self._inner.missing(groups)

    def step(self, groups: Sequence[ObjectRef[TrajectoryGroup]]) -> StepReport:
        self.marks.append(_mark())
        return self._inner.step(groups)

    def weights_ref(self, trainable_only: bool) -> Any:
        return self._inner.weights_ref(trainable_only)


def run(context: Context) -> Outcome:
    sizes, group_s = (QUICK_WORKERS, QUICK_GROUP_S) if context.quick else (WORKERS, GROUP_S)
    quickstart = load_config(QUICKSTART, [])
    shape = replace(quickstart.fast_weights, basis="random")  # only its sizes make a difference here
    basis = compute_basis_from_checkpoint(context.model_path, shape, seed=0)
    (template,) = recall_groups(context.model_path, quickstart, basis, 1, SIBLINGS)
    config = RunConfig()
    task = TaskSource(build_environment(config.environment, config.embedder), "train", config.seed).at(0)
    group = group_of(template, task, 0, "worker-0")
    content, summary = _bytes(group), _bytes(GroupSummary.of(group))
    # Room for three batches: one that is learned, one that is collected, and one to spare.
    store = 0.2 + 3 * max(sizes) / 2 * content / 2**30
    config = replace(config, ray=RayConfig(object_store_gib=store))
    with ray_runtime(config, Demand(cpus=1, gpus=0)):
        fleets = [_Fleet(config, template, workers, group_s) for workers in sizes]
        points = [asyncio.run(fleet.measure(context.repeats)) for fleet in fleets]
    largest = points[-1]
    note = (
        f"{largest.workers} workers, {group_s:g} s a group (on a GPU a real group takes 30 to 120 s), "
        f"{largest.ideal:g} groups/s of {content / 2**20:.2f} MiB ({SIBLINGS} episodes), "
        f"of which the controller sees {summary / 2**10:.1f} KiB; "
        f"every {group_s / 2:g} s a step and a refresh of the workers. "
        f"Of the machine's {os.cpu_count()} cores Ray's own processes took {largest.ray:.2f}, "
        f"the virtual workers and the learner's rank {largest.actors:.2f}. "
        "The tracker is off (1 ms a step with MLflow)"
    )
    ideal, one_core = (largest.ideal,) * context.repeats, (1.0,) * context.repeats
    name = f"{largest.workers} workers"
    ratio: RatioOf = "candidate/baseline"
    throughput, cores = largest.throughput, largest.controller
    cases = (
        Case(
            f"throughput, {name}",
            "ideal",
            "controller",
            "groups/s",
            ideal,
            throughput,
            ratio,
            TIGHT_GOAL,
            note,
        ),
        Case(f"controller CPU, {name}", "one core", "controller", "cores", one_core, cores, ratio, CPU_GOAL),
    )
    figures = {f"throughput_share_{point.workers}": point.share.median for point in points}
    figures |= {f"controller_cores_{point.workers}": Spread.of(point.controller).median for point in points}
    return Outcome(cases, (_table(points),), (_plot(points, context.folder),), figures)


class _Fleet:
    """The real controller over ``workers`` virtual workers."""

    def __init__(self, config: RunConfig, template: TrajectoryGroup, workers: int, group_s: float) -> None:
        self._template, self._workers, self._group_s = template, workers, group_s
        self._per_step = max(1, workers // 2)  # a step every half group time, where there are workers enough
        self._steps_per_window = workers // self._per_step
        train = TrainConfig(tasks_per_step=self._per_step, group_size=SIBLINGS, max_staleness=STALENESS)
        self._config = replace(config, train=train)

    async def measure(self, windows: int) -> Point:
        """Run a ramp of one group time, then measure ``windows`` of them.

        Raises ClusterError, LearnerError.
        """
        import ray

        every = self._steps_per_window
        wanted = every * (1 + windows) + 1
        # The stream issues nothing beyond the last step: keep that end out of the windows.
        steps = wanted + 4 * every
        plan = replace(self._config.train, steps=steps, checkpoint_every=steps + 1)
        stored = ray.put(self._template)
        actor: Any = VirtualWorkers
        actors = [
            actor.options(max_concurrency=2 * self._workers + 8).remote(stored, self._group_s)
            for _ in range(min(PROCESSES, self._workers))
        ]
        learner: LearnerGroup | None = None
        try:
            workers = [self._worker(number, actors[number % len(actors)]) for number in range(self._workers)]
            await all_ready({worker.name: worker.started for worker in workers}, START_S, Demand(0, 0))
            learner = LearnerGroup(self._learner_spec(), START_S, VirtualRank)
            trainer = MarkedLearner(learner)
            staleness = await self._loop(plan, workers, trainer, wanted)
        finally:
            if learner is not None:
                learner.close()
            for virtual in actors:
                ray.kill(virtual)
        return self._point(trainer.marks[every::every][: windows + 1], staleness[every:])

    async def _loop(
        self, plan: TrainConfig, workers: list[RemoteWorker], trainer: MarkedLearner, wanted: int
    ) -> list[float]:
        """Run the loop until ``wanted`` steps are done; returns the staleness of each."""
        tasks = TaskSource(
            build_environment(self._config.environment, self._config.embedder), "train", self._config.seed
        )
        curriculum = Curriculum(tasks.at)
        stream_plan = StreamPlan(
            plan.steps, self._per_step, STALENESS, credits=1, stall_s=START_S + 2 * self._group_s
        )
        stream = GroupStream(
            stream_plan,
            workers,
            0,
            Ledger(LedgerSnapshot()),
            StreamCalls(curriculum.task_at, missing=delivery(trainer)),
        )
        staleness: list[float] = []
        enough = asyncio.Event()

        def on_step(summary: StepSummary, _: Batch) -> None:
            staleness.append(summary.staleness)
            if len(staleness) == wanted:
                enough.set()

        async def on_checkpoint(state: TrainState) -> None:
            """The loop saves none before its last step, which is never reached."""

        fleet_plan: FleetPlan[RemoteWorker] = FleetPlan(
            None,
            lambda: len(workers),
            version=0,
            at_once=max(1, len(workers) // 2),
            health_s=START_S,
            say=lambda text: None,
            in_flight=False,
        )
        fleet = ElasticFleet(workers, fleet_plan, newest=None)
        parts = LoopParts(
            stream,
            trainer,
            fleet,
            ObjectStoreChannel(trainable_only=False),
            Tracker(),
            curriculum,
            on_step,
            on_checkpoint,
        )
        looping = asyncio.create_task(run_loop(parts, plan, START))
        waiting = asyncio.create_task(enough.wait())
        await asyncio.wait([looping, waiting], return_when=asyncio.FIRST_COMPLETED)
        if looping.done():
            waiting.cancel()
            await looping  # raises what ended it
        looping.cancel()
        await asyncio.wait([looping])
        return staleness

    def _worker(self, number: int, actor: Any) -> RemoteWorker:
        """A virtual worker. First groups end evenly spread over a group time, as after a long run."""
        first_s = self._group_s * (number + 1) / self._workers
        return RemoteWorker(
            WorkerSpec(f"worker-{number}", self._config, "", "", 0),
            virtual_handle(actor, number, first_s),
            journal=None,
        )

    def _learner_spec(self) -> LearnerSpec:
        config = replace(self._config.learner, workers=1, cpus_per_worker=0, gpus_per_worker=0)
        return LearnerSpec(
            config, self._config.objective, "", Basis("virtual", "random", 1, {}, {}, train_a=False), 0, 1.0
        )

    def _point(self, marks: list[Mark], staleness: list[float]) -> Point:
        groups = self._per_step * self._steps_per_window
        windows = list(pairwise(marks))
        wall = marks[-1].wall - marks[0].wall
        return Point(
            workers=self._workers,
            ideal=self._workers / self._group_s,
            throughput=tuple(groups / (end.wall - begin.wall) for begin, end in windows),
            controller=tuple(
                (end.controller - begin.controller) / (end.wall - begin.wall) for begin, end in windows
            ),
            ray=(marks[-1].ray - marks[0].ray) / wall,
            actors=(marks[-1].actors - marks[0].actors) / wall,
            staleness=sum(staleness) / len(staleness),
        )


def _table(points: Sequence[Point]) -> Table:
    throughput = ("workers", "ideal groups/s", "throughput / ideal [quartiles]")
    cores = ("controller, cores", "Ray's own, cores", "virtual workers, cores")
    rows = tuple(
        (
            str(point.workers),
            f"{point.ideal:g}",
            f"{point.share.median:.3f} [{point.share.low:.3f}, {point.share.high:.3f}]",
            f"{Spread.of(point.controller).median:.3f}",
            f"{point.ray:.3f}",
            f"{point.actors:.3f}",
            f"{point.staleness:.1f}",
        )
        for point in points
    )
    header = (*throughput, *cores, "staleness")
    return Table("Throughput and CPU against the number of workers", header, rows)


def _plot(points: Sequence[Point], folder: Path) -> Path:
    """Draw the throughput and the CPU against the number of workers, each with its goal."""
    workers = [point.workers for point in points]
    throughput = [point.share.median for point in points]
    cores = [Spread.of(point.controller).median for point in points]
    upper = (Curve(workers, throughput, 0, "controller", "dots"), _goal(TIGHT_GOAL, workers))
    lower = (
        Curve(workers, cores, 0, "controller", "dots"),
        Curve(workers, [point.ray for point in points], 1, "Ray's own processes", "dots"),
        _goal(CPU_GOAL, workers),
    )
    panels = [
        Panel("rollout workers", "throughput / ideal", upper, y_range=(0.0, 1.05), log_x=True),
        Panel("rollout workers", "CPU, cores", lower, y_range=(0.0, None), log_x=True),
    ]
    return save_plot(panels, folder / "controller.png")


def _goal(goal: Goal, workers: Sequence[int]) -> Curve:
    return Curve(workers, [goal.value] * len(workers), 2, f"goal: {goal.sense} {goal.value:g}", "dashed")


def _bytes(value: object) -> int:
    """The pickled size, as the value travels."""
    from ray import cloudpickle

    return len(cloudpickle.dumps(value))


def _mark() -> Mark:
    """The CPU seconds of every process below this one count as Ray's or the actors', by its name."""
    seconds = {True: 0.0, False: 0.0}
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            seconds[process.name().startswith("ray::")] += times.user + times.system
    return Mark(time.monotonic(), time.process_time(), ray=seconds[False], actors=seconds[True])
