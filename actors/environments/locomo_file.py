"""LoCoMo's file format, read and checked: a malformed file gives one line with the file, the item, the field and what was expected there."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actors.environments.base import TaskError

_SESSION_KEY = re.compile(r"session_(\d+)")
_EVIDENCE_SESSION = re.compile(r"D(\d+)")


@dataclass(frozen=True, slots=True)
class Told:
    """One session: "Speaker: text" lines, an image's caption in brackets."""

    number: int
    date: str
    lines: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Question:
    """``answer`` is "" for category 5, which has none; ``evidence_sessions`` may be empty."""

    text: str
    answer: str
    category: int
    evidence_sessions: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Conversation:
    """``sessions`` are in the order of their numbers, at least one."""

    id: str
    sessions: tuple[Told, ...]
    questions: tuple[Question, ...]


def read_locomo(path: str) -> list[Conversation]:
    """All conversations of the file. Raises TaskError."""
    if not path:
        raise TaskError("environment.conversation.path is empty: give the path of a LoCoMo file (a JSON list of conversations)")
    try:
        items = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise TaskError(f"{path}: cannot be read ({error.strerror}): give environment.conversation.path the path of a LoCoMo file") from error
    except UnicodeDecodeError as error:
        raise TaskError(f"{path}: not UTF-8 text at byte {error.start}") from error
    except json.JSONDecodeError as error:
        raise TaskError(f"{path}: not JSON at line {error.lineno} column {error.colno}: {error.msg}") from error
    except RecursionError as error:
        raise TaskError(f"{path}: nested too deeply for a LoCoMo file") from error
    if not isinstance(items, list):
        raise TaskError(f"{path}: expected a list of conversations, got {_kind(items)}")
    conversations = [_conversation(_Place(path, f"item {number}"), item, number) for number, item in enumerate(items)]
    seen: set[str] = set()
    for number, conversation in enumerate(conversations):
        if conversation.id in seen:
            raise TaskError(f"{path}: item {number}: sample_id {conversation.id!r} occurs twice")
        seen.add(conversation.id)
    return conversations


@dataclass(frozen=True, slots=True)
class _Place:
    """Where in the file we are, for messages."""

    path: str
    item: str
    field: str = ""

    def at(self, field: str) -> _Place:
        joined = f"{self.field}{field}" if field.startswith("[") or not self.field else f"{self.field}.{field}"
        return _Place(self.path, self.item, joined)

    def error(self, expected: str, value: object) -> TaskError:
        where = f"{self.item}, {self.field}" if self.field else self.item
        return TaskError(f"{self.path}: {where}: expected {expected}, got {_kind(value)}")


_MISSING = object()


def _kind(value: object) -> str:
    if value is _MISSING:
        return "nothing"
    if value is None:
        return "null"
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        return "a list"
    return repr(value) if len(repr(value)) < 40 else f"{repr(value)[:36]}..."


def _text(place: _Place, value: object) -> str:
    if not isinstance(value, str) or not value.strip():
        raise place.error("a text", value)
    return value


def _object(place: _Place, value: object) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise place.error("an object", value)
    return value


def _list(place: _Place, value: object) -> list[Any]:
    if not isinstance(value, list):
        raise place.error("a list", value)
    return value


def _conversation(place: _Place, item: object, number: int) -> Conversation:
    fields = _object(place, item)
    name = _text(place.at("sample_id"), fields.get("sample_id", f"conversation-{number}"))
    place = _Place(place.path, f"item {number} ({name})")
    talk_place = place.at("conversation")
    talk = _object(talk_place, fields.get("conversation", _MISSING))
    numbers = sorted(int(match[1]) for key in talk if (match := _SESSION_KEY.fullmatch(key)))
    if not numbers:
        raise talk_place.error("at least one session_1, session_2, ...", _MISSING)
    questions_place = place.at("qa")
    questions = _list(questions_place, fields.get("qa", _MISSING))
    return Conversation(
        id=name,
        sessions=tuple(_session(talk_place, talk, session) for session in numbers),
        questions=tuple(_question(questions_place.at(f"[{i}]"), value) for i, value in enumerate(questions)),
    )


def _session(place: _Place, talk: Mapping[str, Any], number: int) -> Told:
    key = f"session_{number}"
    date = _text(place.at(f"{key}_date_time"), talk.get(f"{key}_date_time", _MISSING))
    turns = _list(place.at(key), talk[key])
    return Told(number=number, date=date, lines=tuple(_line(place.at(f"{key}[{i}]"), turn) for i, turn in enumerate(turns)))


def _line(place: _Place, value: object) -> str:
    turn = _object(place, value)
    speaker = _text(place.at("speaker"), turn.get("speaker", _MISSING))
    text = turn.get("text", _MISSING)
    if not isinstance(text, str):
        raise place.at("text").error("a text", text)
    caption = turn.get("blip_caption")
    if caption is None:
        return f"{speaker}: {text}"
    return f"{speaker}: {text} [shares an image: {_text(place.at('blip_caption'), caption)}]"


def _question(place: _Place, value: object) -> Question:
    fields = _object(place, value)
    category = fields.get("category", _MISSING)
    if not isinstance(category, int) or isinstance(category, bool) or not 1 <= category <= 5:
        raise place.at("category").error("a category 1 to 5", category)
    answer: object = "" if category == 5 else fields.get("answer", _MISSING)
    if isinstance(answer, bool) or not isinstance(answer, (str, int, float)) or (category != 5 and not str(answer).strip()):
        raise place.at("answer").error("a text or a number", answer)
    evidence = _list(place.at("evidence"), fields.get("evidence", []))
    return Question(
        text=_text(place.at("question"), fields.get("question", _MISSING)),
        answer=str(answer),
        category=category,
        evidence_sessions=tuple(int(found) for entry in evidence for found in _EVIDENCE_SESSION.findall(str(entry))),
    )
