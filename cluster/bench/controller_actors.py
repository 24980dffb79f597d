"""Virtual rollout workers and a virtual learner rank, which only wait. Values and sizes are real.

One async actor stands for many rollout workers, because each process costs 60 MB and half a second to start.
What it returns is pickled, stored and sent anew for each group, as from a real worker.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, fields, replace
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import ray

from actors.episodes.group_summary import GroupSummary
from actors.types import PolicyVersion, Task, TrajectoryGroup
from actors.worker import PublishedWeights, WorkerReport, WorkerSpec
from learner.types import StepReport

if TYPE_CHECKING:
    from actors.episodes.rollout import RolloutRequest
    from learner.worker import LearnerSpec


def group_of(template: TrajectoryGroup, task: Task, version: PolicyVersion, worker: str) -> TrajectoryGroup:
    """The ``template`` as if ``worker`` had just played ``task`` on ``version``.

    Its siblings share no array: a shared array would travel only once.
    """
    trajectories = tuple(
        replace(
            trajectory,
            task=task,
            episode_id=f"{task.id}.{number}",
            policy_version=version,
            segments=tuple(replace(segment, policy_version=version) for segment in trajectory.segments),
        )
        for number, trajectory in enumerate(template.trajectories)
    )
    return TrajectoryGroup(task, version, trajectories, (), worker)


@dataclass(slots=True, eq=False)
class _Worker:
    """One virtual worker. ``first_s`` shortens its first group, so that the workers do not march in step."""

    spec: WorkerSpec
    first_s: float
    version: PolicyVersion
    idle: asyncio.Event
    running: int = 0
    groups: int = 0
    refreshes: int = 0


class _VirtualWorkers:
    """The methods of actors.worker.RolloutActor with the worker's number in front.

    A group takes ``group_s`` and no computing.
    """

    def __init__(self, template: TrajectoryGroup, group_s: float) -> None:
        self._template, self._group_s = template, group_s
        self._workers: dict[int, _Worker] = {}

    async def start(self, number: int, first_s: float, spec: WorkerSpec) -> str:
        idle = asyncio.Event()
        idle.set()
        self._workers[number] = _Worker(spec, first_s, spec.version, idle)
        return spec.name

    @ray.method(num_returns=2)
    async def group(self, number: int, request: RolloutRequest) -> tuple[GroupSummary, TrajectoryGroup]:
        worker = self._workers[number]
        worker.running += 1
        worker.idle.clear()
        seconds, worker.first_s = worker.first_s or self._group_s, 0.0
        version = worker.version
        await asyncio.sleep(seconds)
        worker.running -= 1
        worker.groups += 1
        if worker.running == 0:
            worker.idle.set()
        group = group_of(self._template, request.task, version, worker.spec.name)
        return GroupSummary.of(group), group

    async def report(self, number: int) -> WorkerReport:
        return self._report(self._workers[number])

    async def drain(self, number: int, drain_s: float) -> None:
        await asyncio.wait_for(self._workers[number].idle.wait(), drain_s)

    async def refresh(self, number: int, weights: PublishedWeights, drain_s: float) -> WorkerReport:
        worker = self._workers[number]
        worker.version = weights.version
        worker.refreshes += 1
        return self._report(worker)

    def _report(self, worker: _Worker) -> WorkerReport:
        from actors.engine.policy import EngineStats
        from actors.engine.step_loop import PHASES

        values: dict[str, Any] = dict.fromkeys((field.name for field in fields(EngineStats)), 0)
        engine = EngineStats(**(values | {"seconds": dict.fromkeys(PHASES, 0.0)}))
        counts = (worker.groups, worker.running, worker.refreshes)
        return WorkerReport(worker.spec.name, worker.version, *counts, 0.0, 0.0, 0.0, engine)


VirtualWorkers = ray.remote(num_cpus=0, max_restarts=0)(_VirtualWorkers)


def virtual_handle(actor: Any, number: int, first_s: float) -> Any:
    """One virtual worker, with the methods of an actor handle that RemoteWorker calls."""
    first: dict[str, tuple[Any, ...]] = dict.fromkeys(("group", "report", "drain", "refresh"), (number,))
    first["start"] = (number, first_s)
    calls = {name: partial(getattr(actor, name).remote, *arguments) for name, arguments in first.items()}
    return SimpleNamespace(**{name: SimpleNamespace(remote=call) for name, call in calls.items()})


@ray.remote(num_cpus=0, max_restarts=0)
class VirtualRank:
    """The methods of learner.worker.LearnerActor that the loop uses.

    A step reads every group and learns nothing.
    """

    def __init__(self, spec: LearnerSpec, rank: int) -> None:
        self._version: PolicyVersion = 0

    @ray.method
    def address(self) -> tuple[str, int]:
        return "", 0

    @ray.method
    def start(self, host: str, port: int) -> PolicyVersion:
        return self._version

    @ray.method
    def hold(self, *groups: TrajectoryGroup) -> None:
        """Nothing to do: Ray has fetched the groups before the call."""

    @ray.method
    def step(self, *groups: TrajectoryGroup) -> StepReport:
        self._version += 1
        values = {field.name: 0 for field in fields(StepReport)}
        trajectories = [trajectory for group in groups for trajectory in group.trajectories]
        tokens = sum(len(segment.token_ids) for trajectory in trajectories for segment in trajectory.segments)
        counts = {"optimizer_steps": 1, "tokens": tokens, "trajectories": len(trajectories)}
        return StepReport(**(values | counts | {"version": self._version}))

    @ray.method(num_returns=2)
    def weights(self, trainable_only: bool) -> tuple[dict[str, Any], PolicyVersion]:
        return {}, self._version
