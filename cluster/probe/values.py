"""What a probe measures, from card to grid cell.

Frozen, plain numbers, and to JSON and back (configs/files.py).

Worked example: 12 cards in one write of 20 steps, each step measured, one seed:

    CellRun   writes: 1 WriteLine
              after: Point 0 (untouched), Point 1 (after the write)
              steps: 20 Points from inside the write
    Point     write 1, step 20: a CardScore for each card, a TextScore for each piece of unrelated text,
              a LeakScore for each question that no card answers, and for each card
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

from actors.types import WriteOutcome
from configs.files import Measured
from configs.schema import FastWeightsConfig, WriteConfig

TextKind = Literal["text", "reply"]
LeakKind = Literal["stranger", "same_person", "other_card"]
LEAKS: tuple[LeakKind, ...] = get_args(LeakKind)
Supervision = Literal["flashcards", "summary", "raw"]
"""What a write trains on: the cards, a summary of what was told, or the transcript itself.

They are the memory rows tmem, summary_sft and raw.
"""
SUPERVISIONS: tuple[Supervision, ...] = get_args(Supervision)


class ProbeError(RuntimeError):
    """The probe cannot run as asked. One line: what, where, cure."""


@dataclass(frozen=True, slots=True)
class Card:
    """A flashcard that is written, and paraphrases of its question that never are.

    ``telling`` is the sentence that told it, "" if unknown. ``also``: other wordings that are written, too.
    """

    question: str
    answer: str
    paraphrases: tuple[str, ...]
    telling: str = ""
    also: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class TextPiece:
    """Text that no card is about: running text (``prompt`` is empty), or a question and its reply."""

    kind: TextKind
    prompt: str
    text: str


@dataclass(frozen=True, slots=True)
class Asked:
    """One wording of a question, asked.

    loss: mean nats per token of the written answer. em, f1: of the greedy answer ``said`` (0..1, plain
    scorer).
    """

    loss: Measured
    em: float
    f1: float
    said: str


@dataclass(frozen=True, slots=True)
class CardScore:
    """The figures of one card. ``card``: its place among the seed's cards. ``write``: its write, from 1.

    ``tokens``: of its answer.
    """

    card: int
    write: int
    tokens: int
    written: Asked
    paraphrased: tuple[Asked, ...]

    def asked(self, paraphrased: bool) -> tuple[Asked, ...]:
        return self.paraphrased if paraphrased else (self.written,)


@dataclass(frozen=True, slots=True)
class LeakScore:
    """A question that has no right answer among those of other cards (examiner.py), and what was ``said``.

    leaked: 1 if the greedy answer names an answer that was written for another question, else 0. An
    ``other_card`` is a card's own question: there its own answer is right.
    """

    kind: LeakKind
    question: str
    said: str
    leaked: float


@dataclass(frozen=True, slots=True)
class TextScore:
    """The figures of one piece of unrelated text, in nats per token over ``tokens`` tokens.

    damage: loss minus the base model's. kl: KL(base || now).
    """

    kind: TextKind
    tokens: int
    damage: Measured
    kl: Measured


@dataclass(frozen=True, slots=True)
class Point:
    """The state after ``step`` optimizer steps of write ``write``, with the cards written so far.

    Writes count from 1. Write 0, step 0 is the untouched model; its leaks are how often that says an answer
    of any card by itself.
    """

    write: int
    step: int
    cards: tuple[CardScore, ...]
    texts: tuple[TextScore, ...]
    leaks: tuple[LeakScore, ...] = ()

    def loss(self, paraphrased: bool) -> float:
        """Nats per answer token over all cards; NaN if no card has a paraphrase."""
        return _weighted_mean(
            (asked.loss, card.tokens) for card in self.cards for asked in card.asked(paraphrased)
        )

    def recall(self, paraphrased: bool, score: Literal["em", "f1"]) -> dict[int, float]:
        """The score of each card by its place: of the written question, or the mean over its paraphrases.

        Cards without a paraphrase are left out of the latter.
        """
        wordings = {card.card: card.asked(paraphrased) for card in self.cards}
        return {
            place: sum(getattr(asked, score) for asked in wording) / len(wording)
            for place, wording in wordings.items()
            if wording
        }

    def leak(self, kind: LeakKind) -> dict[str, float]:
        """Whether each question of ``kind`` got another question's written answer."""
        return {score.question: score.leaked for score in self.leaks if score.kind == kind}

    def text(self, kind: TextKind, figure: Literal["damage", "kl"]) -> float:
        """Nats per token over all pieces of ``kind``; NaN without any."""
        pieces = (piece for piece in self.texts if piece.kind == kind)
        return _weighted_mean((getattr(piece, figure), piece.tokens) for piece in pieces)


@dataclass(frozen=True, slots=True)
class WriteLine:
    """A write as the writer reported it. A loss that was not finite is None.

    ``reason`` says why the write was not accepted. cpu_s: CPU seconds of the whole process.
    """

    outcome: WriteOutcome
    reason: str
    steps: int
    seconds: float
    loss_before: float | None
    loss_after: float | None
    cpu_s: Measured = math.nan


@dataclass(frozen=True)
class Cell:
    """A place of the grid. ``settings`` are the key=value arguments that make it differ."""

    settings: tuple[str, ...]
    fast_weights: FastWeightsConfig
    write: WriteConfig
    supervision: Supervision = "flashcards"

    @property
    def label(self) -> str:
        """The settings without their section, short enough for a table's first column."""
        parts = [setting.partition("=") for setting in self.settings]
        named = [f"{key.partition('.')[2] or key}={value}" for key, _, value in parts]
        return " ".join(named) or "as configured"


@dataclass(frozen=True, slots=True)
class CellRun:
    """A cell on one seed.

    ``after``: the untouched model, then a point for each write. ``steps``: points from inside the writes, if
    asked for.
    """

    settings: tuple[str, ...]
    label: str
    seed: int
    basis_id: str
    parameters: int
    writes: tuple[WriteLine, ...]
    after: tuple[Point, ...]
    steps: tuple[Point, ...]


def _weighted_mean(pairs: Iterable[tuple[float, int]]) -> float:
    """The mean of (value, weight) pairs; NaN without any."""
    kept = list(pairs)
    weights = sum(weight for _, weight in kept)
    return sum(value * weight for value, weight in kept) / weights if weights else math.nan
