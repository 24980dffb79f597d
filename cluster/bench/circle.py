"""The quickstart's RL steps, rollouts and learning at once (staleness 1) against taking turns (staleness 0).

Worker, learner and machine are real. The base model earns no reward, and a step without a reward costs the
learner nothing. So the reward here is a random number drawn from the episode's answers (``lottery``):
siblings differ, and the learner has a full step's work. ``--threads`` sets the threads of the worker, and
those of the learner.
"""

from __future__ import annotations

import asyncio
import random
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from actors.types import Outcome as EpisodeOutcome
from actors.types import Task
from cluster.bench.scripted import QUICKSTART
from cluster.bench.values import Case, Context, Outcome
from cluster.fleet.stream import Batch
from cluster.measure.report import Table
from cluster.runs.checkpoint import TrainState
from cluster.tracking.tracker import Tracker
from cluster.train.build import TrainingCluster, build_curriculum, build_fleet, build_stream, training_cluster
from cluster.train.loop import LoopParts, run_loop
from cluster.train.metrics import StepSummary
from cluster.train.prepare import RunFolder, RunSpec, Start, prepare_training
from configs.load import load_config
from configs.schema import RunConfig

STALENESS = (0, 1)
STEPS, QUICK_STEPS = 6, 2


class WaitingTimes(Tracker):
    """A tracker that keeps, for each step, the learner's waiting share and the staleness of its batch."""

    def __init__(self) -> None:
        self.waits: list[float] = []
        self.staleness: list[float] = []

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        if "timeline/learner_wait" in metrics:
            self.waits.append(metrics["timeline/learner_wait"])
            self.staleness.append(metrics["staleness/mean"])


def lottery(task: Task, outcome: EpisodeOutcome) -> float:
    """Return a reward in [0, 1) that depends on the task and the answers alone."""
    return random.Random(f"{task.id}/{[answer.prediction for answer in outcome.answers]}").random()


def run(context: Context) -> Outcome:
    seconds: dict[int, list[float]] = {staleness: [] for staleness in STALENESS}
    trackers: dict[int, WaitingTimes] = {}
    steps = QUICK_STEPS if context.quick else STEPS
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(context.repeats):
            for staleness in STALENESS:
                trackers[staleness] = WaitingTimes()
                config = _config(context, Path(folder), staleness, steps)
                wall_s = asyncio.run(_run_steps(*prepare_training(config), trackers[staleness]))
                seconds[staleness].append(wall_s / steps)
    case = Case(
        "a step, staleness 1",
        "staleness 0",
        "staleness 1",
        "s",
        tuple(seconds[0]),
        tuple(seconds[1]),
        "baseline/candidate",
        None,
        f"{steps} steps of {config.train.tasks_per_step} x {config.train.group_size} episodes, "
        "without the start; the first and last step cannot overlap",
    )
    return Outcome((case,), (_idle_table(trackers),))


def _config(context: Context, folder: Path, staleness: int, steps: int) -> RunConfig:
    settings = [
        f"model.name={context.model_path}",
        f"output_dir={folder}",
        f"train.steps={steps}",
        f"train.checkpoint_every={steps}",
        f"train.max_staleness={staleness}",
        f"rollout.threads={context.threads}",
        f"learner.threads={context.threads}",
        "environment.reward=cluster.bench.circle:lottery",
        "warm_start.steps=0",
        "evaluation.tasks=1",
        "tracking.enabled=false",
    ]
    if context.quick:
        settings += [
            "train.tasks_per_step=2",
            "train.group_size=2",
            "memory.max_extract_tokens=24",
            "learner.trainable_layers=1",
            "engine.kv_cache_gib=0.2",
            "ray.object_store_gib=0.5",
        ]
    return load_config(QUICKSTART, settings)


async def _run_steps(spec: RunSpec, folder: RunFolder, start: Start, tracker: WaitingTimes) -> float:
    """Run the RL steps on a cluster that is up; returns their wall seconds."""
    async with training_cluster(spec, folder, start) as cluster:
        began = time.perf_counter()
        await run_loop(_parts(spec, start, cluster, tracker), spec.config.train, start.state)
        return time.perf_counter() - began


def _parts(spec: RunSpec, start: Start, cluster: TrainingCluster, tracker: WaitingTimes) -> LoopParts:
    def on_step(summary: StepSummary, batch: Batch) -> None: ...

    async def on_checkpoint(state: TrainState) -> None: ...

    fleet = build_fleet(spec.config, cluster, lambda: spec.config.rollout.workers, lambda text: None)
    curriculum = build_curriculum(spec, start.state, say=lambda text: None)
    stream = build_stream(
        spec, cluster, start.state, fleet, curriculum.task_at, on_failures=lambda summary: None
    )
    return LoopParts(
        stream, cluster.learner, fleet, cluster.channel, tracker, curriculum, on_step, on_checkpoint
    )


def _idle_table(trackers: Mapping[int, WaitingTimes]) -> Table:
    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    rows = tuple(
        (str(staleness), f"{100 * mean(tracker.waits):.0f} %", f"{mean(tracker.staleness):.2f}")
        for staleness, tracker in trackers.items()
    )
    header = ("max_staleness", "learner waits", "mean staleness trained on")
    return Table("the learner's idle time (of the last repeat)", header, rows)
