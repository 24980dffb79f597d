"""What a task source is, and the parts that the shipped ones share.

An environment is built once per process from its config. A session is the view that one episode has of a
task; it is used once.

    env.prepare()                     if it has it: once in every rollout worker, before the first episode
    env.tasks("train", seed, start)   iterator of Task, the same for the same seed
    session = env.start(task)
    while (observation := session.observe()) is not None:
        if observation.wants_action:
            session.act(text)         what the policy says: no stop token, no thoughts
    session.outcome()
    session.close()                   if it has it: once, however the episode ended

``start`` and the session's methods may be async; sync ones run in a thread, one for each episode. So they may
wait, under ``rollout.environment_timeout_s`` a call. Siblings call one environment at the same time. Whatever
they raise fails that one episode, with the file and line (actors/episodes/hosted_session.py).
"""

from __future__ import annotations

import hashlib
import inspect
import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args, runtime_checkable

from actors.protocols import TaskError
from actors.text.thoughts import visible_reply
from actors.text.tools import Tool
from actors.types import CardUse, FinishReason, Flashcard, Outcome, Task
from configs.user_code import owned

Split = Literal["train", "eval"]
TurnRole = Literal["user", "tool", "assistant"]


@dataclass(frozen=True, slots=True)
class Reply:
    """An action, with how it was sampled. ``prompt_tokens`` is the context that it was sampled from."""

    text: str
    finish_reason: FinishReason
    prompt_tokens: int
    reply_tokens: int


@dataclass(frozen=True, slots=True)
class Observation:
    """A turn for the agent. Where it ``wants_action``, the next call of the session is ``act``.

    ``tells``: it holds something to remember. A mere question does not. ``max_tokens`` bounds the action
    below the run's own bound. The action ends with the first text of ``stop`` in it; that text is sampled,
    and is not in what ``act`` gets. ``heard`` is called before ``act``, with how the action was sampled.
    ``role`` is "tool" for what a tool of the session gave: a chat template may have a turn of its own for it.
    "assistant": a reply that nobody sampled, such as an example; it wants no action.
    """

    text: str
    wants_action: bool
    tells: bool = True
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    heard: Callable[[Reply], None] | None = None
    role: TurnRole = "user"

    def __post_init__(self) -> None:
        most, stop, roles = self.max_tokens, self.stop, get_args(TurnRole)
        if self.role not in roles:
            raise ValueError(f"role={self.role!r} must be one of {', '.join(roles)}")
        if self.role == "assistant" and self.wants_action:
            raise ValueError("role='assistant' is a reply: it wants no action, wants_action must be False")
        if most is not None and (not isinstance(most, int) or most < 1):
            raise ValueError(f"max_tokens={most!r} must be a whole number, 1 or more, or None")
        if not isinstance(stop, tuple) or not all(isinstance(text, str) and text for text in stop):
            raise ValueError(f"stop={stop!r} must be a tuple of texts, none of them empty")


class Session(Protocol):
    """One episode's view of a task. A ``system_prompt`` of its own goes before the environment's."""

    @property
    def question(self) -> str:
        """What the episode is about. The extraction prompt shows it, unless the memory is question-blind."""
        ...

    def observe(self) -> Observation | None:
        """The next observation, None when the episode is over."""
        ...

    def act(self, text: str) -> None: ...

    def outcome(self) -> Outcome:
        """Reward and answers; questions without an answer score 0. There may be no answers, just a reward.

        Called when ``observe`` has returned None, or when the turn limit has ended the episode.
        """
        ...


class Environment(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def system_prompt(self) -> str: ...

    def tasks(self, split: Split, seed: int, start: int) -> Iterator[Task]:
        """Tasks from position ``start`` on, endless or finite.

        Seed and position alone determine a task, so a resumed run goes on where it was.
        """
        ...

    def start(self, task: Task) -> Session: ...


class ToolUser(Protocol):
    """An optional part of a session: the agent's prompt tells these tools, in the chat template's own form.

    The calls stand in the text of ``act``, as the model writes them (actors/text/tools.py).
    """

    @property
    def tools(self) -> Sequence[Tool]: ...


_MISSING = object()


def part_of(session: object, name: str, default: object) -> Any:
    """An optional part of a session, of its class or set by its constructor.

    A ``__getattr__`` of the user's is not asked: it may have any name, or wait for a network.
    """
    has = inspect.getattr_static(session, name, _MISSING) is not _MISSING
    return getattr(session, name) if has else default


@runtime_checkable
class Preparer(Protocol):
    """An optional part of an environment that needs something slow to build, such as an index.

    Without ``prepare``, the first episode would build it, and an episode has a deadline.
    """

    def prepare(self) -> None:
        """Build it now. Blocks, under ``ray.startup_timeout_s``. Raises TaskError."""
        ...


def prepare(environment: Environment) -> None:
    """Call the environment's ``prepare`` if it has one. Raises TaskError."""
    if isinstance(environment, Preparer):
        with owned("the environment's prepare", TaskError, environment.prepare):
            environment.prepare()


@runtime_checkable
class Demonstrator(Protocol):
    """An optional part of an environment: it knows the flashcards that an ideal agent would write.

    A warm start teaches flashcard writing with them.
    """

    def demonstrate_flashcards(
        self, task: Task, text_in_context: str, question_blind: bool
    ) -> tuple[Flashcard, ...]:
        """The gold flashcards for the part of the task that stands in ``text_in_context``."""
        ...


@runtime_checkable
class Rephraser(Protocol):
    """An optional part of a Demonstrator: it asks a flashcard's question in other words.

    With ``memory.wordings=2`` a fact has a card in each of two wordings.
    """

    def wordings(self, question: str) -> tuple[str, ...]:
        """``question`` and, where there is one, a second question that has the same answer."""
        ...


@dataclass(frozen=True, slots=True)
class Exchange:
    """Texts that were read, then questions with their answers. A warm start teaches the last answer.

    Example: Exchange(("Nora has moved to Lisbon.",), (("Where does Nora live?", "Lisbon"),))
    """

    texts: tuple[str, ...]
    turns: tuple[tuple[str, str], ...]  # question, answer


@runtime_checkable
class Abstainer(Protocol):
    """An optional part of an environment: it teaches when to say that something is not known."""

    def demonstrate_unknown(self, task: Task) -> tuple[Exchange, Exchange]:
        """The same last question twice: where its texts do not tell the answer, and where they do."""
        ...


@runtime_checkable
class Questioner(Protocol):
    """An optional part of an environment: questions in the words of its own flashcards.

    A write preserves the policy's replies to them (``write.preserve``). Nothing about a task may be used.
    """

    def other_questions(self, count: int, seed: int) -> tuple[str, ...]:
        """At most ``count`` questions on subjects that no held-out task has."""
        ...

    def questions_beside(self, card: Flashcard, known: Sequence[str]) -> tuple[str, ...]:
        """Questions on the card's own subject that it does not answer, in a fixed order.

        ``known``: the questions that the episode's cards answer. Empty where the subject is unknown.
        """
        ...


@runtime_checkable
class Attributor(Protocol):
    """An optional part of an environment: it says which of an episode's questions a flashcard served.

    Reports count right cards by it, and RL gives credit by question (``objective.credit=question``). The
    k-th act of its episodes answers the k-th of ``Outcome.answers``, and the question earns its score ``f1``.
    """

    def use_of(self, task: Task, card: Flashcard) -> CardUse:
        """Which questions the card is about, and whether it tells a fact of the task rightly."""
        ...

    def questions_told(self, task: Task, text: str) -> tuple[int, ...]:
        """Places of the questions whose answers stand in ``text``, so that a card might ask for them."""
        ...


class ReadThenAsk:
    """The usual session: all texts are read, then each question is asked once. Subclasses add ``outcome``."""

    def __init__(self, texts: Sequence[str], questions: Sequence[str]) -> None:
        self.question = " ".join(questions)
        read = [Observation(text, wants_action=False) for text in texts]
        asked = [Observation(text, wants_action=True, tells=False) for text in questions]
        self._observations = iter([*read, *asked])
        self._unanswered = len(questions)
        self._answers: list[str] = []

    def observe(self) -> Observation | None:
        return next(self._observations, None)

    def act(self, text: str) -> None:
        self._answers.append(visible_reply(text).strip())
        self._unanswered -= 1

    @property
    def answers(self) -> list[str]:
        """The answer to each question, "" where there is none."""
        return self._answers + [""] * self._unanswered


def held_out(ids: Sequence[str], fraction: float) -> set[str]:
    """Choose the ids of the eval split: the same in every process and for every order of the file.

    Of two or more ids, each split gets at least one.
    """
    ranked = sorted(set(ids), key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    return set(ranked[: min(len(ranked) - 1, max(1, round(len(ranked) * fraction)))])


def passes(name: str, size: int, split: Split, seed: int, start: int) -> Iterator[tuple[int, int]]:
    """(position, place among ``size`` tasks) from position ``start`` on.

    Endless for train, in a new order every pass; one pass for eval.
    """
    positions = itertools.count(start) if split == "train" else range(start, size)
    order: list[int] = []
    ordered_pass = -1
    for position in positions:
        if position // size != ordered_pass:
            ordered_pass, order = position // size, list(range(size))
            random.Random(f"{name}/{split}/{seed}/{ordered_pass}").shuffle(order)
        yield position, order[position % size]


def task_seed(split: Split, seed: int, position: int) -> int:
    """The seed of the task at a position."""
    return random.Random(f"task/{split}/{seed}/{position}").getrandbits(31)
