"""Signs that a memory has collapsed: one answer to everything, the same card again, cards that do not parse.

answers of a row       --> Constancy: how often its most frequent answer is given
an episode's write log --> ExtractionCounts, by whether fast weights were in force (Delta) or not
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

from actors.text.flashcards import parse_flashcards
from actors.types import Answer, Flashcard, WriteRecord
from cluster.measure.report import percent

_ALL_CARDS = 1_000_000  # a limit on cards is the write's
_EMPTY_LIST = re.compile(r"\[\s*\]")
_NAN = float("nan")


# --- answers ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Constancy:
    """Shares of a row's answers, NaN without an answer. ``most_frequent`` is the answer, as it was counted.

    ``share``: those that equal the row's most frequent answer. ``gold``: the same of the right answers, which
    is what a row without a fault would have.
    """

    most_frequent: str
    share: float
    gold: float


def constancy(answers: Sequence[Answer]) -> Constancy:
    """Answers are compared by their words: case, punctuation and spaces do not count. An empty one counts."""
    if not answers:
        return Constancy("", _NAN, _NAN)
    given = Counter(_words(answer.prediction) for answer in answers)
    right = Counter(_words(answer.gold[0]) if answer.gold else "" for answer in answers)
    most_frequent, count = given.most_common(1)[0]
    return Constancy(most_frequent, count / len(answers), right.most_common(1)[0][1] / len(answers))


# --- extractions ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Extractions:
    """Counts of extractions: all, those without a readable list, and those that repeat an earlier card.

    "[]" is a readable list: the agent found nothing to save. A repeated card has the question and the answer
    of a card that an earlier extraction of the episode has. ``repaired``: those with a card that was nearly
    JSON.
    """

    count: int = 0
    unparsed: int = 0
    repeated: int = 0
    repaired: int = 0

    @property
    def unparsed_share(self) -> float:
        """NaN without an extraction."""
        return self.unparsed / self.count if self.count else _NAN

    @property
    def repeated_share(self) -> float:
        """NaN without an extraction."""
        return self.repeated / self.count if self.count else _NAN

    @property
    def repaired_share(self) -> float:
        """NaN without an extraction."""
        return self.repaired / self.count if self.count else _NAN

    def __add__(self, other: Extractions) -> Extractions:
        return Extractions(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


@dataclass(frozen=True, slots=True)
class ExtractionCounts:
    """Extractions under revision 0, and those under fast weights that the episode had written (Delta)."""

    without_delta: Extractions = Extractions()
    under_delta: Extractions = Extractions()

    def __add__(self, other: ExtractionCounts) -> ExtractionCounts:
        return ExtractionCounts(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


def count_extractions(writes: Iterable[WriteRecord]) -> ExtractionCounts:
    """Count the extractions of one episode. ``writes``: its whole log, of a memory that writes flashcards."""
    total, revision = ExtractionCounts(), 0
    earlier: set[tuple[str, str]] = set()
    for record in writes:
        parsed = parse_flashcards(record.extraction, _ALL_CARDS)
        cards = set(map(_fact, parsed.cards))
        unparsed = not cards and _EMPTY_LIST.search(record.extraction) is None
        one = Extractions(1, int(unparsed), int(bool(cards & earlier)), int(parsed.repaired > 0))
        total += ExtractionCounts(under_delta=one) if revision else ExtractionCounts(without_delta=one)
        earlier |= cards
        revision = record.revision  # in force when the next text is extracted
    return total


def total(counts: Iterable[ExtractionCounts | None]) -> ExtractionCounts | None:
    """The sum of what was counted; None where nothing was (no flashcards, or an older version's file)."""
    known = [count for count in counts if count is not None]
    return sum(known, ExtractionCounts()) if known else None


# --- what a table and a tracker show ----------------------------------------------------------------------

HEADER = ("same answer %", "extractions", "unparsed %", "repeated %", "repaired %")
LEGEND = (
    "same answer: share of the answers that equal the row's most frequent one, in brackets the same of the "
    "right answers · extractions: before / after the episode's first accepted write (Delta = 0 / under "
    "Delta) · unparsed: those without a readable list of cards · repeated: those with a card, question and "
    "answer, of an earlier extraction of the episode · repaired: those with a card that was nearly JSON"
)


def collapse_cells(answers: Sequence[Answer], extractions: ExtractionCounts | None) -> tuple[str, ...]:
    """The cells under ``HEADER``."""
    constant = constancy(answers)
    same = f"{percent(constant.share)} ({percent(constant.gold)})" if answers else "-"
    if extractions is None:
        return (same, "-", "-", "-", "-")
    first, later = extractions.without_delta, extractions.under_delta
    return (
        same,
        f"{first.count} / {later.count}",
        f"{percent(first.unparsed_share)} / {percent(later.unparsed_share)}",
        f"{percent(first.repeated_share)} / {percent(later.repeated_share)}",
        f"{percent(first.repaired_share)} / {percent(later.repaired_share)}",
    )


def collapse_figures(answers: Sequence[Answer], extractions: ExtractionCounts | None) -> dict[str, float]:
    """The same shares by name, for trackers and files. What is unknown is left out."""
    constant = constancy(answers)
    figures = {"constant_answers": constant.share, "constant_gold": constant.gold}
    if extractions is not None:
        for where, counts in (("", extractions.without_delta), ("_under_delta", extractions.under_delta)):
            figures[f"unparsed_extractions{where}"] = counts.unparsed_share
            figures[f"repeated_extractions{where}"] = counts.repeated_share
            figures[f"repaired_extractions{where}"] = counts.repaired_share
    return {name: value for name, value in figures.items() if math.isfinite(value)}


def _fact(card: Flashcard) -> tuple[str, str]:
    return _words(card.question), _words(card.answer)


def _words(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))
