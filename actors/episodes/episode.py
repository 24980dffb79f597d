"""One episode: observe, act, and when the context is full extract, write, clear, continue.

    play_episode: session.observe --> memory.read / memory.answer --> LiveActor (engine, writer)  --> Played
    score_episode: session.outcome --> Trajectory

Method: TMEM, arXiv 2606.04536. The two halves are separate because a score may wait for a judge: then the
episode needs no engine slot any more (rollout.py).
"""

from __future__ import annotations

import hashlib
import inspect
import time
import traceback
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, TypeVar

from actors.environments.base import Reply
from actors.episodes.hosted_session import HostedSession
from actors.episodes.preservation import Preservation
from actors.episodes.recovery import Diverged
from actors.memory.base import Agent, Memory
from actors.protocols import (
    AsyncWriter,
    EngineError,
    MemoryFault,
    Policy,
    ReceiptError,
    TaskError,
    WriterError,
)
from actors.text.chat_template import ChatFormat
from actors.types import (
    AdapterKey,
    FastWeights,
    Flashcard,
    Generation,
    PolicyVersion,
    Probe,
    Sampling,
    SpanKind,
    StopReason,
    Task,
    Timings,
    Trajectory,
    WriteExample,
    WriteRequest,
    WriteResult,
)
from configs.user_code import fault, owned

T = TypeVar("T")

PASSING = (TaskError, EngineError, ReceiptError, WriterError, Diverged)
"""Errors with an owner of their own: a memory that meets one has not caused it."""

CLEANED = "cleaned_texts"
"""The event under which an episode counts the environment's texts that could not be encoded."""


@dataclass(frozen=True, slots=True)
class EpisodeSpec:
    """What one episode plays, and how."""

    task: Task
    episode_id: str  # never reused
    temperature: float  # 0 is greedy
    max_answer_tokens: int
    max_turns: int
    seed: int
    answer_temperature: float | None = None  # None: ``temperature``

    def temperature_of(self, kind: SpanKind) -> float:
        """Answers may have a temperature of their own."""
        if kind == "act" and self.answer_temperature is not None:
            return self.answer_temperature
        return self.temperature


@dataclass(frozen=True, slots=True, eq=False)
class Played:
    """An episode that has ended and has no score yet. It needs engine and writer no more."""

    spec: EpisodeSpec
    session: HostedSession
    actor: LiveActor
    agent: Agent
    memory: Memory
    stop_reason: StopReason
    started: float  # time.perf_counter()


_Phase = Literal["act", "extract", "write", "install"]


class LiveActor:
    """theta + Delta of one episode: the Actor that samples in an engine and learns by a writer.

    Invariant: between two calls it holds at most one adapter in the engine. Revision 0 is shared by all
    episodes and needs none.
    """

    def __init__(
        self,
        policy: Policy,
        writer: AsyncWriter,
        preservation: Preservation | None,
        spec: EpisodeSpec,
        basis_id: str,
    ) -> None:
        self.version: PolicyVersion = policy.version
        self.own_prompt = spec.task.system_prompt  # in the place of the environment's system prompt
        self.weights = FastWeights(basis_id=basis_id, revision=0, b={})
        self.revisions: list[FastWeights] = []
        self.seconds: dict[_Phase, float] = {"act": 0.0, "extract": 0.0, "write": 0.0, "install": 0.0}
        self._policy = policy
        self._writer = writer
        self._spec = spec
        self._events = 0  # generations so far: each has its own seed
        self._writes = 0  # so far: each has its own seed
        self._preservation = preservation
        self._installed: list[AdapterKey] = []

    async def sample(self, prompt_ids: Sequence[int], kind: SpanKind, max_tokens: int) -> Generation:
        """Raises EngineError."""
        if self._policy.version != self.version:
            raise EngineError(
                f"episode {self._spec.episode_id} began on policy version {self.version} "
                f"and the engine is at {self._policy.version}: let its episodes end before a refresh"
            )
        seed = derived_seed(self._spec.seed, self._events)
        sampling = Sampling(self._spec.temperature_of(kind), max_tokens, seed, kind)
        self._events += 1
        started = time.perf_counter()
        generation = await self._policy.generate(prompt_ids, sampling, self._key(self.weights))
        self.seconds[kind] += time.perf_counter() - started
        return generation

    async def learn(
        self, examples: Sequence[WriteExample], cards: Sequence[Flashcard]
    ) -> tuple[WriteRequest, WriteResult]:
        """Raises WriterError, EngineError, ReceiptError."""
        started = time.perf_counter()
        # The task's seed: siblings who write the same then get the same, and what differs is what they wrote.
        seed = derived_seed(self._spec.task.seed, "write", self._writes)
        self._writes += 1
        preserving = self._preservation
        preserved = await preserving.replies(cards, self.own_prompt) if preserving else ()
        request = WriteRequest(self._spec.episode_id, self.weights, tuple(examples), preserved, seed)
        result = await self._writer.write(request)
        written = time.perf_counter()
        self.seconds["write"] += written - started
        if result.outcome == "accepted":
            await self.adopt(result.weights, result.probe)
            self.seconds["install"] += time.perf_counter() - written
        return request, result

    async def adopt(self, weights: FastWeights, probe: Probe | None) -> None:
        """Act under ``weights`` from now on: those of a write, or of an earlier conversation.

        ``weights`` is not revision 0. Raises EngineError, ReceiptError.
        """
        outdated = list(self._installed)
        key = self._key(weights)
        self._installed.append(key)  # before the install: an install that fails half-way is released too
        await self._policy.install(key, weights, probe)
        self.weights = weights
        self.revisions.append(weights)
        if outdated:
            await self._policy.release(outdated)
            self._installed = [key]

    async def close(self) -> None:
        """Set B back to 0: the engine forgets what this episode wrote."""
        keys, self._installed = self._installed, []
        if keys:
            await self._policy.release(keys)

    def _key(self, weights: FastWeights) -> AdapterKey:
        return AdapterKey(self.version, self._spec.episode_id, weights.revision)


async def play_episode(
    spec: EpisodeSpec,
    session: HostedSession,
    policy: Policy,
    writer: AsyncWriter,
    chat: ChatFormat,
    memory: Memory,
    basis_id: str,
    preservation: Preservation | None,
) -> Played:
    """Play ``spec.task`` to its end, in a new ``session``, which the caller closes.

    Raises TaskError, MemoryFault, EngineError, ReceiptError, WriterError. In every case, errors and
    cancellation included, the engine keeps no adapter of the episode.
    """
    started = time.perf_counter()
    actor = LiveActor(policy, writer, preservation, spec, basis_id)
    await session.start()
    actor.own_prompt = session.own_prompt
    agent = Agent(actor, session.told_tools(chat), session.system_prompt, session.question)
    try:
        stop_reason = await play(agent, session, memory, spec.max_answer_tokens, spec.max_turns)
    finally:
        await actor.close()
    return Played(spec, session, actor, agent, memory, stop_reason, started)


async def score_episode(played: Played) -> Trajectory:
    """Ask the session for its outcome. Raises TaskError, MemoryFault."""
    spec, actor, agent, memory = played.spec, played.actor, played.agent, played.memory
    outcome = await played.session.outcome()
    events = events_of(memory, spec.task.id)
    if played.session.cleaned:
        events[CLEANED] = played.session.cleaned
    total = time.perf_counter() - played.started
    return Trajectory(
        task=spec.task,
        episode_id=spec.episode_id,
        policy_version=actor.version,
        segments=agent.finish(),
        revisions=tuple(actor.revisions),
        writes=tuple(agent.writes),
        memory_events=events,
        outcome=outcome,
        stop_reason=played.stop_reason,
        timings=Timings(total=total, **actor.seconds, environment=total - sum(actor.seconds.values())),
    )


async def play(
    agent: Agent, session: HostedSession, memory: Memory, max_answer_tokens: int, max_turns: int
) -> StopReason:
    """Run the loop of the paper's algorithm. Raises TaskError, MemoryFault, and what the actor raises.

    The memory decides how a text is taken in, and what happens when the context is full.
    """
    turns = 0
    while (observation := await session.observe()) is not None:
        agent.turn_role = observation.role
        if not observation.wants_action:
            with _owned_by(memory, memory.read, agent, session.task.id):
                await _async("read", memory.read(agent, observation.text))
            continue
        if turns == max_turns:
            return "max_turns"
        agent.turn_tells, agent.turn_stop = observation.tells, observation.stop
        most = min(max_answer_tokens, observation.max_tokens or max_answer_tokens)
        with _owned_by(memory, memory.answer, agent, session.task.id):
            reply = await _async("answer", memory.answer(agent, observation.text, most))
            if not isinstance(reply, str):
                raise TypeError(f"its answer is {type(reply).__name__}, it must be a text")
        if observation.heard is not None:
            await session.heard(observation.heard, Reply(reply, *agent.last_act))
        await session.act(reply)
        turns += 1
    return "done"


def events_of(memory: Memory, task_id: str) -> dict[str, int]:
    """What the memory counted. Raises MemoryFault."""
    with owned(_memory_of(task_id, memory), MemoryFault):
        return {name: int(count) for name, count in memory.events.items()}


def _async(verb: str, given: Awaitable[T]) -> Awaitable[T]:
    """``given`` by a memory, which may be a user's. Raises TypeError where it cannot be awaited."""
    if not inspect.isawaitable(given):
        raise TypeError(f"its {verb} gave {type(given).__name__}, it must be an async function")
    return given


@contextmanager
def _owned_by(memory: Memory, function: Callable[..., object], agent: Agent, task_id: str) -> Iterator[None]:
    """Make a MemoryFault of what the memory raises. What the actor raises below it goes through."""
    actor = type(agent.actor)
    try:
        yield
    except PASSING:
        raise
    except (Exception, SystemExit) as error:
        codes = {frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__)}
        if codes & {actor.sample.__code__, actor.learn.__code__}:
            raise
        raise fault(_memory_of(task_id, memory), error, MemoryFault, function) from error


def _memory_of(task_id: str, memory: Memory) -> str:
    return f"task {task_id}: the memory {type(memory).__name__}"


def derived_seed(seed: int, *path: object) -> int:
    """Return a seed in [0, 2**31) for one event: equal in every process, unrelated to other events' seeds."""
    text = "/".join(str(part) for part in (seed, *path))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") & 0x7FFFFFFF
