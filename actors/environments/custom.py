"""A user's own environment, and a user's own reward on any environment. Both are named in the configuration as ``package.module:name``."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from actors.environments.base import Demonstrator, Environment, Observation, Session, Split, prepare
from actors.protocols import TaskError
from actors.types import Flashcard, Outcome, Task
from configs.extensions import load_extension, require_members
from configs.schema import EnvironmentConfig

Reward = Callable[[Task, Outcome], float]
_MEMBERS = ("name", "system_prompt", "tasks", "start")


def custom_environment(config: EnvironmentConfig) -> Environment:
    """What ``config.custom`` returns when it is called with ``config.options``. Raises ExtensionError, and what that call raises."""
    setting = "environment.custom"
    made: Environment = load_extension(setting, config.custom)(config.options)
    require_members(setting, config.custom, made, _MEMBERS, "Environment in actors/environments/base.py")
    return made


def rewarded(environment: Environment, path: str) -> Environment:
    """``environment`` with the reward that ``path`` names instead of its own, which becomes the part "environment". Raises ExtensionError."""
    reward: Reward = load_extension("environment.reward", path)
    if hasattr(environment, "demonstrate_flashcards"):
        return _RewardedDemonstrator(environment, reward, path)
    return _Rewarded(environment, reward, path)


@dataclass(frozen=True, slots=True)
class _Rewarded:
    inner: Environment
    reward: Reward
    path: str

    @property
    def name(self) -> str:
        return self.inner.name

    @property
    def system_prompt(self) -> str:
        return self.inner.system_prompt

    def prepare(self) -> None:
        prepare(self.inner)

    def tasks(self, split: Split, seed: int, start: int) -> Iterator[Task]:
        return self.inner.tasks(split, seed, start)

    def start(self, task: Task) -> Session:
        return _RewardedSession(self.inner.start(task), task, self.reward, self.path)


@dataclass(frozen=True, slots=True)
class _RewardedDemonstrator(_Rewarded):
    def demonstrate_flashcards(
        self, task: Task, text_in_context: str, question_blind: bool
    ) -> tuple[Flashcard, ...]:
        inner: Demonstrator = self.inner  # type: ignore[assignment]  # asked for in `rewarded`
        return inner.demonstrate_flashcards(task, text_in_context, question_blind)


@dataclass(frozen=True, slots=True)
class _RewardedSession:
    inner: Session
    task: Task
    reward: Reward
    path: str

    @property
    def question(self) -> str:
        return self.inner.question

    def observe(self) -> Observation | None:
        return self.inner.observe()

    def act(self, text: str) -> None:
        self.inner.act(text)

    def outcome(self) -> Outcome:
        """Raises TaskError where the user's function raises, or returns no number: the episode fails and is counted, and others go on."""
        outcome = self.inner.outcome()
        try:
            value = float(self.reward(self.task, outcome))
        except Exception as error:
            raise TaskError(
                f"task {self.task.id}: environment.reward={self.path} raised {type(error).__name__}: {error}"
            ) from error
        if not math.isfinite(value):
            raise TaskError(
                f"task {self.task.id}: environment.reward={self.path} returned {value}: a reward is a finite number"
            )
        return replace(
            outcome, reward=value, reward_parts={**outcome.reward_parts, "environment": outcome.reward}
        )
