"""OpenAI's chat completions as ``serve`` speaks them, see actors/endpoint/ for what all endpoints share.

    request:  JSON --> _Body --> ChatRequest        what the engine cannot do is refused by name
    answer:   Answer --> JSON, or server-sent events

Two additions are ours: the field ``conversation`` of a request, and the object ``engram`` of an answer.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from actors.endpoint import answers
from actors.endpoint.requests import Body, Role, Text, bad_value, checked, only
from actors.types import WriteRecord
from cluster.assistant.conversation import Reply
from configs.schema import RunConfig

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_WRITE_FIELDS = (
    "outcome", "reason", "revision", "steps", "seconds", "loss_before", "loss_after", "flashcards",
)  # fmt: skip
_NAME_RULE = "1 to 64 letters, digits, '.', '_' or '-', the first a letter or a digit"


# --- requests -------------------------------------------------------------------------------------------


class Message(BaseModel):
    """One message of a request."""

    model_config = ConfigDict(strict=True, frozen=True)

    role: Role = Field(description="system, user or assistant")
    content: Text = Field(pattern=r"\S", description="text that is not empty")


class _Body(Body):
    messages: list[Message] = Field(min_length=1, description="a list with one message or more")
    conversation: object = None
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False, description="a number, 0 to 2")
    stop: Annotated[object, only([])] = None


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """A request that can be answered.

    ``turns`` are the user's new turns, one or more; ``history`` is what stands before them. ``system_prompt``
    and ``conversation`` are None if the request has none.
    """

    model: str
    conversation: str | None
    system_prompt: str | None
    history: tuple[Message, ...]
    turns: tuple[str, ...]
    max_tokens: int
    temperature: float
    stream: bool
    usage_in_stream: bool


def parse_request(data: Mapping[str, Any], header: str | None, config: RunConfig) -> ChatRequest:
    """Check a request. ``header`` is X-Conversation-Id. Raises RequestError."""
    body = checked(_Body, Message, data)
    system_prompt, history, turns = _split(body.messages)
    # Both bounds are 1 or more. A bound larger than ours changes nothing that is promised.
    limit = config.sampling.max_answer_tokens
    default_temperature = config.assistant.temperature
    return ChatRequest(
        model=body.model or "",
        conversation=_conversation(body.conversation, header),
        system_prompt=system_prompt,
        history=history,
        turns=turns,
        max_tokens=min(body.most_tokens or limit, limit),
        temperature=default_temperature if body.temperature is None else body.temperature,
        stream=body.stream or False,
        usage_in_stream=body.usage_in_stream,
    )


def check_name(name: object, param: str) -> str:
    """Return ``name`` if it can name a conversation, and so a folder. Raises RequestError."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise bad_value(f"{param} must be {_NAME_RULE}", param)
    return name


def _conversation(field: object, header: str | None) -> str | None:
    if isinstance(field, dict):  # as in OpenAI's Responses
        field = field.get("id")
    if field is not None and header is not None and field != header:
        raise bad_value("the field conversation and the header X-Conversation-Id differ", "conversation")
    name = header if field is None else field
    return None if name is None else check_name(name, "conversation")


def _split(messages: Sequence[Message]) -> tuple[str | None, tuple[Message, ...], tuple[str, ...]]:
    """The system prompt, the history, and the user turns after the last assistant turn."""
    system_prompt = messages[0].content if messages[0].role in ("system", "developer") else None
    start = 0 if system_prompt is None else 1
    for place, message in enumerate(messages[start:], start):
        if message.role in ("system", "developer"):
            where = f"messages[{place}]"
            raise bad_value(f"{where}: a system message can only be the first", where)
    new = len(messages)
    while new > start and messages[new - 1].role == "user":
        new -= 1
    if new == len(messages):
        raise bad_value("the last message must be the user's", "messages")
    turns = tuple(message.content for message in messages[new:])
    return system_prompt, tuple(messages[start:new]), turns


# --- answers --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Answer:
    """What a request brought. ``writes`` are all that it caused; ``new``: the conversation began with it."""

    conversation: str | None
    new: bool
    reply: Reply
    writes: tuple[WriteRecord, ...]


def completion(model: str, answer: Answer) -> str:
    """The answer as JSON."""
    return answers.completion(model, answer.reply, _ours(answer))


def completion_events(model: str, answer: Answer, with_usage: bool) -> Iterator[str]:
    """Server-sent events, see actors/endpoint/answers.py."""
    return answers.completion_events(model, answer.reply, with_usage, _ours(answer))


def summarize(record: WriteRecord) -> dict[str, Any]:
    """One write, for clients. In JSON the losses of a write that did not happen are null."""
    return {name: getattr(record, name) for name in _WRITE_FIELDS}


def _ours(answer: Answer) -> dict[str, Any]:
    """Our addition to an answer. ``revision`` is that of the fast weights that answered."""
    return {
        "engram": {
            "conversation": answer.conversation,
            "new": answer.new,
            "revision": answer.reply.revision,
            "writes": [summarize(record) for record in answer.writes],
        }
    }
