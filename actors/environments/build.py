"""Builds an environment from the configuration: a shipped one or a user's own, with the user's own reward.

``environment.custom`` and ``environment.reward`` name the user's code as ``package.module:name``. With
``environment.reward_weights`` the reward is a weighted sum of the outcome's named parts.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from actors.environments.base import (
    Abstainer,
    Attributor,
    Demonstrator,
    Environment,
    Exchange,
    Questioner,
    Rephraser,
    Session,
    Split,
    part_of,
    prepare,
)
from actors.environments.user_calls import CallThread, Raised, run_apart
from actors.protocols import TaskError
from actors.types import CardUse, Flashcard, Outcome, Task
from configs.ecosystem import ADAPTERS
from configs.schema import EmbedderConfig, EnvironmentConfig
from configs.user_code import ExtensionError, load_extension, owned, require_members

Reward = Callable[[Task, Outcome], Any]  # a number or named parts, or an awaitable of these
_AT_ONCE = ("recall", "records")  # shipped environments whose sessions only compute
_MEMBERS = ("name", "system_prompt", "tasks", "start")


def build_environment(config: EnvironmentConfig, embedder: EmbedderConfig) -> Environment:
    """Build the environment named ``config.name``, with the reward that ``config`` makes, if it makes one.

    ``embedder`` is loaded only by an environment that searches by meaning.
    Raises TaskError, ExtensionError or ValueError when its settings or its files cannot be used.
    """
    if config.mix:
        from actors.environments.mixture import Mixed, mixed
        from configs.mixture import members

        return mixed(
            [
                Mixed(each.name, each.share, build_environment(each.environment, embedder))
                for each in members(config)
            ]
        )
    environment = _adapter(config) if config.name in ADAPTERS else _named(config, embedder)
    return _with_reward(environment, config) if config.makes_reward else environment


def answers_at_once(environment: Environment) -> bool:
    """Whether its sessions never wait: their calls need no thread. True of some shipped ones alone."""
    inner: Any = environment.inner if isinstance(environment, _Rewarded) else environment
    kind = type(inner)
    return kind.__module__ in {f"actors.environments.{name}" for name in _AT_ONCE}


def _named(config: EnvironmentConfig, embedder: EmbedderConfig) -> Environment:
    if config.name == "recall":
        from actors.environments.recall import RecallEnvironment

        return RecallEnvironment(config.recall)
    if config.name == "rubric":
        from actors.environments.rubric import RubricEnvironment

        return RubricEnvironment(config.rubric)
    if config.name == "search":
        from actors.environments.search import SearchEnvironment
        from actors.text.retrieval import load_embedder

        return SearchEnvironment(config.search, partial(load_embedder, embedder))
    if config.name == "records":
        from actors.environments.records import RecordsEnvironment

        return RecordsEnvironment(config.records)
    if config.name == "harness":
        from actors.environments.harness import HarnessEnvironment

        harness: Any = HarnessEnvironment(config.harness)  # its sessions start and wait as coroutines
        return harness
    if config.name == "mcp":
        from actors.environments.mcp_tools import McpEnvironment

        return McpEnvironment(config.mcp)
    if config.name == "custom":
        return _custom(config)
    from actors.environments.conversation import ConversationEnvironment

    return ConversationEnvironment(config.conversation)


def _adapter(config: EnvironmentConfig) -> Environment:
    if config.name == "gymnasium":
        from actors.environments.ecosystem.gymnasium import GymnasiumEnvironment

        return GymnasiumEnvironment(config.gymnasium)
    if config.name == "textarena":
        from actors.environments.ecosystem.textarena import TextArenaEnvironment

        return TextArenaEnvironment(config.textarena)
    if config.name == "openenv":
        from actors.environments.ecosystem.openenv import OpenEnvEnvironment

        return OpenEnvEnvironment(config.openenv)
    from actors.environments.ecosystem.verifiers import VerifiersEnvironment

    verifiers: Any = VerifiersEnvironment(config.verifiers)  # its sessions are of coroutines
    return verifiers


def _custom(config: EnvironmentConfig) -> Environment:
    """Call ``config.custom`` with ``config.options``. Raises ExtensionError, TaskError."""
    setting = "environment.custom"
    build = load_extension(setting, config.custom)
    with owned(f"{setting}={config.custom}", TaskError, build, passing=(ExtensionError,)):
        environment: Environment = build(config.options)
    contract = "Environment in actors/environments/base.py"
    require_members(setting, config.custom, environment, _MEMBERS, contract)
    return environment


def _with_reward(environment: Environment, config: EnvironmentConfig) -> Environment:
    """Replace the environment's reward by a function's, or by a sum of parts. Raises ExtensionError.

    The environment's own reward becomes the part "environment" of the outcome.
    """
    path = config.reward
    reward: Reward = load_extension("environment.reward", path) if path else _no_more_parts
    parts = tuple(part for kind, part in _OPTIONAL.items() if isinstance(environment, kind))
    # A class for just these parts, so that the wrapper has those of the environment and no others.
    wrapper: type[_Rewarded] = (
        type("_Rewarded", (*parts, _Rewarded), {"__slots__": ()}) if parts else _Rewarded
    )
    return wrapper(environment, reward, path, config.reward_weights)


def _no_more_parts(task: Task, outcome: Outcome) -> Mapping[str, float]:
    return {}


@dataclass(frozen=True, slots=True)
class _Rewarded:
    inner: Any  # an Environment, maybe with optional parts
    reward: Reward
    path: str
    weights: Mapping[str, float]

    @property
    def name(self) -> str:
        return str(self.inner.name)

    @property
    def system_prompt(self) -> str:
        return str(self.inner.system_prompt)

    def prepare(self) -> None:
        prepare(self.inner)

    def tasks(self, split: Split, seed: int, start: int) -> Iterator[Task]:
        inner: Environment = self.inner
        return inner.tasks(split, seed, start)

    def start(self, task: Task) -> Any:
        session = self.inner.start(task)
        return self._started(session, task) if inspect.isawaitable(session) else self._rewarded(session, task)

    async def _started(self, session: Awaitable[Session], task: Task) -> _RewardedSession:
        return self._rewarded(await session, task)

    def _rewarded(self, session: Session, task: Task) -> _RewardedSession:
        return _RewardedSession(session, task, self.reward, self.path, self.weights)


class _Demonstrates(_Rewarded):
    __slots__ = ()

    def demonstrate_flashcards(
        self, task: Task, text_in_context: str, question_blind: bool
    ) -> tuple[Flashcard, ...]:
        inner: Demonstrator = self.inner
        return inner.demonstrate_flashcards(task, text_in_context, question_blind)


class _Rephrases(_Rewarded):
    __slots__ = ()

    def wordings(self, question: str) -> tuple[str, ...]:
        inner: Rephraser = self.inner
        return inner.wordings(question)


class _Abstains(_Rewarded):
    __slots__ = ()

    def demonstrate_unknown(self, task: Task) -> tuple[Exchange, Exchange]:
        inner: Abstainer = self.inner
        return inner.demonstrate_unknown(task)


class _Questions(_Rewarded):
    __slots__ = ()

    def other_questions(self, count: int, seed: int) -> tuple[str, ...]:
        inner: Questioner = self.inner
        return inner.other_questions(count, seed)

    def questions_beside(self, card: Flashcard, known: Sequence[str]) -> tuple[str, ...]:
        inner: Questioner = self.inner
        return inner.questions_beside(card, known)


class _Attributes(_Rewarded):
    __slots__ = ()

    def use_of(self, task: Task, card: Flashcard) -> CardUse:
        inner: Attributor = self.inner
        return inner.use_of(task, card)

    def questions_told(self, task: Task, text: str) -> tuple[int, ...]:
        inner: Attributor = self.inner
        return inner.questions_told(task, text)


_OPTIONAL: dict[type, type[_Rewarded]] = {
    Demonstrator: _Demonstrates,
    Rephraser: _Rephrases,
    Abstainer: _Abstains,
    Questioner: _Questions,
    Attributor: _Attributes,
}


@dataclass(frozen=True, slots=True)
class _RewardedSession:
    """The inner session with another reward. Sync or async, as the session and the reward are."""

    inner: Any  # a Session
    task: Task
    reward: Reward
    path: str
    weights: Mapping[str, float]

    @property
    def question(self) -> str:
        return str(self.inner.question)

    @property
    def system_prompt(self) -> Any:
        return part_of(self.inner, "system_prompt", "")

    @property
    def tools(self) -> Any:
        return part_of(self.inner, "tools", ())

    def observe(self) -> Any:
        return self.inner.observe()

    def act(self, text: str) -> Any:
        return self.inner.act(text)

    def outcome(self) -> Any:
        """Raises TaskError for a fault of the user's function, and an unknown part: that episode fails."""
        outcome = self.inner.outcome()
        if inspect.isawaitable(outcome):
            return self._outcome_later(outcome)
        value = self._call(outcome)
        return self._awaited(outcome, value) if inspect.isawaitable(value) else self._with(outcome, value)

    def close(self) -> Any:
        close = getattr(self.inner, "close", None)
        return close() if callable(close) else None

    async def _outcome_later(self, outcome: Awaitable[Outcome]) -> Outcome:
        scored = await outcome
        thread = CallThread(f"reward of {self.task.id}")  # a sync reward may wait
        try:
            value = await run_apart(self._call, (scored,), thread)
        finally:
            thread.end()
        with owned(self._whom, TaskError, self.reward):
            if isinstance(value, Raised):
                raise value.error
        return self._with(scored, value)

    def _call(self, outcome: Outcome) -> Any:
        with owned(self._whom, TaskError, self.reward):
            return self.reward(self.task, outcome)

    async def _awaited(self, outcome: Outcome, value: Awaitable[float]) -> Outcome:
        with owned(self._whom, TaskError, self.reward):
            reward = await value
        return self._with(outcome, reward)

    def _with(self, outcome: Outcome, value: Any) -> Outcome:
        """``outcome`` with the reward that the function's ``value`` makes."""
        with owned(self._whom, TaskError, self.reward):
            named = isinstance(value, Mapping)
            own = {str(name): float(part) for name, part in value.items()} if named else {"": float(value)}
        for name, part in own.items():
            if not math.isfinite(part):
                shown = f"{name}={part}" if name else str(part)
                raise TaskError(f"{self._whom} returned {shown}: a reward is a finite number")
        parts = {**outcome.reward_parts, "environment": outcome.reward}
        if not named and not self.weights:
            return replace(outcome, reward=own[""], reward_parts=parts)
        function = self.path.rpartition(":")[2]
        parts |= own if named else {function: own[""]}
        return replace(outcome, reward=self._sum(parts), reward_parts=parts)

    def _sum(self, parts: Mapping[str, Any]) -> float:
        """The weighted sum. Raises TaskError where a part is not there."""
        have, setting = ", ".join(sorted(parts)), "environment.reward_weights"
        if not self.weights:
            raise TaskError(f"{self._whom} returned named parts: say in {setting} what each weighs; {have}")
        if missing := ", ".join(name for name in self.weights if name not in parts):
            raise TaskError(f"task {self.task.id}: {setting} names {missing}; the outcome has {have}")
        with owned(self._whom, TaskError):
            return sum(float(weight) * float(parts[name]) for name, weight in self.weights.items())

    @property
    def _whom(self) -> str:
        setting = f"environment.reward={self.path}" if self.path else "environment.reward_weights"
        return f"task {self.task.id}: {setting}"
