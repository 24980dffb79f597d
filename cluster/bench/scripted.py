"""Scripted stand-ins for what the base model cannot do: write flashcards that parse, and answer right.

ScriptedPolicy   the engine samples as many tokens as the script has, and the script is handed back
ScriptedSide     Engram's engine and rollouts under a script
recall_groups    trajectory groups with the quickstart's shapes, without an engine
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

import configs
from actors.environments.base import Environment
from actors.environments.recall import RecallEnvironment
from actors.episodes.episode import play
from actors.episodes.hosted_session import HostedSession
from actors.fast_weights.delta import Basis, zero
from actors.memory.base import Agent
from actors.memory.parametric import ParametricMemory
from actors.protocols import Policy
from actors.text.chat_template import ChatFormat, open_chat
from actors.text.flashcards import render_flashcards
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
    TrajectoryGroup,
    WriteExample,
    WriteRequest,
    WriteResult,
)
from configs.schema import ModelConfig, RunConfig

if TYPE_CHECKING:
    from actors.episodes.rollout import Rollout

Script = Callable[[Sequence[int], Sampling, AdapterKey], tuple[int, ...] | None]
"""The tokens that are to be sampled for a request; None leaves the request to the engine."""

QUICKSTART = Path(configs.__file__).parent / "quickstart.yaml"
_B_SIZE = 5e-3  # the largest entries of a written B
_NO_TIMES = Timings(total=0, act=0, extract=0, write=0, install=0, environment=0)


class ScriptedPolicy:
    """A Policy with scripted samples: time and log-probs are the engine's, tokens the script's."""

    def __init__(self, policy: Policy, script: Script) -> None:
        self._policy, self._script = policy, script

    @property
    def version(self) -> PolicyVersion:
        return self._policy.version

    async def generate(
        self, prompt_ids: Sequence[int], sampling: Sampling, adapter: AdapterKey
    ) -> Generation:
        script = self._script(prompt_ids, sampling, adapter)
        if script is None:
            return await self._policy.generate(prompt_ids, sampling, adapter)
        as_long = replace(sampling, max_tokens=len(script))
        generation = await self._policy.generate(prompt_ids, as_long, adapter)
        return Generation(script, generation.logprobs, "stop")

    async def install(self, key: AdapterKey, weights: FastWeights, probe: Probe | None) -> None:
        await self._policy.install(key, weights, probe)

    async def release(self, keys: Sequence[AdapterKey]) -> None:
        await self._policy.release(keys)


class ScriptedSide:
    """Engram's engine and rollouts on it, as actors/worker.py builds them, under a script."""

    def __init__(
        self,
        config: RunConfig,
        model_path: Path,
        basis: Basis,
        chat: ChatFormat,
        environment: Environment,
        script: Script,
    ) -> None:
        from actors.engine.policy import VLLMPolicy

        self._config, self._basis, self._chat, self._environment = config, basis, chat, environment
        stop: tuple[int, ...] = ()  # every request samples the number of tokens that it is given
        threads = config.rollout.threads
        self.engine = VLLMPolicy(
            model_path, config.model, config.engine, basis, stop, 0, threads, config.seed
        )
        self._policy = ScriptedPolicy(self.engine, script)

    def rollout(self) -> Rollout:
        """A rollout with a new writer, which has read no flashcards."""
        from actors.episodes.rollout import Rollout
        from actors.memory.build import surroundings

        config = self._config
        window, answer_tokens = config.engine.max_model_tokens, config.sampling.max_answer_tokens
        return Rollout(
            self._policy,
            self.engine.writer(config.write),
            self._environment,
            self._chat,
            config.write,
            config.rollout,
            config.engine.slots,
            surroundings(window, answer_tokens, config.embedder),
            self._basis.id,
            "bench",
        )


def read_chat(model_path: Path) -> ChatFormat:
    return open_chat(model_path, ModelConfig())


# --- groups without an engine -----------------------------------------------------------------------------


def recall_groups(
    model_path: Path, config: RunConfig, basis: Basis, tasks: int, group_size: int
) -> tuple[TrajectoryGroup, ...]:
    """``tasks`` groups of ``group_size`` siblings each, the same for the same arguments.

    Episode loop, memory, prompts and chat template are real. What an engine and a writer would add is drawn
    from a seed: the log-probs, and each revision's B at the size of a written B.
    """
    chat = read_chat(model_path)
    environment = RecallEnvironment(config.environment.recall)
    stream = environment.tasks("train", config.seed, 0)

    def group(task: Task) -> TrajectoryGroup:
        actors = [ScriptedActor(task, number, environment, chat, basis) for number in range(group_size)]
        return TrajectoryGroup(task, 0, tuple(_played(actor, config) for actor in actors), (), "bench")

    return tuple(group(next(stream)) for _ in range(tasks))


class ScriptedActor:
    """Plays one sibling of a recall task.

    It writes the gold flashcards or all but one, and gives the right answer or another question's. So
    siblings differ, as sampled ones do.
    """

    version: PolicyVersion = 0

    def __init__(
        self, task: Task, number: int, environment: RecallEnvironment, chat: ChatFormat, basis: Basis
    ) -> None:
        self.task, self.number, self.environment, self.chat = task, number, environment, chat
        self.weights = zero(basis)
        self.revisions: list[FastWeights] = []
        self._basis = basis
        self._numbers = np.random.default_rng([task.seed, number])
        # A generator of its own: rewards must not depend on a model's sizes or tokens.
        self._choices = np.random.default_rng([task.seed, number, 1])
        self._questions_asked = 0

    async def sample(self, prompt_ids: Sequence[int], kind: SpanKind, max_tokens: int) -> Generation:
        text = self._answer() if kind == "act" else self._flashcards(prompt_ids)
        ids = self.chat.reply(text)[:max_tokens]
        logprobs = tuple(-self._numbers.exponential(0.5, len(ids)))
        return Generation(ids, logprobs, "stop" if ids[-1] in self.chat.stop_token_ids else "length")

    async def learn(
        self, examples: Sequence[WriteExample], cards: Sequence[Flashcard]
    ) -> tuple[WriteRequest, WriteResult]:
        b = {
            name: self._numbers.normal(0, _B_SIZE / 3, (rows, self._basis.rank)).astype(np.float32)
            for name, rows in self._basis.d_out.items()
        }
        self.weights = FastWeights(self._basis.id, self.weights.revision + 1, b)
        self.revisions.append(self.weights)
        request = WriteRequest(self.task.id, self.weights, tuple(examples))
        return request, WriteResult(
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
        questions = self.task.payload["questions"]
        right = questions[self._questions_asked]["answer"]
        wrong = questions[(self._questions_asked + 1) % len(questions)]["answer"]
        self._questions_asked += 1
        return str(right if self._choices.random() < 0.5 else wrong)

    def _flashcards(self, prompt_ids: Sequence[int]) -> str:
        text = self.chat.decode(prompt_ids)
        cards = self.environment.demonstrate_flashcards(self.task, text, question_blind=False)
        if len(cards) > 1 and self._choices.random() < 0.5:
            cards = cards[:-1]
        return render_flashcards(cards)


def _played(actor: ScriptedActor, config: RunConfig) -> Trajectory:
    task, environment = actor.task, actor.environment
    memory = ParametricMemory(config.memory, config.write, config.engine.max_model_tokens)

    async def played() -> tuple[Agent, StopReason, Outcome]:
        session = HostedSession(environment, task, config.rollout.environment_timeout_s)
        await session.start()
        agent = Agent(actor, actor.chat, session.system_prompt, session.question)
        turns = len(task.payload["questions"])
        stop = await play(agent, session, memory, config.sampling.max_answer_tokens, max_turns=turns)
        outcome = await session.outcome()
        await session.close()
        return agent, stop, outcome

    agent, stop, outcome = asyncio.run(played())
    segments, revisions = agent.finish(), tuple(actor.revisions)
    return Trajectory(
        task,
        f"{task.id}/{actor.number}",
        0,
        segments,
        revisions,
        tuple(agent.writes),
        {},
        outcome,
        stop,
        _NO_TIMES,
    )


def without_deltas(groups: Sequence[TrajectoryGroup]) -> tuple[TrajectoryGroup, ...]:
    """The same tokens, rewards and log-probs, with every segment under Delta = 0."""

    def bare(trajectory: Trajectory) -> Trajectory:
        segments = tuple(replace(segment, revision=0) for segment in trajectory.segments)
        return replace(trajectory, segments=segments, revisions=())

    return tuple(replace(group, trajectories=tuple(map(bare, group.trajectories))) for group in groups)
