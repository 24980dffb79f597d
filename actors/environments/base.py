"""What a task source is. An environment is built once per process from its config; a session is one episode's single-use view of a task.

env.prepare()             ->  if it has it: once in every rollout worker, before its first episode; whoever only lists tasks does not call it
env.tasks("train", seed)  ->  endless (or finite, repeatable) iterator of Task, the same for the same seed
session = env.start(task)
while (observation := session.observe()) is not None:
    if observation.wants_action: session.act(text)      # text of the policy, decoded, without the stop token
session.outcome()
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from actors.types import Flashcard, Outcome, Task

Split = Literal["train", "eval"]


@dataclass(frozen=True, slots=True)
class Observation:
    """A user turn for the agent. After one with ``wants_action`` the next call of the session is ``act``."""

    text: str
    wants_action: bool


class Session(Protocol):
    @property
    def question(self) -> str:
        """What the episode is about: shown to the extraction prompt unless the memory is question-blind."""
        ...

    def observe(self) -> Observation | None:
        """The next observation, None when the episode is over."""
        ...

    def act(self, text: str) -> None: ...

    def outcome(self) -> Outcome:
        """Reward and answers; only after ``observe`` returned None (or the turn limit ended the episode: unanswered questions score 0)."""
        ...


class Environment(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def system_prompt(self) -> str: ...

    def tasks(self, split: Split, seed: int, start: int) -> Iterator[Task]:
        """Tasks from position ``start`` on; position and seed alone determine a task, so a resumed run goes on where it was."""
        ...

    def start(self, task: Task) -> Session: ...


@runtime_checkable
class Preparer(Protocol):
    """What an environment adds whose first episode needs something that takes long to make, such as an index: an episode has a deadline.

    Optional: an environment without it is started as it is.
    """

    def prepare(self) -> None:
        """Make it now. Blocks, under ``ray.startup_timeout_s``. Raises TaskError."""
        ...


def prepare(environment: Environment) -> None:
    """Raises what its ``prepare`` raises, if it has one."""
    if isinstance(environment, Preparer):
        environment.prepare()


class Demonstrator(Protocol):
    """What an environment adds so that a warm start can teach flashcard writing: what an ideal agent would do next."""

    def demonstrate_flashcards(
        self, task: Task, text_in_context: str, question_blind: bool
    ) -> tuple[Flashcard, ...]:
        """The gold flashcards for the part of the task that stands in ``text_in_context``."""
        ...
