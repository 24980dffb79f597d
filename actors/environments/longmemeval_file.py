"""LongMemEval's file format (arXiv 2410.10813), read and checked: a JSON list of questions, each with the chats that it is about.

The file is passed over once, item by item, and only the questions are kept; an episode reads its own item (half a megabyte in LongMemEval-S) again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

from actors.environments.conversation_types import Conversation, Question, Told
from actors.environments.fields import Field, Source
from actors.environments.json_list import stream_list
from actors.protocols import TaskError

_ROLES = ("user", "assistant")
_DATE = re.compile(
    r"\d{4}/\d\d/\d\d \(\w{3}\) \d\d:\d\d"
)  # 2023/05/30 (Tue) 23:40; as texts they sort by time


def read_longmemeval(path: str) -> list[Conversation]:
    """One conversation with one question per item of the file, named by its question_id. Raises TaskError."""
    source = Source(
        path,
        "environment.conversation.path",
        "a LongMemEval file (a JSON list of questions with their chats)",
    )
    conversations: dict[str, Conversation] = {}
    for number, (start, size, value) in enumerate(stream_list(source)):
        item = Field(path, f"item {number}", value)
        name = item["question_id"].text()
        if name in conversations:
            raise TaskError(f"{path}: item {number}: question_id {name!r} occurs twice")
        item = item.called(f"item {number} ({name})")
        sessions = _sessions(item)
        if not any(told.lines for told, _ in sessions):
            raise item["haystack_sessions"].error("at least one turn")
        evidence = tuple(told.number for told, holds_answer in sessions if holds_answer)
        conversations[name] = Conversation(
            name, (_question(item, name, evidence),), _Haystack(source, start, size, item.item, name)
        )
    return list(conversations.values())


@dataclass(frozen=True, slots=True)
class _Haystack:
    """Where an item's sessions stand."""

    source: Source
    start: int  # byte
    size: int  # bytes
    item: str
    name: str

    def __call__(self) -> Sequence[Told]:
        try:
            value = json.loads(self.source.read_bytes(self.start, self.size))
        except (ValueError, RecursionError):
            value = {}
        item = Field(self.source.path, self.item, value)
        if item.get("question_id", "").value != self.name:
            raise TaskError(
                f"{self.source.path}: {self.item}: the file was changed after it was first read: start the run again"
            )
        return [told for told, _ in _sessions(item)]


def _question(item: Field, name: str, evidence: tuple[int, ...]) -> Question:
    """A question_id that ends in "_abs" marks a question that the chats do not answer; its answer field only explains why, so it is left out."""
    return Question(
        text=f"[{item['question_date'].text()}] {item['question'].text()}",  # "how many days ago" needs the day on which it is asked
        answer="" if name.endswith("_abs") else item["answer"].scalar(),
        category=item["question_type"].text(),
        locomo_category=None,
        evidence_sessions=evidence,
    )


def _sessions(item: Field) -> list[tuple[Told, bool]]:
    """Each session, and whether it holds evidence: it is listed, or a turn of it is marked. An empty session stays, with no line.

    By date: LongMemEval-S is in that order, its oracle file is not.
    """
    sessions = item["haystack_sessions"].items()
    dates = [date.text() for date in item["haystack_dates"].items()]
    if len(dates) != len(sessions):
        raise item["haystack_dates"].error(f"as many as the {len(sessions)} haystack_sessions")
    listed = {entry.scalar() for entry in item.get("answer_session_ids", []).items()}
    names = item.get("haystack_session_ids", []).items()
    holding = {place for place, name in enumerate(names) if name.scalar() in listed}
    found: list[tuple[Told, bool]] = []
    for number, place in enumerate(_by_time(dates), start=1):
        turns = [_turn(turn) for turn in sessions[place].items()]
        told = Told(number, dates[place], tuple(line for line, _ in turns if line))
        found.append((told, place in holding or any(marked for _, marked in turns)))
    return found


def _by_time(dates: Sequence[str]) -> list[int]:
    """The places in order of time; as they stand where a date is written otherwise."""
    known = all(_DATE.fullmatch(date) for date in dates)
    return sorted(range(len(dates)), key=lambda place: dates[place]) if known else list(range(len(dates)))


def _turn(turn: Field) -> tuple[str, bool]:
    """Its line, "" when nothing is said, and whether it is marked as evidence. Half a million turns: their fields are looked up plainly."""
    fields = turn.object()
    role, content = fields.get("role"), fields.get("content")
    if role not in _ROLES:
        raise turn["role"].error("user or assistant")
    if not isinstance(content, str):
        raise turn["content"].error("a text")
    content = content.strip()
    return (f"{role}: {content}" if content else ""), fields.get("has_answer") is True
