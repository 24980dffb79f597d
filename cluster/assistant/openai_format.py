"""OpenAI's chat completions as far as they mean something here: a request's JSON to a checked value, an answer to JSON.

What the engine cannot do is refused by name, never passed over in silence. Additions of ours: the field ``conversation`` of a request, and the object
``engram`` of an answer.
"""

from __future__ import annotations

import json
import math
import re
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from actors.types import WriteRecord
from cluster.assistant.values import Reply
from configs.schema import RunConfig

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_NEUTRAL: Mapping[
    str, tuple[object, ...]
] = {  # fields that are accepted with these values only: with others they would change the answer
    "n": (1,),
    "top_p": (1, 1.0),
    "presence_penalty": (0, 0.0),
    "frequency_penalty": (0, 0.0),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "stop": ([],),
    "seed": (),
    "tools": ([],),
    "functions": ([],),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
}


class RequestError(Exception):
    """What a client did wrong, in OpenAI's terms."""

    def __init__(self, status: int, message: str, param: str | None, code: str) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code


@dataclass(frozen=True, slots=True)
class Turn:
    """One message that is no system message."""

    role: Literal["user", "assistant"]
    text: str


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """``history``: what stands before the new ``turns`` (one user turn or more). ``system_prompt`` and ``conversation``: None where there is none."""

    model: str
    conversation: str | None
    system_prompt: str | None
    history: tuple[Turn, ...]
    turns: tuple[str, ...]
    max_tokens: int
    temperature: float
    stream: bool
    usage_in_stream: bool


@dataclass(frozen=True, slots=True)
class Answer:
    """``writes``: all that this request took, those of its history too. ``new``: the conversation began with it."""

    conversation: str | None
    new: bool
    reply: Reply
    writes: tuple[WriteRecord, ...]


def check_name(name: object, param: str) -> str:
    """A conversation's name: it may become a folder's. Raises RequestError."""
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise _bad(
            f"{param} must be 1 to 64 letters, digits, '.', '_' or '-', the first a letter or a digit", param
        )
    return name


def parse_request(body: bytes, header: str | None, config: RunConfig) -> ChatRequest:
    """``header``: X-Conversation-Id. Raises RequestError."""
    try:
        data = json.loads(body)
    except (ValueError, RecursionError):
        raise _bad("the body is not JSON", None) from None
    if not isinstance(data, dict):
        raise _bad("the body must be a JSON object", None)
    for key, allowed in _NEUTRAL.items():
        if (value := data.get(key)) is not None and not any(
            value == one and isinstance(value, bool) == isinstance(one, bool) for one in allowed
        ):
            raise _bad(f"{key} is not supported: leave it out", key)
    system_prompt, turns = _messages(data.get("messages"))
    new = len(turns)
    while new > 0 and turns[new - 1].role == "user":
        new -= 1
    if new == len(turns):
        raise _bad("the last message must be the user's", "messages")
    options = data.get("stream_options") or {}
    return ChatRequest(
        model=_typed(data, "model", str, ""),
        conversation=_conversation(data, header),
        system_prompt=system_prompt,
        history=turns[:new],
        turns=tuple(turn.text for turn in turns[new:]),
        max_tokens=_max_tokens(data, config.sampling.max_answer_tokens),
        temperature=_temperature(data, config.assistant.temperature),
        stream=_typed(data, "stream", bool, False),
        usage_in_stream=isinstance(options, dict) and options.get("include_usage") is True,
    )


def _conversation(data: Mapping[str, Any], header: str | None) -> str | None:
    field = data.get("conversation")
    if isinstance(field, dict):  # as in OpenAI's Responses
        field = field.get("id")
    if field is not None and header is not None and field != header:
        raise _bad("the field conversation and the header X-Conversation-Id differ", "conversation")
    name = header if field is None else field
    return None if name is None else check_name(name, "conversation")


def _messages(messages: object) -> tuple[str | None, tuple[Turn, ...]]:
    if not isinstance(messages, list) or not messages:
        raise _bad("messages must be a list with one message or more", "messages")
    system, turns = None, []
    for place, message in enumerate(messages):
        where = f"messages[{place}]"
        if not isinstance(message, dict):
            raise _bad(f"{where} must be an object", where)
        role, text = message.get("role"), _content(message.get("content"), where)
        if role in ("system", "developer"):
            if place > 0:
                raise _bad(f"{where}: a system message can only be the first", where)
            system = text
        elif role in ("user", "assistant"):
            turns.append(Turn("user" if role == "user" else "assistant", text))
        else:
            raise _bad(f"{where}.role must be system, user or assistant", where)
    return system, tuple(turns)


def _content(content: object, where: str) -> str:
    """Text, or a list of text parts."""
    if isinstance(content, list) and all(
        isinstance(part, dict) and part.get("type") == "text" for part in content
    ):
        content = "\n".join(part["text"] if isinstance(part.get("text"), str) else "" for part in content)
    if not isinstance(content, str) or not content.strip():
        raise _bad(f"{where}.content must be text that is not empty", where)
    return content.encode(
        "utf-8", errors="replace"
    ).decode()  # half a surrogate pair is no text that a tokenizer takes


def _max_tokens(data: Mapping[str, Any], most: int) -> int:
    """A bound, so a larger one than ours changes nothing that is promised."""
    given = [data[key] for key in ("max_completion_tokens", "max_tokens") if data.get(key) is not None]
    if not given:
        return most
    if not isinstance(given[0], int) or isinstance(given[0], bool) or given[0] < 1:
        raise _bad("max_tokens must be a whole number, 1 or more", "max_tokens")
    return min(given[0], most)


def _temperature(data: Mapping[str, Any], default: float) -> float:
    value = data.get("temperature")
    if value is None:
        return default
    if (
        not isinstance(value, int | float)
        or isinstance(value, bool)
        or not math.isfinite(value)
        or not 0 <= value <= 2
    ):
        raise _bad("temperature must be a number, 0 to 2", "temperature")
    return float(value)


def _typed(data: Mapping[str, Any], key: str, kind: type[Any], default: Any) -> Any:
    value = data.get(key)
    if value is None:
        return default
    if not isinstance(value, kind):
        raise _bad(f"{key} must be {'true or false' if kind is bool else 'a text'}", key)
    return value


def _bad(message: str, param: str | None) -> RequestError:
    return RequestError(400, message, param, "invalid_value")


# --- answers -------------------------------------------------------------------------------------------------------------------------------------


def error_body(status: int, message: str, param: str | None, code: str) -> dict[str, Any]:
    kind = (
        "invalid_request_error"
        if status < 500 and status != 429
        else "rate_limit_error"
        if status == 429
        else "server_error"
    )
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def completion(model: str, answer: Answer) -> dict[str, Any]:
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": answer.reply.text},
        "finish_reason": answer.reply.finish_reason,
        "logprobs": None,
    }
    return {
        **_head(model, "chat.completion"),
        "choices": [choice],
        "usage": _usage(answer.reply),
        "engram": _engram(answer),
    }


def completion_events(model: str, answer: Answer, with_usage: bool) -> Iterator[str]:
    """Server-sent events: the answer in one piece, then how it ended, as OpenAI's chunks."""
    head = _head(model, "chat.completion.chunk")
    for delta, reason in (
        ({"role": "assistant", "content": answer.reply.text}, None),
        ({}, answer.reply.finish_reason),
    ):
        choice = {"index": 0, "delta": delta, "finish_reason": reason, "logprobs": None}
        yield _event({**head, "choices": [choice], **({"engram": _engram(answer)} if reason else {})})
    if with_usage:
        yield _event({**head, "choices": [], "usage": _usage(answer.reply)})
    yield "data: [DONE]\n\n"


def describe_writes(writes: Sequence[WriteRecord]) -> list[dict[str, Any]]:
    """Without what is NaN: the losses of a write that did not happen."""
    keys = ("outcome", "reason", "revision", "steps", "seconds", "loss_before", "loss_after")
    lines: list[dict[str, Any]] = []
    for record in writes:
        values = {key: getattr(record, key) for key in keys}
        numbers = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in values.items()
        }
        lines.append(
            {
                **numbers,
                "flashcards": [
                    {"question": card.question, "answer": card.answer} for card in record.flashcards
                ],
            }
        )
    return lines


def _head(model: str, kind: str) -> dict[str, Any]:
    return {"id": f"chatcmpl-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": model}


def _usage(reply: Reply) -> dict[str, int]:
    """The context that the answer was sampled from, not what the request held: most of that may be in the weights by now."""
    total = reply.prompt_tokens + reply.reply_tokens
    return {
        "prompt_tokens": reply.prompt_tokens,
        "completion_tokens": reply.reply_tokens,
        "total_tokens": total,
    }


def _engram(answer: Answer) -> dict[str, Any]:
    return {
        "conversation": answer.conversation,
        "new": answer.new,
        "revision": answer.reply.revision,
        "writes": describe_writes(answer.writes),
    }


def _event(content: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(content)}\n\n"
