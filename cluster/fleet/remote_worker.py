"""The driver's view of a rollout worker: each call has a deadline and names the worker in its errors.

    RemoteWorker.group --> stream.py    .episode --> measure/rows.py    .drain, .refresh, .report --> fleet.py

A worker that dies or is late raises WorkerLost here. Ray restarts nothing: a restarted actor would have
lost its weights.
"""

from __future__ import annotations

import math
import re
from concurrent.futures import Future
from typing import Any

import ray
from ray.exceptions import ObjectLostError, RayActorError, RayTaskError

from actors.episodes.episode import derived_seed
from actors.episodes.rollout import RolloutRequest
from actors.peak_memory import PeakMemory
from actors.types import Task, TrajectoryGroup
from actors.weight_transfer import Rendezvous
from actors.worker import RolloutActor, WorkerReport, WorkerSpec
from cluster.common.errors import WeightsLost, WorkerLost
from cluster.fleet.broadcast import ObjectStoreWeights
from cluster.fleet.contract import FinishedGroup
from cluster.fleet.episode_journal import EpisodeJournal
from cluster.fleet.ray_runtime import answer
from cluster.measure.rows import EvaluationRow
from configs.schema import RunConfig

REFRESH_S = 600.0
REPORT_S = 60.0
EPISODE_GRACE_S = 600.0  # beyond an episode's own deadline: the judge's verdict and the way back
_CONTROL_CALLS = 8  # concurrent calls of an actor beyond its groups: drain, refresh, report


def worker_process(config: RunConfig) -> Any:
    """Start a process for a rollout worker: the actor that RemoteWorker is given."""
    rollout = config.rollout
    threads = {
        "OMP_NUM_THREADS": str(rollout.threads),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "TOKENIZERS_PARALLELISM": "false",
    }
    actor: Any = RolloutActor
    return actor.options(
        # on a single machine the workers share its cores, however many `scale` asks for
        num_cpus=rollout.cpus_per_worker if config.ray.address else 0,
        num_gpus=rollout.gpus_per_worker,
        resources={rollout.resource: 1} if rollout.resource else {},
        max_concurrency=config.engine.slots * 2 + credits_per_worker(config) + _CONTROL_CALLS,
        runtime_env={"env_vars": threads},
    ).remote()


class RemoteWorker:
    """A rollout worker behind Ray. It starts at once and is up when ``started`` resolves.

    ``actor`` has the methods of RolloutActor. ``journal`` keeps the progress of its episodes for a worker
    that may have to take them over; None: they would start anew.
    """

    def __init__(self, spec: WorkerSpec, actor: Any, journal: EpisodeJournal | None) -> None:
        self.name = spec.name
        self._journal = journal
        self._config = spec.config
        self._drain_s = spec.config.train.group_timeout_s
        self._actor = actor
        self._ended = False
        self.started: ray.ObjectRef[str] = actor.start.remote(spec)

    async def ready(self) -> None:
        """Wait until engine and writer are up. Raises WorkerLost."""
        await answer(self.started, self._config.ray.startup_timeout_s, self.name, "starting")

    async def group(self, position: int, task: Task) -> FinishedGroup:
        """Run the siblings of a training task. Only their summary comes here.

        Their seeds follow from the run's seed and ``position``.
        """
        config = self._config
        request = RolloutRequest(
            task=task,
            group_id=f"train-{position}",
            group_size=config.train.group_size,
            memory=config.memory,
            temperature=config.sampling.temperature,
            max_answer_tokens=config.sampling.max_answer_tokens,
            seed=derived_seed(config.seed, "rollout", position),
            answer_temperature=config.sampling.answer_temperature,
        )
        if self._journal is None:
            summary, content = self._actor.group.remote(request)
            return FinishedGroup(await self._answer(summary, task), content)
        summary, content = self._actor.recoverable_group.remote(
            request, await self._journal.open(request.group_id)
        )
        finished = FinishedGroup(await self._answer(summary, task), content)
        self._journal.close(request.group_id)
        return finished

    async def episode(self, position: int, task: Task, row: EvaluationRow) -> TrajectoryGroup:
        """Run an episode of a held-out task. It starts at once and ends with its own deadline."""
        request = RolloutRequest(
            task=task,
            group_id=f"{re.sub('[^a-z0-9]+', '-', row.label.lower())}-{position}",
            group_size=1,
            memory=row.memory,
            temperature=self._config.evaluation.temperature,
            max_answer_tokens=self._config.sampling.max_answer_tokens,
            seed=derived_seed(row.seed, "evaluation", position),
        )
        _, content = self._actor.group.remote(request)
        group: TrajectoryGroup = await answer(
            content, self._config.rollout.episode_timeout_s + EPISODE_GRACE_S, self.name, f"task {task.id}"
        )
        return group

    async def drain(self) -> None:
        """Wait until its groups and episodes have ended. It starts none until ``refresh``."""
        call = self._actor.drain.remote(self._drain_s)
        await answer(call, self._drain_s + REPORT_S, self.name, "its last groups before a refresh")

    @property
    def is_up(self) -> bool:
        """Whether it has started, and was not ended."""
        return not self._ended and bool(ray.wait([self.started], timeout=0, fetch_local=False)[0])

    def receive(self, meeting: Rendezvous, rank: int, transfer: str, deadline_s: float) -> Future[None]:
        """Take part in a collective transfer of weights, without waiting. See RolloutWorker.receive."""
        answered: Future[None] = self._actor.receive.remote(meeting, rank, transfer, deadline_s).future()
        return answered

    async def refresh(self, weights: ObjectStoreWeights) -> WorkerReport:
        """Drain if need be, load ``weights``, go on. Raises WorkerLost, WeightsLost."""
        call = self._actor.refresh.remote(weights, self._drain_s)
        doing = f"the refresh to version {weights.version}"
        try:
            report: WorkerReport = await answer(call, self._drain_s + REFRESH_S, self.name, doing)
        except WorkerLost as error:
            failure = error.__cause__
            # The two others: the learner failed while it wrote them, of which ``publish`` may not have heard.
            lost = (ObjectLostError, RayActorError, RayTaskError)
            if isinstance(failure, RayTaskError) and isinstance(failure.cause, lost):
                raise WeightsLost(weights.version) from error
            raise
        return report

    async def report(self) -> WorkerReport:
        """Its counts since it started."""
        report: WorkerReport = await answer(self._actor.report.remote(), REPORT_S, self.name, "its report")
        return report

    async def measure(self) -> PeakMemory:
        """The most memory that it held since the last call, or since it started."""
        peak: PeakMemory = await answer(
            self._actor.measure.remote(), REPORT_S, self.name, "measuring its memory"
        )
        return peak

    def kill(self) -> None:
        """End the process. Engine and episodes go with it."""
        self._ended = True
        ray.kill(self._actor)

    async def _answer(self, reference: ray.ObjectRef[Any], task: Task) -> Any:
        return await answer(reference, self._config.train.group_timeout_s, self.name, f"task {task.id}")


def credits_per_worker(config: RunConfig) -> int:
    """Groups in flight on one worker: enough to fill its slots with siblings."""
    return math.ceil(config.engine.slots / config.train.group_size)
