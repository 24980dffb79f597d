"""What a file of conversations gives, whichever its format."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Told:
    """One session: "Speaker: text" lines under a date. Sessions are numbered in the order in which they are told."""

    number: int
    date: str
    lines: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Question:
    """``answer`` is "" where the conversation does not tell: right is who says so. ``evidence_sessions`` may be empty.

    ``locomo_category`` picks the rule of LoCoMo's official scorer; None in a file of another benchmark, which that scorer does not judge.
    """

    text: str
    answer: str
    category: str  # as reported
    locomo_category: int | None
    evidence_sessions: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Conversation:
    """``sessions`` gives at least one, in order; a large file is read again for it rather than kept. It raises TaskError."""

    id: str
    questions: tuple[Question, ...]
    sessions: Callable[[], Sequence[Told]]
