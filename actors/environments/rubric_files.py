"""Reads items that rubrics judge, from JSON lines in CL-Bench's schema (arXiv 2602.03587), see rubric.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import AfterValidator

from actors.environments.data_file import DataFile, MessageText, Text, TextOrNumber, invalid

_NO_CATEGORY = "uncategorised"


@dataclass(frozen=True, slots=True)
class Message:
    role: Literal["system", "user", "assistant"]
    content: MessageText


@dataclass(frozen=True, slots=True)
class RubricItem:
    """One task: ``messages``, none of them blank, then ``request``.

    ``place``: what messages call it, "line 3", or "item 2" of a JSON list.
    """

    id: str
    context_id: str
    category: str
    messages: tuple[Message, ...]
    request: str
    rubrics: tuple[str, ...]
    place: str
    system_prompt: str = ""  # empty: the environment's


def _ends_with_request(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    if not messages or messages[-1].role != "user" or not messages[-1].content.strip():
        raise invalid("The last message should be the user's, with a text: it is the request")
    return messages


def _not_empty(rubrics: tuple[str, ...]) -> tuple[str, ...]:
    if not rubrics:
        raise invalid("Input should have at least one rubric")
    return rubrics


@dataclass(frozen=True, slots=True)
class _Metadata:
    task_id: TextOrNumber | None = None
    context_id: TextOrNumber | None = None
    context_category: TextOrNumber | None = None


@dataclass(frozen=True, slots=True)
class _Line:
    messages: Annotated[tuple[Message, ...], AfterValidator(_ends_with_request)]
    rubrics: Annotated[tuple[Text, ...], AfterValidator(_not_empty)]
    metadata: _Metadata = _Metadata()

    def as_item(self, place: str) -> RubricItem:
        task_id, context_id, category = (
            (value or "").strip()
            for value in (self.metadata.task_id, self.metadata.context_id, self.metadata.context_category)
        )
        return RubricItem(
            id=task_id or place.replace(" ", "-"),
            context_id=context_id or task_id or place.replace(" ", "-"),
            category=category or _NO_CATEGORY,
            messages=tuple(message for message in self.messages[:-1] if message.content.strip()),
            request=self.messages[-1].content,
            rubrics=tuple(rubric.strip() for rubric in self.rubrics),
            place=place,
        )


def read_rubric_items(path: str) -> list[RubricItem]:
    """All items of the file: at least one, with unique ids. Raises TaskError."""
    file = DataFile(
        path,
        "environment.rubric.path",
        "a file of JSON lines with messages, rubrics and metadata (CL-Bench's schema)",
    )
    items = [line.as_item(place) for place, line in file.named_lines(_Line)]
    if not items:
        raise file.empty("items")
    places: dict[str, str] = {}
    for item in items:
        if item.id in places:
            fault = f"metadata.task_id {item.id!r} stands in {places[item.id]} already"
            raise file.fault(item.place, fault)
        places[item.id] = item.place
    return items
