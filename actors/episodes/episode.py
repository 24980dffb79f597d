"""One episode: observe, act, and when the context is full extract, write, clear, continue.

    play_episode: session.observe --> memory.read / memory.answer --> LiveActor (engine, writer)  --> Played
    score_episode: session.outcome --> Trajectory

Method: TMEM, arXiv 2606.04536. The two halves are separate because a score may wait for a judge: then the
episode needs no engine slot any more (rollout.py).
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Literal

from actors.environments.base import Environment, Session
from actors.episodes.preservation import Preservation
from actors.memory.base import Agent, Memory
from actors.protocols import AsyncWriter, EngineError, Policy, TaskError
from actors.text.chat_template import ChatFormat
from actors.types import (
    AdapterKey,
    FastWeights,
    Flashcard,
    Generation,
    Outcome,
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

# Threads of their own, since a judge may take minutes: the event loop's few threads are needed by the writer.
_OUTCOMES = ThreadPoolExecutor(max_workers=256, thread_name_prefix="outcome")


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
        answer = kind == "act" and self.answer_temperature is not None
        return self.answer_temperature if answer else self.temperature  # type: ignore[return-value]


@dataclass(frozen=True, slots=True, eq=False)
class Played:
    """An episode that has ended and has no score yet. It needs engine and writer no more."""

    spec: EpisodeSpec
    environment: str
    session: Session
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
        seed = derived_seed(self._spec.seed, "write", self._writes)
        self._writes += 1
        preserved = await self._preservation.replies(cards) if self._preservation else ()
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
    environment: Environment,
    policy: Policy,
    writer: AsyncWriter,
    chat: ChatFormat,
    memory: Memory,
    basis_id: str,
    preservation: Preservation | None,
) -> Played:
    """Play ``spec.task`` to its end. Raises TaskError, EngineError, ReceiptError, WriterError.

    In every case, errors and cancellation included, the engine keeps no adapter of the episode.
    """
    started = time.perf_counter()
    actor = LiveActor(policy, writer, preservation, spec, basis_id)
    session = environment.start(spec.task)
    agent = Agent(actor, chat, environment.system_prompt, session.question)
    try:
        stop_reason = await play(agent, session, memory, spec.max_answer_tokens, spec.max_turns)
    finally:
        await actor.close()
    return Played(spec, environment.name, session, actor, agent, memory, stop_reason, started)


async def score_episode(played: Played) -> Trajectory:
    """Ask the session for its outcome, in a thread. Raises TaskError.

    A caller that gives up the wait does not end the thread: the thread ends with its call.
    """
    spec, actor, agent = played.spec, played.actor, played.agent
    loop = asyncio.get_running_loop()
    outcome = await loop.run_in_executor(_OUTCOMES, played.session.outcome)
    outcome = _in_floats(outcome, f"task {spec.task.id}: the environment {played.environment} gave")
    total = time.perf_counter() - played.started
    return Trajectory(
        task=spec.task,
        episode_id=spec.episode_id,
        policy_version=actor.version,
        segments=agent.finish(),
        revisions=tuple(actor.revisions),
        writes=tuple(agent.writes),
        memory_events=dict(played.memory.events),
        outcome=outcome,
        stop_reason=played.stop_reason,
        timings=Timings(total=total, **actor.seconds, environment=total - sum(actor.seconds.values())),
    )


def _in_floats(outcome: Outcome, gave: str) -> Outcome:
    """Return ``outcome`` with Python's own floats, so that it can be stored as JSON.

    A user's environment may count in NumPy or torch. ``gave`` begins the message. Raises TaskError.
    """

    def number(name: str, value: float) -> float:
        try:
            return float(value)
        except (TypeError, ValueError, RuntimeError):  # the last is raised by a tensor of several numbers
            # name the type: the repr of an array would be many lines
            raise TaskError(f"{gave} {name} as {type(value).__name__}, it must be one number") from None

    def numbers(kind: str, values: Mapping[str, float]) -> dict[str, float]:
        return {name: number(f"the {kind} {name}", value) for name, value in values.items()}

    reward = number("the reward", outcome.reward)
    # A failed episode, not a reward of 0: the siblings would be compared with it.
    if not math.isfinite(reward):
        raise TaskError(f"{gave} the reward {reward}, it must be a finite number")
    parts = numbers("reward part", outcome.reward_parts)
    answers = tuple(replace(answer, scores=numbers("score", answer.scores)) for answer in outcome.answers)
    return Outcome(reward, parts, answers)


async def play(
    agent: Agent, session: Session, memory: Memory, max_answer_tokens: int, max_turns: int
) -> StopReason:
    """Run the loop of the paper's algorithm.

    The memory decides how a text is taken in, and what happens when the context is full.
    """
    turns = 0
    while (observation := session.observe()) is not None:
        if not observation.wants_action:
            await memory.read(agent, observation.text)
            continue
        if turns == max_turns:
            return "max_turns"
        agent.turn_tells = observation.tells
        session.act(await memory.answer(agent, observation.text, max_answer_tokens))
        turns += 1
    return "done"


def derived_seed(seed: int, *path: object) -> int:
    """Return a seed in [0, 2**31) for one event: equal in every process, unrelated to other events' seeds."""
    text = "/".join(str(part) for part in (seed, *path))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") & 0x7FFFFFFF
