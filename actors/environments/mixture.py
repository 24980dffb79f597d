"""Several environments in one run: each task is of one of them, drawn by shares.

    shares 0.7, 0.3   position  0  1  2  3  4  5  6  7  8  9
                      member    a  a  b  a  a  a  b  a  b  a     seeded; the number of each keeps to its share
                      its task  0  1  0  2  3  4  1  5  2  6     each member's own tasks, in their own order

A task knows its member, and that one plays it. Seed and position alone determine a task. In the eval split a
member whose tasks are used up drops out; in training they begin again.
"""

from __future__ import annotations

import itertools
import random
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

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
    prepare,
)
from actors.protocols import TaskError
from actors.types import CardUse, Flashcard, Task
from configs.user_code import owned

_Place = tuple[int, int]  # a member, and which of its tasks


@dataclass(frozen=True, slots=True)
class Mixed:
    """One environment of the mixture."""

    name: str
    share: float
    environment: Environment


class MixedEnvironment:
    """The task source of ``environment.mix``. It has the optional parts that all of its members have."""

    def __init__(self, members: Sequence[Mixed]) -> None:
        self.members = {member.name: member.environment for member in members}
        self._all = tuple(members)
        self._drawn: dict[tuple[Split, int], _Draw] = {}

    @property
    def name(self) -> str:
        return "+".join(self.members)

    @property
    def system_prompt(self) -> str:
        """The first member's. Each task is played under its own member's."""
        return str(self._all[0].environment.system_prompt)

    def prepare(self) -> None:
        for environment in self.members.values():
            prepare(environment)

    def tasks(self, split: Split, seed: int, start: int) -> Iterator[Task]:
        draw = self._drawn.setdefault((split, seed), _Draw(self._all, split, seed))
        for position in itertools.count(start):
            place = draw.at(position)
            if place is None:
                return
            member, number = self._all[place[0]], place[1]
            try:
                with owned(f"the environment {member.name}'s tasks", TaskError, member.environment.tasks):
                    task = draw.task(place[0], number)
            except TaskError as error:  # a member's fault is counted as that member's
                task = Task(f"{split}-{seed}-{position}", member.name, {}, 0, fault=str(error))
            if task is None:
                raise TaskError(f"{member.name} gave another number of tasks than before")
            name = task.id if task.id.startswith(f"{member.name}-") else f"{member.name}-{task.id}"
            lap = f"-{position}" if draw.is_repeated(place) else ""
            yield replace(task, id=f"{name}{lap}", member=member.name)

    def start(self, task: Task) -> Session:
        return self.member(task).start(task)

    def member(self, task: Task) -> Environment:
        """The environment that plays ``task``. Raises TaskError."""
        try:
            return self.members[task.member]
        except KeyError:
            raise TaskError(
                f"task {task.id}: environment.mix has no {task.member or 'member for it'}"
            ) from None


def playing(environment: Environment, task: Task) -> Environment:
    """The environment that plays ``task``: ``environment``, or its member. Raises TaskError."""
    return environment.member(task) if isinstance(environment, MixedEnvironment) else environment


class _Draw:
    """Which member's which task stands at a position, and the tasks of finite members again and again."""

    def __init__(self, members: Sequence[Mixed], split: Split, seed: int) -> None:
        self._members, self._split, self._seed = members, split, seed
        self._random = random.Random(f"mix/{split}/{seed}")
        self._places: list[_Place] = []
        self._counts = [0] * len(members)
        self._sizes: dict[int, int] = {}  # of the members that are known to end

    def at(self, position: int) -> _Place | None:
        """None behind the end of the eval split. Raises TaskError where a member has no task at all."""
        while len(self._places) <= position:
            member = self._next()
            if member is None:
                return None
            self._places.append((member, self._counts[member]))
            self._counts[member] += 1
        return self._places[position]

    def task(self, member: int, number: int) -> Task | None:
        if member in self._sizes:
            number %= self._sizes[member]
        task = self._get(member, number)
        if task is None and self._split == "train":
            self._sizes[member] = self._size(member, number)
            task = self._get(member, number % self._sizes[member])
        return task

    def is_repeated(self, place: _Place) -> bool:
        member, number = place
        return number >= self._sizes.get(member, number + 1)

    def _next(self) -> int | None:
        """The next member: by lot among those that lag behind their shares, and the more the more."""
        while open_ones := [
            m for m in range(len(self._members)) if self._split == "train" or m not in self._sizes
        ]:
            drawn = 1 + sum(self._counts[m] for m in open_ones)
            whole = sum(self._members[m].share for m in open_ones)
            lags = [self._members[m].share / whole * drawn - self._counts[m] for m in open_ones]
            (member,) = self._random.choices(open_ones, [max(0.0, lag) for lag in lags])
            if self._split == "train" or self._has(member, self._counts[member]):
                return member
            self._sizes[member] = self._counts[member]
        return None

    def _size(self, member: int, beyond: int) -> int:
        """How many tasks a finite member has, fewer than ``beyond`` + 1. Raises TaskError for none."""
        size = bisect_left(range(beyond), True, key=lambda number: not self._has(member, number))
        if size == 0:
            raise TaskError(f"{self._members[member].name} has no task in its {self._split} split")
        return size

    def _has(self, member: int, number: int) -> bool:
        try:
            return self._get(member, number) is not None
        except Exception:  # noqa: BLE001  a user's environment: the task is there, and playing it fails
            return True

    def _get(self, member: int, number: int) -> Task | None:
        return next(iter(self._members[member].environment.tasks(self._split, self._seed, number)), None)


# --- optional parts ----------------------------------------------------------------------------------------


class _Demonstrates(MixedEnvironment):
    def demonstrate_flashcards(
        self, task: Task, text_in_context: str, question_blind: bool
    ) -> tuple[Flashcard, ...]:
        member = self.member(task)
        assert isinstance(member, Demonstrator)
        return member.demonstrate_flashcards(task, text_in_context, question_blind)


class _Rephrases(MixedEnvironment):
    def wordings(self, question: str) -> tuple[str, ...]:
        """Of the first member that knows the question."""
        known = (
            member.wordings(question) for member in self.members.values() if isinstance(member, Rephraser)
        )
        return next((wordings for wordings in known if len(wordings) > 1), (question,))


class _Abstains(MixedEnvironment):
    def demonstrate_unknown(self, task: Task) -> tuple[Exchange, Exchange]:
        member = self.member(task)
        assert isinstance(member, Abstainer)
        return member.demonstrate_unknown(task)


class _Questions(MixedEnvironment):
    def other_questions(self, count: int, seed: int) -> tuple[str, ...]:
        """The members' in turn, as many of each."""
        each = [
            member.other_questions(count, seed)
            for member in self.members.values()
            if isinstance(member, Questioner)
        ]
        mixed = (question for turn in itertools.zip_longest(*each) for question in turn if question)
        return tuple(itertools.islice(dict.fromkeys(mixed), count))

    def questions_beside(self, card: Flashcard, known: Sequence[str]) -> tuple[str, ...]:
        """Of the first member that knows the card's subject."""
        asked = (
            member.questions_beside(card, known)
            for member in self.members.values()
            if isinstance(member, Questioner)
        )
        return next(filter(None, asked), ())


class _Attributes(MixedEnvironment):
    def use_of(self, task: Task, card: Flashcard) -> CardUse:
        member = self.member(task)
        assert isinstance(member, Attributor)
        return member.use_of(task, card)

    def questions_told(self, task: Task, text: str) -> tuple[int, ...]:
        member = self.member(task)
        assert isinstance(member, Attributor)
        return member.questions_told(task, text)


_OPTIONAL: dict[type, type[MixedEnvironment]] = {
    Demonstrator: _Demonstrates,
    Rephraser: _Rephrases,
    Abstainer: _Abstains,
    Questioner: _Questions,
    Attributor: _Attributes,
}


def mixed(members: Sequence[Mixed]) -> MixedEnvironment:
    """The members as one environment, with the optional parts that all of them have."""
    parts = tuple(
        part
        for kind, part in _OPTIONAL.items()
        if all(isinstance(member.environment, kind) for member in members)
    )
    kind: type[MixedEnvironment] = type("Mixture", parts, {}) if parts else MixedEnvironment
    return kind(members)
