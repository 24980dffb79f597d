"""Reads whom and what a question of the recall tasks asks about, and words it otherwise.

    "Where does Nora live?" --subject_of--> Subject("Nora", home) --wordings--> "What city is Nora's home?"

It knows the relations' wordings only, and takes any capitalised name. So it needs nothing of a task.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from dataclasses import dataclass

import regex

from actors.environments.recall_words import RELATIONS, Relation

_WORD = r"\p{Lu}[\p{L}\p{M}\p{N}.'\u2019-]*"
_NAME = rf"(?P<name>{_WORD}(?: {_WORD})*)"


@dataclass(frozen=True, slots=True)
class Subject:
    """Whom and what a question asks about. Example: Subject("Nora", the relation "home")"""

    person: str
    relation: Relation

    def ask(self, wording: str) -> str:
        return wording.format(name=self.person)

    @property
    def wordings(self) -> tuple[str, str]:
        """The two questions in which flashcards may ask for it."""
        first, second = self.relation.questions
        return self.ask(first), self.ask(second)


def subject_of(question: str) -> Subject | None:
    """Whom and what ``question`` asks about, in one of the three wordings; None for any other question.

    Case (except the name's), spaces and the question mark do not matter.
    """
    text = " ".join(question.split())
    for relation, pattern in _PATTERNS:
        if found := pattern.fullmatch(text):
            return Subject(found["name"], relation)
    return None


def other_subjects(subject: Subject, known: Collection[str], order: str) -> list[Subject]:
    """The same person's other relations that no question in ``known`` asks for, shuffled by ``order``."""
    asked = {found for question in known if (found := subject_of(question)) is not None} | {subject}
    others = (Subject(subject.person, relation) for relation in RELATIONS)
    return sorted(
        (other for other in others if other not in asked),
        # not Random: sorting by a hash leaves the order of the rest alone when one subject is known
        key=lambda other: stable_hash(f"{order}/{other.relation.name}"),
    )


def stable_hash(text: str) -> int:
    """A number that is the same in every process."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def _pattern(wording: str) -> regex.Pattern[str]:
    before, after = wording.rstrip("?").split("{name}")
    # A card may have the other apostrophe, or none behind a name with s ("James' home").
    after = regex.escape(after, literal_spaces=True).replace("'s", "(?:['\u2019]s?)")
    return regex.compile(rf"(?i:{regex.escape(before, literal_spaces=True)}){_NAME}(?i:{after})[?.]*")


_PATTERNS = [
    (relation, _pattern(wording))
    for relation in RELATIONS
    for wording in (*relation.questions, relation.unwritten_question)
]
