"""LoCoMo's file format (arXiv 2402.17753), read and checked."""

from __future__ import annotations

import re
from collections.abc import Sequence

from actors.environments.conversation_types import Conversation, Question, Told
from actors.environments.fields import Field, Source
from actors.environments.scoring import ADVERSARIAL, CATEGORY_NAMES
from actors.protocols import TaskError

_SESSION_KEY = re.compile(r"session_(\d+)")
_EVIDENCE_SESSION = re.compile(r"D(\d+)")


def read_locomo(path: str) -> list[Conversation]:
    """All conversations of the file. Raises TaskError."""
    source = Source(path, "environment.conversation.path", "a LoCoMo file (a JSON list of conversations)")
    conversations = [
        _conversation(item, number) for number, item in enumerate(source.json_list("conversations"))
    ]
    seen: set[str] = set()
    for number, conversation in enumerate(conversations):
        if conversation.id in seen:
            raise TaskError(f"{path}: item {number}: sample_id {conversation.id!r} occurs twice")
        seen.add(conversation.id)
    return conversations


def _conversation(item: Field, number: int) -> Conversation:
    name = item.get("sample_id", f"conversation-{number}").text()
    item = item.called(f"item {number} ({name})")
    talk = item["conversation"]
    numbers = sorted(int(match[1]) for key in talk.object() if (match := _SESSION_KEY.fullmatch(key)))
    if not numbers:
        raise talk["session_1"].error("at least one session_1, session_2, ...")
    sessions = tuple(_session(talk, session) for session in numbers)
    questions = tuple(_question(value) for value in item["qa"].items())

    def tell() -> Sequence[Told]:
        return sessions

    return Conversation(name, questions, tell)


def _session(talk: Field, number: int) -> Told:
    key = f"session_{number}"
    return Told(
        number=number,
        date=talk[f"{key}_date_time"].text(),
        lines=tuple(_line(turn) for turn in talk[key].items()),
    )


def _line(turn: Field) -> str:
    """An image's caption stands in brackets."""
    line = f"{turn['speaker'].text()}: {turn['text'].text(may_be_blank=True)}"
    caption = turn.get("blip_caption", None)
    return line if caption.value is None else f"{line} [shares an image: {caption.text()}]"


def _question(item: Field) -> Question:
    category = item["category"]
    number = category.value
    if not isinstance(number, int) or isinstance(number, bool) or number not in CATEGORY_NAMES:
        raise category.error("a category 1 to 5")
    answer = "" if number == ADVERSARIAL else item["answer"].scalar()
    evidence = item.get("evidence", []).items()
    return Question(
        text=item["question"].text(),
        answer=answer,
        category=CATEGORY_NAMES[number],
        locomo_category=number,
        evidence_sessions=tuple(
            int(found) for entry in evidence for found in _EVIDENCE_SESSION.findall(str(entry.value))
        ),
    )
