"""CL-Bench's file format (arXiv 2602.03587), read and checked: JSON lines of

    {"messages": [{"role": "system" | "user" | "assistant", "content": text}, ...],      the last one is the user's, and wants the answer
     "rubrics": [text, ...],
     "metadata": {"task_id": text, "context_id": text, "context_category": text, "sub_category": text}}

Several items may share a context. What metadata lacks is filled: the line's number for an id, the item itself for its context.
"""

from __future__ import annotations

from dataclasses import dataclass

from actors.environments.fields import Field, Source
from actors.protocols import TaskError

_ROLES = ("system", "user", "assistant")
_NO_CATEGORY = "uncategorised"


@dataclass(frozen=True, slots=True)
class Message:
    """One turn, not blank."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class RubricItem:
    """``told`` comes before ``request``, the user's last message. ``line`` is the item's place in the file, from 1."""

    id: str
    context_id: str
    category: str
    told: tuple[Message, ...]
    request: str
    rubrics: tuple[str, ...]
    line: int


def read_rubric_items(path: str) -> list[RubricItem]:
    """All items of the file, at least one, ids unique. Raises TaskError."""
    source = Source(
        path,
        "environment.rubric.path",
        "a file of JSON lines with messages, rubrics and metadata (CL-Bench's schema)",
    )
    items = [_item(line) for line in source.json_lines()]
    if not items:
        raise TaskError(f"{path}: it has no items: give environment.rubric.path the path of {source.what}")
    lines: dict[str, int] = {}
    for item in items:
        if item.id in lines:
            raise TaskError(
                f"{path}: line {item.line}: metadata.task_id {item.id!r} stands in line {lines[item.id]} already"
            )
        lines[item.id] = item.line
    return items


def _item(line: Field) -> RubricItem:
    metadata = line.get("metadata", {})
    task_id = _given(metadata, "task_id") or line.item.replace(" ", "-")
    messages = [_message(message) for message in line["messages"].items()]
    if not messages or messages[-1].role != "user" or not messages[-1].content.strip():
        raise line["messages"].error(
            "at least one message, the last one of the user, with a text, for it is what to answer"
        )
    return RubricItem(
        id=task_id,
        context_id=_given(metadata, "context_id") or task_id,
        category=_given(metadata, "context_category") or _NO_CATEGORY,
        told=tuple(message for message in messages[:-1] if message.content.strip()),
        request=messages[-1].content,
        rubrics=_rubrics(line["rubrics"]),
        line=int(line.item.removeprefix("line ")),
    )


def _given(metadata: Field, name: str) -> str:
    """A text or a number, "" where there is none."""
    field = metadata.get(name, None)
    return "" if field.value is None else field.scalar().strip()


def _message(message: Field) -> Message:
    role = message["role"]
    if role.value not in _ROLES:
        raise role.error(f"one of {', '.join(_ROLES)}")
    return Message(role.text(), message["content"].text(may_be_blank=True))


def _rubrics(rubrics: Field) -> tuple[str, ...]:
    texts = tuple(rubric.text().strip() for rubric in rubrics.items())
    if not texts:
        raise rubrics.error("at least one rubric")
    return texts
