"""Reads whom and what a question of the recall tasks asks about, words it otherwise, and sorts its replies.

    "Where does Nora live?" --subject_of--> Subject("Nora", home) --wordings--> "What city is Nora's home?"

It knows the relations' wordings only, and takes any capitalised name. So it needs nothing of a task.

A reply is of one kind at most: the first that fits, in this order. A reply without a word is of none.

    right           it names this question's answer
    told elsewhere  it names what the episode told, though in answer to another question (a leak)
    abstained       it says that it does not know: right where nobody told the answer
    made up         all else
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection
from dataclasses import dataclass

import regex

from actors.environments.recall_words import RELATIONS, Relation
from actors.environments.scoring import plain_em, plain_f1, says_unknown

UNKNOWN = "I don't know"
"""The gold answer to a question whose answer nobody told."""

UNTOLD = (STRANGER, SAME_PERSON) = ("stranger", "same_person")
"""Categories of such a question: about a person of whom nothing was told, or about a told person."""

KINDS = ("told_elsewhere", "abstained", "made_up")
"""Scores beside f1 and em: 1 where the reply is of that kind, else 0."""

_NOT = r"(?: not|n'?t| never)"
_UNSURE = re.compile(
    r"\b(?:dunno|idk|unsure|no idea|no (?:such )?(?:memory|record|recollection|knowledge)"
    rf"|(?:do|does|did|could|can|would){_NOT} (?:really |actually |yet )?"
    r"(?:know|say|tell|recall|remember|mention|state|specify|answer)"
    r"|(?:cannot|can'?t) (?:say|tell|recall|remember|answer)"
    r"|not (?:sure|certain|aware|familiar)|unable to (?:say|tell|answer|recall)"
    r"|do(?: not|n'?t) have (?:any |enough |that |this |the |access|information|specific |personal )"
    rf"|(?:have|has|had|was|were|am|been){_NOT}(?: been)? (?:told|mentioned|given|informed|said)"
    r"|(?:never|nobody|no one|no-one) (?:has )?(?:told|said|mentioned|knows|knew))\b"
)

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


def other_subjects(
    subject: Subject, relations: Collection[Relation], known: Collection[str], order: str
) -> list[Subject]:
    """The same person's other ``relations`` that no question in ``known`` asks for, shuffled by ``order``."""
    asked = {found for question in known if (found := subject_of(question)) is not None} | {subject}
    others = (Subject(subject.person, relation) for relation in relations)
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


def abstains(reply: str) -> bool:
    """Whether the reply says, in any usual wording, that it does not know."""
    text = " ".join(reply.lower().replace("\u2019", "'").split())
    return says_unknown(text) or _UNSURE.search(text) is not None


def recall_scores(reply: str, answer: str | None, told: Collection[str]) -> dict[str, float]:
    """The scores of a reply. ``answer`` is None where nobody told it; ``told``: all that the episode told."""
    kind = _kind(reply, answer, told)
    scores = {
        "f1": float(kind == "abstained") if answer is None else plain_f1(reply, answer),
        "em": float(kind == "abstained") if answer is None else plain_em(reply, answer),
    }
    return scores | {name: float(kind == name) for name in KINDS}


def _kind(reply: str, answer: str | None, told: Collection[str]) -> str:
    words = _words(reply)
    if not words:
        return "empty"
    if answer is not None and _words(answer) <= words:
        return "right"
    if any(_words(other) <= words for other in told):
        return "told_elsewhere"
    return "abstained" if abstains(reply) else "made_up"


def _words(text: str) -> set[str]:
    """Lowered words. As for f1, an apostrophe or a hyphen joins; beyond it, "7th" is "7"."""
    words = re.findall(r"[^\W_]+", re.sub("['\u2019-]", "", text.lower()))
    return {re.sub(r"^(\d+)(?:st|nd|rd|th)$", r"\1", word) for word in words}
