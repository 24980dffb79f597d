"""Right flashcards, and what became of them: was the right thing asked, and was it then known?

    CardUse of each card (the environment says) --> CardCounts of an episode --> sums over a row, or a step

A report tells by it whether a score moved because better cards were written, or because cards were kept
better. Where the environment cannot say what a card is worth (``Attributor``) there are no counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields

from actors.environments.recall_questions import UNTOLD
from actors.types import Answer, WriteRecord
from cluster.measure.report import Table, percent

_NAN = float("nan")


@dataclass(frozen=True, slots=True)
class CardCounts:
    """Counts of the accepted writes of one episode or more.

    ``right`` of ``cards`` are a fact of the task, question and answer. Of the ``questions`` whose answer was
    told ``covered`` had a right card, and ``answered`` of those were answered exactly.
    """

    cards: int = 0
    right: int = 0
    questions: int = 0
    covered: int = 0
    answered: int = 0

    def __add__(self, other: CardCounts) -> CardCounts:
        return CardCounts(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    @property
    def shares(self) -> dict[str, float]:
        """By name; what has no denominator is left out."""
        pairs = {
            "right_cards": (self.right, self.cards),
            "questions_with_a_right_card": (self.covered, self.questions),
            "right_answers_of_right_cards": (self.answered, self.covered),
        }
        return {name: part / whole for name, (part, whole) in pairs.items() if whole}


def count_cards(writes: Iterable[WriteRecord], answers: Sequence[Answer]) -> CardCounts | None:
    """Count one episode; None where a card was written that the environment said nothing of."""
    accepted = [record for record in writes if record.outcome == "accepted"]
    if any(len(record.uses) != len(record.flashcards) for record in accepted):
        return None
    uses = [use for record in accepted for use in record.uses]
    told = {place for place, answer in enumerate(answers) if answer.category not in UNTOLD}
    covered = told & {place for use in uses if use.right for place in use.questions}
    return CardCounts(
        cards=len(uses),
        right=sum(use.right for use in uses),
        questions=len(told),
        covered=len(covered),
        answered=sum(answers[place].scores.get("em", 0.0) >= 1 for place in covered),
    )


def total_cards(counts: Iterable[CardCounts | None]) -> CardCounts | None:
    """The sum; None where an episode has none (an older version's file too), or no card was written."""
    known = list(counts)
    summed = sum((count for count in known if count is not None), CardCounts())
    return None if None in known or summed.cards == 0 else summed


# --- what a table and a tracker show ----------------------------------------------------------------------

HEADER = (
    "row",
    "cards",
    "right %",
    "asked, with a right card %",
    "of these right %",
)
LEGEND = (
    "right: cards whose question and answer are a fact of the task · asked, with a right card: of the "
    "questions whose answer was told · of these right: answered exactly"
)


def cards_table(rows: Mapping[str, CardCounts | None]) -> Table:
    """By row its counts. A table without lines where no row has any."""
    lines = [(label, *_cells(counts)) for label, counts in rows.items() if counts]
    return Table("Right flashcards", HEADER, tuple(lines), LEGEND)


def _cells(counts: CardCounts) -> tuple[str, ...]:
    shares = counts.shares
    names = ("right_cards", "questions_with_a_right_card", "right_answers_of_right_cards")
    return (str(counts.cards), *(percent(shares.get(name, _NAN)) for name in names))
