"""Questions that no card answers: how many get a written answer all the same is the *leak* of a write.

                  recall:N                                     a file of cards
    stranger      the split's people who were never told of    shipped questions that no pool has
    same person   a told person's other relations              none: whom a card is about is unknown

A third kind, a card's own question that gets another card's answer, needs no question of its own.

No question is measured that a write preserves (write.preserve): ``HeldApart`` keeps the two apart.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

from actors.environments.base import Questioner
from actors.environments.recall import RecallEnvironment
from actors.environments.recall_questions import Subject, subject_of
from actors.environments.recall_words import PEOPLE, RELATIONS
from actors.episodes.preservation import shipped_questions
from actors.types import Flashcard
from cluster.probe.values import Card, LeakKind, ProbeError
from configs.schema import RecallConfig

FEWEST, MOST = 12, 24
"""Strangers are as many as a seed's cards, within these bounds. At each point each question is asked."""

_ALL = 10_000  # more than there are


@dataclass(frozen=True, slots=True)
class Stray:
    """A question that no card answers. It is asked from write ``write`` on, when its subject was told."""

    kind: LeakKind
    question: str
    write: int


def strays_of(source: str, groups: Sequence[Sequence[Card]], pool: int, seed: int) -> tuple[Stray, ...]:
    """The questions for the cards of each write (``groups``). ``source``: as for cards_of.

    ``pool``: the most questions of a cell's pool (write.preserve.questions). Raises ProbeError.
    """
    cards = [card for group in groups for card in group]
    count = min(MOST, max(FEWEST, len(cards)))
    if not source.startswith("recall:"):
        return _shipped(cards, count, pool)
    told = {subject for card in cards if (subject := subject_of(card.question))}
    people = {subject.person for subject in told}
    split = next(PEOPLE[split] for split in PEOPLE if people <= set(PEOPLE[split]))
    draw = random.Random(f"probe/strays/{seed}")
    strangers = [
        Subject(person, relation) for person in split if person not in people for relation in RELATIONS
    ]
    chosen = draw.sample(strangers, min(count, len(strangers)))
    return (*(Stray("stranger", subject.wordings[0], 0) for subject in chosen), *_same(groups, told, draw))


def answers(said: str, answer: str) -> bool:
    """Whether ``said`` names ``answer``, alone or among other words."""
    words, wanted = (" ".join(re.findall(r"\w+", text.lower())) for text in (said, answer))
    return bool(wanted) and f" {wanted} " in f" {words} "


@dataclass(frozen=True, slots=True)
class HeldApart:
    """A Questioner whose questions concern no one and nothing that is ``measured``."""

    inner: Questioner
    measured: tuple[str, ...]

    def other_questions(self, count: int, seed: int) -> tuple[str, ...]:
        """None about a person whom a measured question names: cards of training's words name some."""
        people = {subject.person for question in self.measured if (subject := subject_of(question))}
        drawn = self.inner.other_questions(count + _ALL, seed)
        return tuple(q for q in drawn if (subject := subject_of(q)) and subject.person not in people)[:count]

    def questions_beside(self, card: Flashcard, known: Sequence[str]) -> tuple[str, ...]:
        return self.inner.questions_beside(card, [*known, *self.measured])


def questioner_of(source: str, cards: Sequence[Card], strays: Sequence[Stray]) -> Questioner | None:
    """Who words the questions that writes preserve; None for a file of cards: the shipped ones do."""
    if not source.startswith("recall:"):
        return None
    measured = (*(card.question for card in cards), *(stray.question for stray in strays))
    return HeldApart(RecallEnvironment(RecallConfig()), measured)


def _shipped(cards: Sequence[Card], count: int, pool: int) -> tuple[Stray, ...]:
    """The last of the shipped questions: the pool has the first ``pool`` of them."""
    own = {card.question for card in cards}
    free = [question for question in shipped_questions(_ALL)[pool:] if question not in own]
    if len(free) < FEWEST:
        most = len(shipped_questions(_ALL)) - FEWEST
        raise ProbeError(
            f"write.preserve.questions={pool} leaves {len(free)} shipped questions to measure the leak with, "
            f"{FEWEST} are needed: set it to {most} or less"
        )
    return tuple(Stray("stranger", question, 0) for question in free[-count:])


def _same(groups: Sequence[Sequence[Card]], told: set[Subject], draw: random.Random) -> list[Stray]:
    """For each card one question about its person that no card answers, until MOST are found."""
    asked: list[Stray] = []
    taken = set(told)
    for number, group in enumerate(groups, start=1):
        for card in group:
            subject = subject_of(card.question)
            others = [Subject(subject.person, relation) for relation in RELATIONS] if subject else []
            free = [other for other in others if other not in taken]
            if free and len(asked) < MOST:
                chosen = draw.choice(free)
                taken.add(chosen)
                asked.append(Stray("same_person", chosen.wordings[0], number))
    return asked
