"""Trajectory groups with the quickstart's shapes, without an engine: real episode loop, memory, prompts and chat template around a scripted actor.

Only what an engine and a writer would add is drawn from a seed: the log-probs, and each revision's B at the size of a written one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from actors.environments.recall import RecallEnvironment
from actors.episodes.episode import play
from actors.fast_weights.delta import Basis, zero
from actors.memory.base import Agent
from actors.memory.parametric import ParametricMemory
from actors.text.chat_template import ChatFormat
from actors.text.flashcards import render_flashcards
from actors.types import (
    FastWeights,
    Generation,
    PolicyVersion,
    SpanKind,
    Task,
    Timings,
    Trajectory,
    TrajectoryGroup,
    WriteExample,
    WriteResult,
)
from configs.schema import RunConfig

_B_SIZE = 5e-3  # the largest entries of a written B
_NO_TIMES = Timings(total=0, act=0, extract=0, write=0, install=0, environment=0)


def recall_groups(
    model_path: Path, config: RunConfig, basis: Basis, tasks: int, group_size: int
) -> tuple[TrajectoryGroup, ...]:
    """``tasks`` groups of ``group_size`` siblings each, the same for the same arguments."""
    from transformers import AutoTokenizer

    chat = ChatFormat(AutoTokenizer.from_pretrained(model_path))
    environment = RecallEnvironment(config.environment.recall)
    stream = environment.tasks("train", config.seed, 0)
    return tuple(_group(next(stream), group_size, environment, chat, config, basis) for _ in range(tasks))


def without_deltas(groups: Sequence[TrajectoryGroup]) -> tuple[TrajectoryGroup, ...]:
    """The very same tokens, rewards and log-probs, every segment under Delta = 0."""
    return tuple(
        replace(group, trajectories=tuple(_bare(one) for one in group.trajectories)) for group in groups
    )


def shared_prefix_fraction(groups: Sequence[TrajectoryGroup]) -> float:
    """Share of all tokens that an earlier row of the same group, under the same revision-0 weights, starts with: what prefix sharing could save."""
    shared = total = 0
    for group in groups:
        seen: list[tuple[int, ...]] = []
        for one in group.trajectories:
            for segment in one.segments:
                ids = tuple(int(token) for token in segment.token_ids)
                total += len(ids)
                if segment.revision == 0:  # a later revision is its episode's own, so its hidden states are
                    shared += max((_common(ids, other) for other in seen), default=0)
                    seen.append(ids)
    return shared / total


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    for place, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return place
    return min(len(one), len(other))


def _bare(one: Trajectory) -> Trajectory:
    return replace(
        one, segments=tuple(replace(segment, revision=0) for segment in one.segments), revisions=()
    )


def _group(
    task: Task, size: int, environment: RecallEnvironment, chat: ChatFormat, config: RunConfig, basis: Basis
) -> TrajectoryGroup:
    siblings = tuple(_trajectory(task, number, environment, chat, config, basis) for number in range(size))
    return TrajectoryGroup(task, 0, siblings, (), "bench")


def _trajectory(
    task: Task, number: int, environment: RecallEnvironment, chat: ChatFormat, config: RunConfig, basis: Basis
) -> Trajectory:
    session = environment.start(task)
    actor = _Actor(task, number, environment, chat, basis)
    agent = Agent(actor, chat, environment.system_prompt, session.question)
    memory = ParametricMemory(config.memory, config.write)
    stop = asyncio.run(
        play(
            agent,
            session,
            memory,
            config.sampling.max_answer_tokens,
            max_turns=len(task.payload["questions"]),
        )
    )
    segments, revisions = agent.finish(), tuple(actor.revisions)
    return Trajectory(
        task,
        f"{task.id}/{number}",
        0,
        segments,
        revisions,
        tuple(agent.writes),
        {},
        session.outcome(),
        stop,
        _NO_TIMES,
    )


class _Actor:
    """Writes the gold flashcards, or all but one, and gives the right answer or that to another question: siblings differ, as sampled ones do."""

    version: PolicyVersion = 0

    def __init__(
        self, task: Task, number: int, environment: RecallEnvironment, chat: ChatFormat, basis: Basis
    ) -> None:
        self.weights = zero(basis)
        self.revisions: list[FastWeights] = []
        self._task, self._environment, self._chat, self._basis = task, environment, chat, basis
        self._rng = np.random.default_rng([task.seed, number])
        self._choices = np.random.default_rng(
            [task.seed, number, 1]
        )  # apart, so that rewards do not depend on a model's sizes or tokens
        self._asked = 0

    async def sample(self, prompt_ids: Sequence[int], kind: SpanKind, max_tokens: int) -> Generation:
        text = self._answer() if kind == "act" else self._flashcards(prompt_ids)
        ids = self._chat.reply(text)[:max_tokens]
        logprobs = tuple(-self._rng.exponential(0.5, len(ids)))
        return Generation(ids, logprobs, "stop" if ids[-1] in self._chat.stop_token_ids else "length")

    async def learn(self, examples: Sequence[WriteExample]) -> WriteResult:
        revision = self.weights.revision + 1
        sizes = self._basis.d_out
        b = {
            name: self._rng.normal(0, _B_SIZE / 3, (rows, self._basis.rank)).astype(np.float32)
            for name, rows in sizes.items()
        }
        self.weights = FastWeights(self._basis.id, revision, b)
        self.revisions.append(self.weights)
        return WriteResult(
            self.weights,
            None,
            loss_before=0.0,
            loss_after=0.0,
            steps=0,
            seconds=0.0,
            outcome="accepted",
            reason="",
        )

    def _answer(self) -> str:
        questions = self._task.payload["questions"]
        right = questions[self._asked]["answer"]
        wrong = questions[(self._asked + 1) % len(questions)]["answer"]
        self._asked += 1
        return str(right if self._choices.random() < 0.5 else wrong)

    def _flashcards(self, prompt_ids: Sequence[int]) -> str:
        cards = self._environment.demonstrate_flashcards(
            self._task, self._chat.decode(prompt_ids), question_blind=False
        )
        if len(cards) > 1 and self._choices.random() < 0.5:
            cards = cards[:-1]
        return render_flashcards(cards)
