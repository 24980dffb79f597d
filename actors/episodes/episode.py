"""One episode: observe, act, and when the context is full extract, write, clear, continue (TMEM, arXiv 2606.04536)."""

from __future__ import annotations

import asyncio
import hashlib
import math
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Literal

from actors.environments.base import Environment, Session
from actors.memory.base import Agent, Memory
from actors.protocols import AsyncWriter, EngineError, Policy, TaskError
from actors.text.chat_template import ChatFormat
from actors.types import (
    AdapterKey,
    FastWeights,
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

_OUTCOMES = ThreadPoolExecutor(max_workers=256, thread_name_prefix="outcome")
"""A judge may take its time: other episodes run on the event loop meanwhile, and the loop's own few threads are the writer's."""


@dataclass(frozen=True, slots=True)
class EpisodeSpec:
    """What one episode is: its task, its never-reused id, and how it acts. ``temperature`` 0 is greedy."""

    task: Task
    episode_id: str
    temperature: float
    max_answer_tokens: int
    max_turns: int
    seed: int


@dataclass(frozen=True, slots=True, eq=False)
class Played:
    """An episode that came to its end and has no score yet. Engine and writer are done with it. ``started`` is of time.perf_counter."""

    spec: EpisodeSpec
    environment: str
    session: Session
    actor: LiveActor
    agent: Agent
    memory: Memory
    stop_reason: StopReason
    started: float


class LiveActor:
    """theta + Delta of one episode. Holds at most one adapter in the engine; revision 0 is shared and needs none."""

    def __init__(self, policy: Policy, writer: AsyncWriter, spec: EpisodeSpec, basis_id: str) -> None:
        self.version: PolicyVersion = policy.version
        self.weights = FastWeights(basis_id=basis_id, revision=0, b={})
        self.revisions: list[FastWeights] = []
        self.seconds: dict[Literal["act", "extract", "write", "install"], float] = {
            "act": 0.0,
            "extract": 0.0,
            "write": 0.0,
            "install": 0.0,
        }
        self._policy = policy
        self._writer = writer
        self._spec = spec
        self._events = 0
        self._installed: list[AdapterKey] = []

    async def sample(self, prompt_ids: Sequence[int], kind: SpanKind, max_tokens: int) -> Generation:
        """Raises EngineError."""
        if self._policy.version != self.version:
            raise EngineError(
                f"episode {self._spec.episode_id} began on policy version {self.version} and the engine is at {self._policy.version}: "
                "let its episodes end before a refresh"
            )
        sampling = Sampling(
            self._spec.temperature, max_tokens, derived_seed(self._spec.seed, self._events), kind
        )
        self._events += 1
        started = time.perf_counter()
        generation = await self._policy.generate(prompt_ids, sampling, self._key(self.weights))
        self.seconds[kind] += time.perf_counter() - started
        return generation

    async def learn(self, examples: Sequence[WriteExample]) -> WriteResult:
        """Raises WriterError, EngineError, ReceiptError."""
        started = time.perf_counter()
        result = await self._writer.write(WriteRequest(self._spec.episode_id, self.weights, tuple(examples)))
        written = time.perf_counter()
        self.seconds["write"] += written - started
        if result.outcome == "accepted":
            await self.adopt(result.weights, result.probe)
            self.seconds["install"] += time.perf_counter() - written
        return result

    async def adopt(self, weights: FastWeights, probe: Probe | None) -> None:
        """Act under ``weights`` (not revision 0) from now on: those of a write, or of an earlier conversation. Raises EngineError, ReceiptError."""
        outdated = list(self._installed)
        key = self._key(weights)
        self._installed.append(key)  # before the install: one that fails half-way must be released too
        await self._policy.install(key, weights, probe)
        self.weights = weights
        self.revisions.append(weights)
        if outdated:
            await self._policy.release(outdated)
            self._installed = [key]

    async def close(self) -> None:
        """B back to 0: the engine forgets what this episode wrote."""
        keys, self._installed = self._installed, []
        if keys:
            await self._policy.release(keys)

    def _key(self, weights: FastWeights) -> AdapterKey:
        return AdapterKey(self.version, self._spec.episode_id, weights.revision)


async def run_episode(
    spec: EpisodeSpec,
    environment: Environment,
    policy: Policy,
    writer: AsyncWriter,
    chat: ChatFormat,
    memory: Memory,
    basis_id: str,
) -> Trajectory:
    """Play ``spec.task`` and score it, with no deadline of its own. Raises what the two halves raise."""
    return await score_episode(await play_episode(spec, environment, policy, writer, chat, memory, basis_id))


async def play_episode(
    spec: EpisodeSpec,
    environment: Environment,
    policy: Policy,
    writer: AsyncWriter,
    chat: ChatFormat,
    memory: Memory,
    basis_id: str,
) -> Played:
    """Play ``spec.task`` to its end. Raises TaskError, EngineError, ReceiptError, WriterError; the engine keeps nothing of the episode either way."""
    started = time.perf_counter()
    actor = LiveActor(policy, writer, spec, basis_id)
    session = environment.start(spec.task)
    agent = Agent(actor, chat, environment.system_prompt, session.question)
    try:
        stop_reason = await play(agent, session, memory, spec.max_answer_tokens, spec.max_turns)
    finally:
        await actor.close()
    return Played(spec, environment.name, session, actor, agent, memory, stop_reason, started)


async def score_episode(played: Played) -> Trajectory:
    """Ask the session for its outcome, in a thread. Giving up the wait leaves the thread to its end. Raises TaskError."""
    spec, actor, agent = played.spec, played.actor, played.agent
    outcome = _in_numbers(
        await asyncio.get_running_loop().run_in_executor(_OUTCOMES, played.session.outcome),
        spec.task,
        played.environment,
    )
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


def _in_numbers(outcome: Outcome, task: Task, environment: str) -> Outcome:
    """``outcome`` with Python's own floats, whatever a user's environment counts in (NumPy, torch): it is kept as JSON. Raises TaskError."""

    def number(name: str, value: float) -> float:
        try:
            return float(value)
        except (
            TypeError,
            ValueError,
            RuntimeError,
        ):  # a tensor of several raises the last; an array's repr would be many lines
            raise TaskError(
                f"task {task.id}: the environment {environment} gave {name} as {type(value).__name__}, it must be one number"
            ) from None

    reward = number("the reward", outcome.reward)
    if not math.isfinite(reward):  # never trained on, and never a 0: the siblings would be compared with it
        raise TaskError(
            f"task {task.id}: the environment {environment} gave the reward {reward}, it must be a finite number"
        )
    parts = {name: number(f"the reward part {name}", part) for name, part in outcome.reward_parts.items()}
    answers = tuple(
        replace(
            answer, scores={name: number(f"the score {name}", score) for name, score in answer.scores.items()}
        )
        for answer in outcome.answers
    )
    return Outcome(reward, parts, answers)


async def play(
    agent: Agent, session: Session, memory: Memory, max_answer_tokens: int, max_turns: int
) -> StopReason:
    """The loop of the paper's algorithm; how a text is taken in and what happens when the context is full is the memory's."""
    turns = 0
    while (observation := session.observe()) is not None:
        if not observation.wants_action:
            await memory.read(agent, observation.text)
            continue
        if turns == max_turns:
            return "max_turns"
        session.act(await memory.answer(agent, observation.text, max_answer_tokens))
        turns += 1
    return "done"


def derived_seed(seed: int, *path: object) -> int:
    """A seed in [0, 2**31) for one event, the same in every process and unrelated to its neighbours'."""
    text = "/".join(str(part) for part in (seed, *path))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") & 0x7FFFFFFF
