"""Reads BEAM (arXiv 2510.27246): chats of 128,000 to 10 million tokens, and questions about ten abilities.

A row of its public data (hub:Mohammadta/BEAM@100K, or the same as JSON lines):

    {"conversation_id": "1",
     "chat": [[{"role": "user", "content": "My sprint ends on March 29.", "time_anchor": "March-15-2024"}],
              ...],
     "probing_questions": {"information_extraction": [
         {"question": "When does my sprint end?", "rubric": ["LLM response should state: March 29"]}], ...}}

``chat`` may be nested in any way, as the repository's files are. Chat and questions may be texts that hold
Python's own notation of them, as on the hub. A chat is told message by message, then one question is asked.
Its rubrics are judged. The questions of a chat are on the same side of the split.

Our choices: the judge says of each rubric whether it is met. BEAM's judge also gives half points, and scores
event ordering by the order too. A message's mark of its place in the plan ("->-> 1,2") is left out. The
wording of the system prompt is our own.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict

from actors.environments.data_file import DataFile, Text, TextOrNumber, Texts, invalid, message_text
from actors.environments.rubric_files import Message, RubricItem

_SYSTEM_PROMPT = (
    "You are shown the chats that a user had with you, and then asked something by them. Answer from these "
    "chats, and do what they asked for in them. Where the chats do not tell the answer, or contradict "
    "themselves, say so."
)
_PLACE = re.compile(r"[\d,\s]*")  # of a turn, behind an arrow at its end


def _literal(value: object) -> object:
    """Read a text in Python's notation, for pydantic; it may hold values only."""
    if not isinstance(value, str):
        return value
    try:
        read: object = ast.literal_eval(value)
    except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
        raise invalid(f"Input should be a list or an object, or a text of one ({error})") from None
    return read


def _messages(value: object) -> tuple[Message, ...]:
    """All messages in ``value``, however they are nested, for pydantic; blank ones are left out."""
    messages = tuple(_found(_literal(value)))
    if not messages:
        raise invalid("Input should have messages with role and content")
    return messages


def _found(value: Any) -> Iterator[Message]:
    if isinstance(value, dict) and "role" in value:
        role, text = value["role"], message_text(value.get("content"))
        if role not in ("system", "user", "assistant") or not isinstance(text, str):
            raise invalid(f"A message's role is {str(role)[:80]!r}, it must be system, user or assistant")
        before, arrow, place = text.rpartition("->->")
        text = (before if arrow and _PLACE.fullmatch(place) else text).strip()
        when = value.get("time_anchor")
        if text:
            yield Message(role, f"[{when}] {text}" if isinstance(when, str) and when.strip() else text)
    elif isinstance(value, (list, dict)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _found(inner)


class _Question(BaseModel):
    question: Text
    rubric: Texts


class _Row(BaseModel):
    model_config = ConfigDict(arbitrary_types_allowed=True)

    chat: Annotated[tuple[Message, ...], BeforeValidator(_messages)]
    probing_questions: Annotated[dict[str, list[_Question]], BeforeValidator(_literal)]
    conversation_id: TextOrNumber = ""


def read_beam_items(path: str) -> list[RubricItem]:
    """Each question as an item: at least one. Raises TaskError."""
    file = DataFile(path, "environment.rubric.path", "BEAM's rows (JSON lines, or hub:Mohammadta/BEAM@100K)")
    items = [
        RubricItem(
            id=f"{name}-{ability}-{place}",
            context_id=name,
            category=ability,
            messages=row.chat,
            request=question.question,
            rubrics=tuple(question.rubric),
            place=item,
            system_prompt=_SYSTEM_PROMPT,
        )
        for number, (item, row) in enumerate(file.named_lines(_Row), 1)
        for name in [f"{row.conversation_id or 'chat'}-{number}"]
        for ability, questions in row.probing_questions.items()
        for place, question in enumerate(questions)
    ]
    if not items:
        raise file.empty("questions")
    return items
