"""The quickstart's RL steps with rollouts and learning at once (staleness 1) against taking turns (staleness 0), on the real parts and this machine.

The base model earns no reward, and a step without one teaches nothing and costs the learner nothing. So the reward here is drawn by lot from what an
episode answered (``lottery``): siblings differ, and the learner has a full step's work. ``--threads`` are those of the worker, and of the learner.
"""

from __future__ import annotations

import asyncio
import random
import tempfile
import time
from pathlib import Path

import configs
from actors.types import Outcome as EpisodeOutcome
from actors.types import Task
from cluster.bench.overlap import WaitingTimes, idle_table
from cluster.bench.values import Case, Context, Outcome
from cluster.fleet.stream import Batch
from cluster.runs.checkpoint import TrainState
from cluster.train.build import TrainingCluster, build_fleet, build_stream, training_cluster
from cluster.train.loop import LoopParts, run_loop
from cluster.train.metrics import StepSummary
from cluster.train.prepare import RunFolder, RunSpec, Start, prepare_training
from configs.load import load_config
from configs.schema import RunConfig

STALENESS = (0, 1)
STEPS, QUICK_STEPS = 6, 2


def lottery(task: Task, outcome: EpisodeOutcome) -> float:
    """A reward in [0, 1) that depends on the task and the answers only."""
    return random.Random(f"{task.id}/{[answer.prediction for answer in outcome.answers]}").random()


def run(context: Context) -> Outcome:
    seconds: dict[int, list[float]] = {staleness: [] for staleness in STALENESS}
    waits: dict[int, WaitingTimes] = {}
    steps = QUICK_STEPS if context.quick else STEPS
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(context.repeats):
            for staleness in STALENESS:
                waits[staleness] = WaitingTimes()
                config = _config(context, Path(folder), staleness, steps)
                spent = asyncio.run(_steps(*prepare_training(config), waits[staleness]))
                seconds[staleness].append(spent / steps)
    case = Case(
        "a step, staleness 1",
        "staleness 0",
        "staleness 1",
        "s",
        tuple(seconds[0]),
        tuple(seconds[1]),
        "baseline/candidate",
        None,
        f"{steps} steps of {config.train.tasks_per_step} x {config.train.group_size} episodes without the start; the first and last cannot overlap",
    )
    return Outcome((case,), (idle_table(waits),))


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
    small = [
        "train.tasks_per_step=2",
        "train.group_size=2",
        "memory.max_extract_tokens=24",
        "learner.trainable_layers=1",
    ]
    small += ["engine.kv_cache_gib=0.2", "ray.object_store_gib=0.5"]
    return load_config(
        Path(configs.__file__).parent / "quickstart.yaml", settings + (small if context.quick else [])
    )


async def _steps(spec: RunSpec, folder: RunFolder, start: Start, tracker: WaitingTimes) -> float:
    """Seconds of the RL steps, on a cluster that is up."""
    async with training_cluster(spec, folder, start) as cluster:
        began = time.perf_counter()
        await run_loop(_parts(spec, start, cluster, tracker), spec.config.train, start.state)
        return time.perf_counter() - began


def _parts(spec: RunSpec, start: Start, cluster: TrainingCluster, tracker: WaitingTimes) -> LoopParts:
    def on_step(summary: StepSummary, batch: Batch) -> None: ...

    async def on_checkpoint(state: TrainState) -> None: ...

    fleet = build_fleet(spec.config, cluster, lambda: spec.config.rollout.workers, lambda text: None)
    stream = build_stream(spec, cluster, start.state, fleet, on_failures=lambda summary: None)
    return LoopParts(stream, cluster.learner, fleet, cluster.channel, tracker, on_step, on_checkpoint)
