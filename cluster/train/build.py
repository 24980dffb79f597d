"""The composition root of a training: it constructs what runs and hands each part its parts.

    RunSpec, RunFolder, Start --> Ray --> rollout workers and learner, started together --> TrainingCluster
                                          (on GPUs that they share: the learner first)
    TrainingCluster           --> fleet --> stream --> step checkpoints --> LoopParts --> (run.py) the loop

Parts are built in the order of the second line, so that each is given only parts that exist. What calls
back is given at construction too: the stream calls the fleet, the learner and the recorder.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from actors.episodes.group_summary import GroupSummary
from actors.fast_weights.basis import load_basis
from actors.types import PolicyVersion, Task
from actors.worker import WorkerSpec
from cluster.common.display import StageCounter
from cluster.common.errors import UnloadableError
from cluster.common.tasks import TaskSource
from cluster.fleet.broadcast import ObjectStoreChannel
from cluster.fleet.collective import CollectiveChannel
from cluster.fleet.episode_journal import start_journal
from cluster.fleet.fleet import ElasticFleet, FleetPlan
from cluster.fleet.ledger import Ledger
from cluster.fleet.ray_runtime import Demand, all_ready, cancel_on_sigterm, demand, driver_folder, ray_runtime
from cluster.fleet.remote_worker import REFRESH_S, RemoteWorker, credits_per_worker, worker_process
from cluster.fleet.seats import Crew
from cluster.fleet.stream import Batch, GroupStream, StreamCalls, StreamPlan
from cluster.runs.checkpoint import TrainState
from cluster.runs.wanted_workers import WantedWorkers
from cluster.train.curriculum import Curriculum
from cluster.train.demonstrations import Demonstrations
from cluster.train.idle_steps import IdleSteps
from cluster.train.learner_recovery import LearnerRecovery
from cluster.train.loop import LoopParts, delivery
from cluster.train.metrics import StepSummary, step_line
from cluster.train.prepare import RunFolder, RunSpec, Start
from cluster.train.scoreboard import Observers
from cluster.train.step_checkpoints import StepCheckpoints
from configs.curriculum import stages
from configs.schema import RunConfig
from learner.types import LearnerError, LearnerLost, UnreadableError
from learner.worker import LearnerGroup, LearnerSpec


@dataclass(frozen=True, slots=True, eq=False)
class TrainingCluster:
    """What is up during a training. ``launch`` starts one worker more, which serves ``launch_version``.

    ``crew`` has the workers while no fleet has them. ``recovery`` brings a lost learner back.
    """

    crew: Crew[RemoteWorker]
    launch: Callable[[str], RemoteWorker]
    launch_version: PolicyVersion
    learner: LearnerGroup
    channel: ObjectStoreChannel | CollectiveChannel
    recovery: LearnerRecovery

    @property
    def workers(self) -> tuple[RemoteWorker, ...]:
        return tuple(self.crew.workers)


@asynccontextmanager
async def training_cluster(
    spec: RunSpec, folder: RunFolder, start: Start, say: Callable[[str], None] = lambda text: None
) -> AsyncIterator[TrainingCluster]:
    """Start Ray, the workers and the learner for the duration of the block, all at the version of ``start``.

    ``say`` is told of what is lost and brought back. Raises StartupError or LearnerError; whatever had
    started is ended.
    """
    config, version = spec.config, start.state.version
    needed = demand(config, learner=True)
    with ray_runtime(config, needed):
        cancel_on_sigterm()
        journal = start_journal(config.model.dtype) if config.rollout.recover_episodes else None
        launched: list[RemoteWorker] = []

        def launch(name: str) -> RemoteWorker:
            worker_spec = _worker_spec(name, config, start.policy_path, folder.basis, version)
            worker = RemoteWorker(worker_spec, worker_process(config), journal)
            launched.append(worker)
            return worker

        def launch_next() -> RemoteWorker:
            numbers = [int(worker.name.rpartition("-")[2]) for worker in launched]
            return launch(f"worker-{max(numbers, default=-1) + 1}")

        store = _store(spec)
        crew = Crew[RemoteWorker]((), launch_next, lambda: store.newest, say)
        starting = asyncio.create_task(asyncio.to_thread(_start_learner, spec, folder, start))
        try:
            # On a shared GPU an engine that starts would count what the learner takes meanwhile as its own.
            if config.shares_gpus:
                await asyncio.shield(starting)
            crew.adopt([launch_next() for _ in range(config.rollout.workers)])
            await crew.start(partial(_ready, config=config, needed=needed))
            learner = await asyncio.shield(starting)
            retries = config.train.learner_retries
            recovery = LearnerRecovery(learner, folder.path, start.checkpoint, retries, say)
            channel = _channel(config, store, learner, launched, say)
            yield TrainingCluster(crew, launch, version, learner, channel, recovery)
        finally:
            await crew.close()
            for worker in launched:
                worker.kill()
            # A learner that is still starting can only be closed once it is up.
            await asyncio.wait([starting], timeout=config.ray.startup_timeout_s)
            if starting.done() and starting.exception() is None:
                starting.result().close()


def _store(spec: RunSpec) -> ObjectStoreChannel:
    """What of the policy travels to the workers: all, the trained layers, or the factors of a LoRA."""
    from actors.policy_lora import LoraBase

    learner = spec.config.learner
    if learner.trainable == "lora":
        base = LoraBase(str(spec.model_path), learner.dtype, learner.lora_scale)
        return ObjectStoreChannel(trainable_only=True, base=base)
    return ObjectStoreChannel(trainable_only=learner.trainable == "last_layers")


def _channel(
    config: RunConfig,
    store: ObjectStoreChannel,
    learner: LearnerGroup,
    launched: Sequence[RemoteWorker],
    say: Callable[[str], None],
) -> ObjectStoreChannel | CollectiveChannel:
    """The way of new weights. ``launched``: all workers, also those that start later and those that ended."""
    if config.learner.weight_transfer == "object_store":
        return store

    def up() -> list[RemoteWorker]:
        return [worker for worker in list(launched) if worker.is_up]

    return CollectiveChannel(store, learner, up, config.transfer_backend, say)


def _start_learner(spec: RunSpec, folder: RunFolder, start: Start) -> LearnerGroup:
    """Block until all ranks are up, and have loaded the checkpoint if there is one."""
    config, checkpoint = spec.config, start.checkpoint
    learner_spec = LearnerSpec(
        config.learner,
        config.objective,
        str(spec.model_path),
        load_basis(folder.basis),
        config.seed,
        config.sampling.temperature,
        config.sampling.answer_temperature,
        shuffle_rewards=config.train.control == "shuffled_rewards",
        lost_versions=start.state.lost_versions,
    )
    learner = LearnerGroup(learner_spec, config.ray.startup_timeout_s)
    if checkpoint is not None:
        try:
            learner.load(str(checkpoint.learner))
        except UnreadableError as error:
            learner.close()
            raise UnloadableError(checkpoint.folder, str(error)) from error
        except LearnerError:  # a rank died, or a setting has changed: the checkpoint is not to blame
            learner.close()
            raise
        if learner.version != checkpoint.state.version:
            learner.close()
            version = f"the learner's version {learner.version} is not the run's"
            raise UnloadableError(checkpoint.folder, version)
    return learner


def build_loop(
    cluster: TrainingCluster,
    spec: RunSpec,
    folder: RunFolder,
    state: TrainState,
    observers: Observers,
    counter: StageCounter,
) -> LoopParts:
    """The parts of the RL stage. ``counter`` is given a line for each step."""
    config, recorder = spec.config, observers.recorder
    wanted = WantedWorkers(config.rollout.workers, config.rollout.schedule, folder.path, state.step)
    fleet = build_fleet(config, cluster, wanted, observers.display.say)

    def on_failures(summary: GroupSummary) -> None:
        recorder.on_failures(config, wanted.step + 1, summary)

    curriculum = build_curriculum(spec, state, observers.display.say)
    stream = build_stream(spec, cluster, state, fleet, curriculum.task_at, on_failures)
    checkpoints = StepCheckpoints(spec, folder, cluster.learner, stream, fleet, observers)
    idle = IdleSteps(observers.display.say)

    def on_step(summary: StepSummary, batch: Batch) -> None:
        wanted.step = summary.step
        recorder.on_batch(config, summary.step, batch)
        checkpoints.on_step(summary.step)
        counter.advance(step_line(summary))
        idle.after_step(summary)

    async def recover(error: LearnerLost, stood: TrainState) -> tuple[TrainState, PolicyVersion]:
        restored, saved_version = await asyncio.to_thread(cluster.recovery.restart, error, stood)
        wanted.step = restored.step
        checkpoints.go_back()
        counter.go_back(stood.step - restored.step)
        return restored, saved_version

    return LoopParts(
        stream,
        cluster.learner,
        fleet,
        cluster.channel,
        observers.tracker,
        curriculum,
        on_step,
        checkpoints.on_checkpoint,
        recover,
    )


def build_fleet(
    config: RunConfig, cluster: TrainingCluster, wanted: Callable[[], int], say: Callable[[str], None]
) -> ElasticFleet[RemoteWorker]:
    """The workers of ``cluster``, all at the newest version that was published, and the way to start more."""
    count = len(cluster.workers)
    plan = FleetPlan(
        cluster.launch,
        wanted,
        cluster.launch_version,
        at_once=count if config.train.max_staleness == 0 else max(1, count // 2),
        health_s=config.rollout.health_s,
        say=say,
        in_flight=config.rollout.refresh == "in_flight",
    )
    fleet = ElasticFleet(cluster.workers, plan, cluster.channel.newest)
    fleet.state.lost = fleet.state.replaced = cluster.crew.lost  # before the fleet had them
    return fleet


def build_curriculum(spec: RunSpec, state: TrainState, say: Callable[[str], None]) -> Curriculum:
    """The training tasks, from where ``state`` stands on."""
    tasks, *of_stages = (
        TaskSource(environment, "train", spec.config.seed).at
        for environment in (spec.environment, *spec.stage_environments)
    )
    return Curriculum(tasks, stages(spec.config), of_stages, state.curriculum, say)


def build_stream(
    spec: RunSpec,
    cluster: TrainingCluster,
    state: TrainState,
    fleet: ElasticFleet[RemoteWorker],
    task_at: Callable[[int], Task],
    on_failures: Callable[[GroupSummary], None],
) -> GroupStream:
    """The stream of the training tasks over the workers of ``fleet``, from ``state`` on."""
    config = spec.config
    # A replacement may have to start between two events.
    stall_s = config.train.group_timeout_s + REFRESH_S + config.ray.startup_timeout_s
    plan = StreamPlan(
        steps=max(0, config.train.steps - state.step),
        per_step=config.train.tasks_per_step,
        max_staleness=config.train.max_staleness,
        credits=credits_per_worker(config),
        stall_s=stall_s,
    )
    calls = StreamCalls(
        task_at=task_at,
        missing=delivery(cluster.learner),
        on_failures=on_failures,
        on_group=fleet.state.progress,
        on_lost=fleet.lost,
    )
    return GroupStream(plan, cluster.workers, state.version, Ledger(state.ledger), calls)


def build_demonstrations(spec: RunSpec, purpose: str) -> Demonstrations:
    """What supervised steps learn from; each ``purpose`` has tasks of its own."""
    return Demonstrations(spec.config, spec.environment, spec.model_path, purpose)


# --- workers without a learner ----------------------------------------------------------------------------


@asynccontextmanager
async def worker_set(specs: Sequence[WorkerSpec]) -> AsyncIterator[tuple[RemoteWorker, ...]]:
    """Start rollout workers of one configuration for the duration of the block; Ray is up.

    Raises StartupError.
    """
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
        _worker_spec(f"worker-{number}", config, policy_path, basis_path, version)
        for number in range(config.rollout.workers)
    ]


def _worker_spec(
    name: str, config: RunConfig, policy_path: Path, basis_path: Path, version: PolicyVersion
) -> WorkerSpec:
    return WorkerSpec(name, config, str(policy_path), str(basis_path), version, driver_folder())


async def _ready(workers: Sequence[RemoteWorker], config: RunConfig, needed: Demand) -> None:
    await all_ready({worker.name: worker.started for worker in workers}, config.ray.startup_timeout_s, needed)
