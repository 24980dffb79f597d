"""The composition root: the one place that constructs what runs. Everything else is given its parts.

Preparation --> Ray --> rollout workers and learner, started together --> Cluster --> (run.py) warm start, loop, evaluation
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from actors.fast_weights.basis import load_basis
from actors.types import PolicyVersion
from actors.worker import WorkerSpec
from cluster.common.tasks import TaskSource
from cluster.fleet.broadcast import ObjectStoreChannel, ObjectStoreWeights
from cluster.fleet.episode_journal import EpisodeJournal, start_journal
from cluster.fleet.fleet import ElasticFleet, FleetPlan
from cluster.fleet.ledger import Ledger
from cluster.fleet.ray_runtime import Demand, all_ready, cancel_on_sigterm, demand, ray_runtime
from cluster.fleet.remote_worker import REFRESH_S, RemoteWorker, credits_per_worker, worker_process
from cluster.fleet.stream import GroupStream, StreamPlan
from cluster.runs.checkpoint import START, TrainState
from cluster.train.prepare import Preparation
from cluster.train.warm_start import Demonstrations, can_demonstrate
from configs.schema import RunConfig
from learner.types import LearnerError
from learner.worker import LearnerGroup, LearnerSpec


@dataclass(frozen=True, slots=True, eq=False)
class TrainingCluster:
    """What is up during a training run. ``workers`` are those that serve now; ``launched`` are all that were ever started, to be ended."""

    workers: list[RemoteWorker]
    launched: list[RemoteWorker]
    learner: LearnerGroup
    channel: ObjectStoreChannel
    journal: EpisodeJournal | None


@asynccontextmanager
async def training_cluster(preparation: Preparation) -> AsyncIterator[TrainingCluster]:
    """Ray, workers and learner for the duration of the block; the learner and the workers at the version of the checkpoint, if there is one.

    Raises StartupError or LearnerError; whatever had started is ended.
    """
    config = preparation.config
    needed = demand(config, learner=True)
    with ray_runtime(config, needed):
        cancel_on_sigterm()
        journal = start_journal() if config.rollout.recover_episodes else None
        workers = list(_workers(preparation, journal))
        launched = list(workers)
        starting = asyncio.create_task(asyncio.to_thread(_learner, preparation))
        try:
            await _ready(workers, config, needed)
            learner = await asyncio.shield(starting)
            channel = ObjectStoreChannel(trainable_only=config.learner.trainable == "last_layers")
            yield TrainingCluster(workers, launched, learner, channel, journal)
        finally:
            for worker in launched:
                worker.kill()
            await asyncio.wait(
                [starting], timeout=config.ray.startup_timeout_s
            )  # a learner that is still starting can only be closed once it is up
            if starting.done() and starting.exception() is None:
                starting.result().close()


@asynccontextmanager
async def worker_set(specs: Sequence[WorkerSpec]) -> AsyncIterator[tuple[RemoteWorker, ...]]:
    """Rollout workers of one configuration, without a learner, for the duration of the block; Ray is up. Raises StartupError."""
    config = specs[0].config
    workers = tuple(RemoteWorker(spec, worker_process(config), journal=None) for spec in specs)
    try:
        await _ready(workers, config, demand(config, learner=False))
        yield workers
    finally:
        for worker in workers:
            worker.kill()


def worker_specs(
    config: RunConfig, policy_path: Path, basis_path: Path, version: PolicyVersion
) -> list[WorkerSpec]:
    """What each of ``rollout.workers`` is built from."""
    return [
        WorkerSpec(f"worker-{number}", config, str(policy_path), str(basis_path), version)
        for number in range(config.rollout.workers)
    ]


def build_fleet(
    preparation: Preparation,
    cluster: TrainingCluster,
    newest: ObjectStoreWeights | None,
    wanted: Callable[[], int],
    say: Callable[[str], None],
) -> ElasticFleet:
    """The workers of ``cluster``, all at ``newest`` (None: what they started from), and the way to start more."""
    config, version = preparation.config, start_state(preparation).version

    def launch(name: str) -> RemoteWorker:
        spec = WorkerSpec(name, config, str(preparation.policy_path), str(preparation.basis_path), version)
        worker = RemoteWorker(spec, worker_process(config), cluster.journal)
        cluster.launched.append(worker)
        return worker

    at_once = len(cluster.workers) if config.train.max_staleness == 0 else max(1, len(cluster.workers) // 2)
    in_flight = config.rollout.refresh == "in_flight"
    return ElasticFleet(
        cluster.workers,
        FleetPlan(launch, wanted, version, at_once, config.rollout.health_s, say, in_flight),
        newest,
    )


def build_stream(preparation: Preparation, workers: Sequence[RemoteWorker], state: TrainState) -> GroupStream:
    config = preparation.config
    plan = StreamPlan(
        steps=max(0, config.train.steps - state.step),
        per_step=config.train.tasks_per_step,
        max_staleness=config.train.max_staleness,
        credits=credits_per_worker(config),
        stall_s=config.train.group_timeout_s
        + REFRESH_S
        + config.ray.startup_timeout_s,  # a replacement may have to start in between
    )
    tasks = TaskSource(preparation.environment, "train", config.seed)
    return GroupStream(plan, workers, state.version, tasks.at, Ledger(state.ledger))


def build_demonstrations(preparation: Preparation) -> Demonstrations | None:
    """None where there is no warm start: none was asked for, or it lies behind the checkpoint."""
    if (
        preparation.config.warm_start.steps == 0
        or preparation.checkpoint is not None
        or not can_demonstrate(preparation.environment)
    ):
        return None
    return Demonstrations(preparation.config, preparation.environment, preparation.model_path)


def start_state(preparation: Preparation) -> TrainState:
    return START if preparation.checkpoint is None else preparation.checkpoint.state


def _workers(preparation: Preparation, journal: EpisodeJournal | None) -> tuple[RemoteWorker, ...]:
    config, version = preparation.config, start_state(preparation).version
    specs = worker_specs(config, preparation.policy_path, preparation.basis_path, version)
    return tuple(RemoteWorker(spec, worker_process(config), journal) for spec in specs)


def _learner(preparation: Preparation) -> LearnerGroup:
    """Blocks until all ranks are up, and have loaded the checkpoint if there is one."""
    config = preparation.config
    spec = LearnerSpec(
        config.learner,
        config.objective,
        str(preparation.model_path),
        load_basis(preparation.basis_path),
        config.seed,
        config.sampling.temperature,
    )
    learner = LearnerGroup(spec, config.ray.startup_timeout_s)
    if preparation.checkpoint is not None:
        learner.load(str(preparation.checkpoint.learner))
        if learner.version != preparation.checkpoint.state.version:
            learner.close()
            raise LearnerError(
                f"{preparation.checkpoint.folder}: the learner's version {learner.version} is not the run's"
            )
    return learner


async def _ready(workers: Sequence[RemoteWorker], config: RunConfig, needed: Demand) -> None:
    await all_ready({worker.name: worker.started for worker in workers}, config.ray.startup_timeout_s, needed)
