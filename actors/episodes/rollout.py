"""Many concurrent episodes of one worker: groups of siblings, batched writes, deadlines, failures as data.

    group(request) --> siblings 0..n-1, each:
        wait for a slot --> play_episode --> free the slot --> score_episode --> Trajectory | FailedEpisode
                                 |
        SharedWrites: what siblings ask for twice is written once (shared_writes.py)
                                 |
        WriteBatcher: pending writes of all episodes --> writer.write in a thread, one call at a time

Every wait, and who ends it:
    a slot                  freed when another episode was played, at the latest at that episode's deadline
    the environment         bounded by ``rollout.environment_timeout_s`` a call; its close by CLOSING_S
    engine and writer       bounded by ``rollout.episode_timeout_s``
    the score               bounded by SCORING_S. A judge's verdict holds no slot, and does not count against
                            the episode's own deadline
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from actors.environments.base import Environment
from actors.environments.mixture import playing
from actors.episodes.attribution import attributed
from actors.episodes.controls import write_control
from actors.episodes.episode import PASSING, EpisodeSpec, Played, derived_seed, play_episode, score_episode
from actors.episodes.hosted_session import HostedSession
from actors.episodes.in_flight import InFlightPolicy, dated
from actors.episodes.preservation import Preservation
from actors.episodes.recovery import (
    NO_RECOVERY,
    Diverged,
    EpisodeLog,
    Event,
    RecordedPolicy,
    RecordedWriter,
    Recovered,
    Recovery,
)
from actors.episodes.shared_writes import SharedWrites
from actors.memory.build import Surroundings, build_memory
from actors.protocols import (
    AsyncWriter,
    EngineError,
    FastWeightWriter,
    MemoryFault,
    Policy,
    ReceiptError,
    TaskError,
    WriterError,
)
from actors.text.chat_template import ChatFormat
from actors.types import Boundary, FailedEpisode, Task, Trajectory, TrajectoryGroup, WriteRequest, WriteResult
from configs.schema import MemoryConfig, RolloutConfig, WriteConfig
from configs.user_code import owned

_log = logging.getLogger(__name__)
T = TypeVar("T")

_BOUNDARIES: tuple[tuple[type[RuntimeError], Boundary], ...] = (
    (TaskError, "environment"),
    (MemoryFault, "memory"),
    (ReceiptError, "receipt"),
    (EngineError, "engine"),
    (WriterError, "writer"),
)

SCORING_S = 540.0
"""The longest wait for a session's outcome. It is less than the driver's grace beyond an episode's deadline
(600 s, cluster/fleet/remote_worker.py). So a late verdict fails its episode before the driver takes the whole
worker for lost."""

# How long a batch of writes waits for more requests. Extractions that end in the same engine step arrive one
# after the other. A write takes hundreds of milliseconds, and one of eight is cheaper than two of four.
_GATHER_S = 0.003


@dataclass(frozen=True, slots=True)
class RolloutRequest:
    """One task for ``group_size`` siblings.

    Task, memory, temperature and seed decide what is sampled, up to the engine's own rounding. The group id
    does not.
    """

    task: Task
    group_id: str  # never reused: episode ids begin with it
    group_size: int
    memory: MemoryConfig
    temperature: float  # 0 is greedy
    max_answer_tokens: int
    seed: int
    answer_temperature: float | None = None  # None: ``temperature``

    def __post_init__(self) -> None:
        if self.group_size < 1 or self.max_answer_tokens < 1 or self.temperature < 0:
            raise ValueError(
                f"rollout request {self.group_id}: group_size={self.group_size} and "
                f"max_answer_tokens={self.max_answer_tokens} must be at least 1, "
                f"temperature={self.temperature} at least 0"
            )


class WriteBatcher:
    """AsyncWriter over a batched writer: requests that come in during a write are the next batch.

    Bound to the event loop of its first use.
    """

    def __init__(self, writer: FastWeightWriter) -> None:
        self._writer = writer
        self._pending: list[tuple[WriteRequest, asyncio.Future[WriteResult]]] = []
        self._drain: asyncio.Task[None] | None = None

    async def write(self, request: WriteRequest) -> WriteResult:
        """Return the writer's result. Raises WriterError. A cancelled wait does not end the batch."""
        future: asyncio.Future[WriteResult] = asyncio.get_running_loop().create_future()
        self._pending.append((request, future))
        if self._drain is None or self._drain.done():
            self._drain = asyncio.create_task(self._run())
        return await future

    async def _run(self) -> None:
        await asyncio.sleep(_GATHER_S)
        while self._pending:
            batch = [(request, future) for request, future in self._pending if not future.done()]
            self._pending.clear()
            if not batch:
                return
            requests = [request for request, _ in batch]
            # any exception of the writer goes to those who wait: this task has no caller that could see it
            (results,) = await asyncio.gather(
                asyncio.to_thread(self._writer.write, requests), return_exceptions=True
            )
            if not isinstance(results, BaseException) and len(results) != len(requests):
                results = WriterError(
                    f"the writer returned {len(results)} results for {len(requests)} requests"
                )
            for place, (_, future) in enumerate(batch):
                if future.done():  # its episode gave up during the write
                    continue
                if isinstance(results, BaseException):
                    future.set_exception(results)
                else:
                    future.set_result(results[place])


@dataclass(frozen=True, slots=True)
class _Group:
    """What siblings have in common."""

    request: RolloutRequest
    recovery: Recovery
    writer: AsyncWriter


class Rollout:
    """All episodes of one worker. Concurrent calls of ``group`` share ``slots`` places.

    Built inside the worker, used on one event loop.
    """

    def __init__(
        self,
        policy: Policy,
        writer: FastWeightWriter,
        environment: Environment,
        chat: ChatFormat,
        write: WriteConfig,
        rollout: RolloutConfig,
        slots: int,
        surroundings: Surroundings,
        basis_id: str,
        worker_name: str,
        preservation: Preservation | None = None,
        stages: Sequence[Environment] = (),
    ) -> None:
        """``stages``: the environments of the curriculum's stages, which play the tasks of these."""
        if slots < 1:
            raise ValueError(
                f"slots={slots} is not allowed: "
                "it must be at least 1, as many as the engine has adapter slots"
            )
        self._policy = policy
        self._writer = WriteBatcher(writer)
        self._environments = (environment, *stages)
        self._chat = chat
        self._write = write
        self._rollout = rollout
        self._surroundings = surroundings
        self._slots = asyncio.Semaphore(slots)
        self._basis_id = basis_id
        self._worker_name = worker_name
        self._preservation = preservation

    async def group(self, request: RolloutRequest) -> TrajectoryGroup:
        """Play the task ``group_size`` times.

        An episode that fails becomes data, and its siblings go on. A programming error ends the whole group.
        The policy must keep its version until this returns, unless ``rollout.refresh`` is in_flight.
        """
        return (await self.recoverable_group(request, NO_RECOVERY))[0]

    async def recoverable_group(
        self, request: RolloutRequest, recovery: Recovery
    ) -> tuple[TrajectoryGroup, Recovered]:
        """As ``group``, with the progress of episodes kept in ``recovery.journal``.

        An episode with progress on the present policy version is continued from there.
        """
        version = self._policy.version
        together = _Group(request, recovery, SharedWrites(self._writer))
        try:
            async with asyncio.TaskGroup() as siblings:
                running = [
                    siblings.create_task(self._sibling(together, number))
                    for number in range(request.group_size)
                ]
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None
        finished = [sibling.result() for sibling in running]
        trajectories = tuple(result for result, _ in finished if isinstance(result, Trajectory))
        group = TrajectoryGroup(
            task=request.task,
            policy_version=min((trajectory.policy_version for trajectory in trajectories), default=version),
            trajectories=trajectories,
            failed=tuple(result for result, _ in finished if isinstance(result, FailedEpisode)),
            worker=self._worker_name,
        )
        continued = sum(continued for _, continued in finished)
        return group, Recovered(continued, len(trajectories) - continued if recovery.reissued else 0)

    async def _sibling(self, group: _Group, number: int) -> tuple[Trajectory | FailedEpisode, bool]:
        """Play and score one episode. Also return whether it finished and was continued from its progress.

        It starts anew where there is no progress on this policy version, or it does not follow it.
        """
        request = group.request
        spec = EpisodeSpec(
            task=request.task,
            episode_id=f"{request.group_id}.{number}",
            temperature=request.temperature,
            max_answer_tokens=request.max_answer_tokens,
            max_turns=self._rollout.max_turns,
            seed=derived_seed(request.seed, number),
            answer_temperature=request.answer_temperature,
        )
        progress = group.recovery.progress.get(number)
        if progress is not None and progress.version == self._policy.version:
            try:
                result = await self._episode(spec, group, number, progress.events)
                return result, isinstance(result, Trajectory)
            except Diverged as error:
                _log.warning("%s: episode %s starts anew: %s", self._worker_name, spec.episode_id, error)
        return await self._episode(spec, group, number, ()), False

    async def _episode(
        self, spec: EpisodeSpec, group: _Group, number: int, past: tuple[Event, ...]
    ) -> Trajectory | FailedEpisode:
        """Play and score one episode, then close its session, however it ended. Raises Diverged."""
        environment = self._environments[spec.task.stage]
        result: Trajectory | FailedEpisode | None = None
        try:
            async with HostedSession(environment, spec.task, self._rollout.environment_timeout_s) as session:
                playing = partial(self._play, spec, session, group, number, past)
                result = await self._finish(spec, session, playing)
        except TaskError as error:  # of the close: what _finish meets is a FailedEpisode already
            return result if isinstance(result, FailedEpisode) else _failed(spec, "environment", str(error))
        return result

    async def _finish(
        self, spec: EpisodeSpec, session: HostedSession, playing: Callable[[], Awaitable[Played]]
    ) -> Trajectory | FailedEpisode:
        """Play with a slot, then score without one, each under its deadline."""
        limit = self._rollout.episode_timeout_s

        def late() -> str:
            waited = session.waits_for or "the engine or the writer"
            return (
                f"not played after rollout.episode_timeout_s={limit:g}: waiting for {waited}: "
                "raise it, or lower engine.slots"
            )

        def unscored() -> str:
            return (
                f"played, but not scored after {SCORING_S:g} s: waiting for the environment "
                f"{spec.task.environment} and its judge, if it has one: lower its judge's timeout_s, "
                "or raise its max_concurrent"
            )

        async with self._slots:
            played = await _in_time(spec, playing(), limit, late, "engine")
        if isinstance(played, FailedEpisode):
            return played
        scored = await _in_time(spec, self._scored(played), SCORING_S, unscored, "environment")
        return dated(scored) if self._in_flight and isinstance(scored, Trajectory) else scored

    async def _scored(self, played: Played) -> Trajectory:
        """Raises TaskError, MemoryFault."""
        environment = self._environments[played.spec.task.stage]
        trajectory = await score_episode(played)
        return attributed(trajectory, playing(environment, trajectory.task), self._chat)

    async def _play(
        self,
        spec: EpisodeSpec,
        session: HostedSession,
        group: _Group,
        number: int,
        past: tuple[Event, ...],
    ) -> Played:
        request = group.request
        whom = f"task {spec.task.id}: memory.policy={request.memory.policy}"
        with owned(whom, MemoryFault, passing=PASSING):
            environment = playing(self._environments[spec.task.stage], spec.task)
            control = write_control(request.memory, request.task, environment)
            memory = build_memory(request.memory, self._write, self._surroundings, control)
        common = (self._chat, memory, self._basis_id, self._preservation)
        if self._in_flight:
            # Not shared: a sibling that asks after a refresh must not get a write on the older weights.
            living = InFlightPolicy(self._policy, self._writer)
            return await play_episode(spec, session, living, living, *common)
        log = EpisodeLog(
            partial(group.recovery.journal.note, request.group_id, number, self._policy.version), past
        )
        policy = RecordedPolicy(self._policy, log)
        writer = RecordedWriter(group.writer, log, group.recovery.tolerance)
        played = await play_episode(spec, session, policy, writer, *common)
        log.flush()  # the replies after the last write: a worker may die while the episode is scored
        return played

    @property
    def _in_flight(self) -> bool:
        return self._rollout.refresh == "in_flight"


async def _in_time(
    spec: EpisodeSpec, doing: Awaitable[T], limit_s: float, late: Callable[[], str], waits_for: Boundary
) -> T | FailedEpisode:
    """Return what ``doing`` returns, or the failed episode.

    ``late`` gives the message when the deadline passes. A TimeoutError from inside is not the deadline's: it
    is reported at ``waits_for``.
    """
    deadline = asyncio.timeout(limit_s)
    try:
        async with deadline:
            return await doing
    except TimeoutError as error:
        if not deadline.expired():
            return _failed(spec, waits_for, f"a wait inside the episode timed out: {error}")
        return _failed(spec, "timeout", late())
    except tuple(kind for kind, _ in _BOUNDARIES) as error:
        boundary = next(boundary for kind, boundary in _BOUNDARIES if isinstance(error, kind))
        return _failed(spec, boundary, str(error))


def _failed(spec: EpisodeSpec, boundary: Boundary, message: str) -> FailedEpisode:
    return FailedEpisode(
        task_id=spec.task.id, episode_id=spec.episode_id, boundary=boundary, message=" ".join(message.split())
    )
