"""What a probe measures, from card to grid cell. Frozen, plain numbers, and to JSON and back.

Worked example: 12 cards in one write of 20 steps, each step measured, one seed:

    CellRun   writes (WriteLine x 1)   after (Point 0: untouched, Point 1: after the write)   steps (Point x 20: from inside the write)
    Point     write 1, step 20, a CardScore for each of the 12 cards, a TextScore for each piece of unrelated text
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from actors.types import WriteOutcome
from configs.schema import FastWeightsConfig, WriteConfig

TextKind = Literal["text", "reply"]
Supervision = Literal["flashcards", "summary", "raw"]
"""What a write trains on: the cards, a summary of what was told, or the transcript itself (as the rows tmem, summary_sft and raw)."""
SUPERVISIONS: tuple[Supervision, ...] = get_args(Supervision)


class ProbeError(RuntimeError):
    """The probe cannot be run as it was asked for. One line: what, where, cure."""


@dataclass(frozen=True, slots=True)
class Card:
    """A flashcard that is written, and other wordings of its question that never are. ``telling``: the sentence that told it, "" if unknown."""

    question: str
    answer: str
    paraphrases: tuple[str, ...]
    telling: str = ""


@dataclass(frozen=True, slots=True)
class TextPiece:
    """Unrelated to every card: running text (``prompt`` is empty), or a question and its reply in the chat format."""

    kind: TextKind
    prompt: str
    text: str


@dataclass(frozen=True, slots=True)
class Asked:
    """One way of asking. loss: mean nats per token of the written answer. em, f1: of the greedy answer ``said`` (0..1, the plain scorer)."""

    loss: float
    em: float
    f1: float
    said: str


@dataclass(frozen=True, slots=True)
class CardScore:
    """One card. ``card`` is its place among the seed's cards, ``write`` (from 1) the write that it belongs to, ``tokens`` those of its answer."""

    card: int
    write: int
    tokens: int
    written: Asked
    paraphrased: tuple[Asked, ...]


@dataclass(frozen=True, slots=True)
class TextScore:
    """One piece of unrelated text. damage: loss minus the base model's. kl: KL(base || now). Both nats per token, over ``tokens`` tokens."""

    kind: TextKind
    tokens: int
    damage: float
    kl: float


@dataclass(frozen=True, slots=True)
class Point:
    """The state after ``step`` optimizer steps of write ``write`` (from 1; 0 and 0: nothing was written). Holds the cards written so far."""

    write: int
    step: int
    cards: tuple[CardScore, ...]
    texts: tuple[TextScore, ...]

    def loss(self, paraphrased: bool) -> float:
        """Nats per answer token over all cards; NaN where no card has a paraphrase."""
        pairs = [
            (one.loss, card.tokens)
            for card in self.cards
            for one in (card.paraphrased if paraphrased else (card.written,))
        ]
        return (
            sum(loss * tokens for loss, tokens in pairs) / sum(tokens for _, tokens in pairs)
            if pairs
            else float("nan")
        )

    def recall(self, paraphrased: bool, score: Literal["em", "f1"]) -> dict[int, float]:
        """By card's place its score, or the mean over its paraphrases (cards without any are left out)."""
        if not paraphrased:
            return {card.card: getattr(card.written, score) for card in self.cards}
        return {
            card.card: sum(getattr(one, score) for one in card.paraphrased) / len(card.paraphrased)
            for card in self.cards
            if card.paraphrased
        }

    def text(self, kind: TextKind, figure: Literal["damage", "kl"]) -> float:
        """Nats per token over all pieces of that kind."""
        pieces = [piece for piece in self.texts if piece.kind == kind]
        tokens = sum(piece.tokens for piece in pieces)
        return (
            sum(getattr(piece, figure) * piece.tokens for piece in pieces) / tokens
            if tokens
            else float("nan")
        )


@dataclass(frozen=True, slots=True)
class WriteLine:
    """One write as the writer reported it; losses are None where they were not finite. ``reason`` says why it was not accepted."""

    outcome: WriteOutcome
    reason: str
    steps: int
    seconds: float
    loss_before: float | None
    loss_after: float | None


@dataclass(frozen=True)
class Cell:
    """A place of the grid. ``settings`` are the key=value that make it differ; "" is their label where there is none."""

    settings: tuple[str, ...]
    fast_weights: FastWeightsConfig
    write: WriteConfig
    supervision: Supervision = "flashcards"

    @property
    def label(self) -> str:
        """Settings without their section: short enough for a table's first column."""
        parts = [setting.partition("=") for setting in self.settings]
        return (
            " ".join(f"{key.partition('.')[2] or key}={value}" for key, _, value in parts) or "as configured"
        )


@dataclass(frozen=True, slots=True)
class CellRun:
    """A cell on one seed. ``after`` begins with the untouched model, then one point a write; ``steps`` are from inside the writes, if asked for."""

    settings: tuple[str, ...]
    label: str
    seed: int
    basis_id: str
    parameters: int
    writes: tuple[WriteLine, ...]
    after: tuple[Point, ...]
    steps: tuple[Point, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(data: dict[str, Any]) -> CellRun:
        return CellRun(
            settings=tuple(data["settings"]),
            label=data["label"],
            seed=data["seed"],
            basis_id=data["basis_id"],
            parameters=data["parameters"],
            writes=tuple(WriteLine(**line) for line in data["writes"]),
            after=_points(data["after"]),
            steps=_points(data["steps"]),
        )


def _points(data: Sequence[dict[str, Any]]) -> tuple[Point, ...]:
    return tuple(
        Point(
            point["write"],
            point["step"],
            _cards(point["cards"]),
            tuple(TextScore(**text) for text in point["texts"]),
        )
        for point in data
    )


def _cards(data: Sequence[dict[str, Any]]) -> tuple[CardScore, ...]:
    return tuple(
        CardScore(
            card["card"],
            card["write"],
            card["tokens"],
            Asked(**card["written"]),
            tuple(Asked(**one) for one in card["paraphrased"]),
        )
        for card in data
    )
