"""Answers of OpenAI's chat completions: one reply as JSON, or as server-sent events; and errors.

A reply is sampled whole before its first event is sent: a stream is the reply in one piece.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from openai.types import CompletionUsage, ErrorObject, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk, ChatCompletionMessage
from openai.types.chat.chat_completion import Choice
from openai.types.chat.chat_completion_chunk import Choice as ChunkChoice
from openai.types.chat.chat_completion_chunk import ChoiceDelta
from pydantic import BaseModel

from actors.types import FinishReason


@dataclass(frozen=True, slots=True)
class SaidCall:
    """A tool call of a reply. ``arguments`` is JSON."""

    id: str
    name: str
    arguments: str

    @property
    def as_tool_call(self) -> dict[str, Any]:
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": self.id, "type": "function", "function": function}


class Said(Protocol):
    """A reply. ``prompt_tokens`` is the context that it was sampled from: less than a long history."""

    @property
    def text(self) -> str: ...

    @property
    def finish_reason(self) -> FinishReason: ...

    @property
    def prompt_tokens(self) -> int: ...

    @property
    def reply_tokens(self) -> int: ...


def error_body(status: int, message: str, param: str | None, code: str) -> dict[str, Any]:
    kind = "invalid_request_error" if status < 500 else "server_error"
    kind = "rate_limit_error" if status == 429 else kind
    error = ErrorObject(message=message, type=kind, param=param, code=code)
    return {"error": error.model_dump(exclude_unset=True)}


def models_body(name: str) -> dict[str, Any]:
    model = Model(id=name, object="model", created=0, owned_by="engram")
    return {"object": "list", "data": [model.model_dump(exclude_unset=True)]}


def completion(model: str, said: Said, extra: dict[str, Any], calls: Sequence[SaidCall] = ()) -> str:
    """The answer as JSON. ``extra``: fields of an endpoint's own. ``calls`` take their place in the text."""
    told = [call.as_tool_call for call in calls]
    message = ChatCompletionMessage.model_validate({"role": "assistant", **_content(said, told)})
    content = ChatCompletion(
        id=_new_id(),
        object="chat.completion",
        created=int(time.time()),
        model=model,
        choices=[Choice(index=0, message=message, finish_reason=_reason(said, calls), logprobs=None)],
        usage=_usage(said),
    )
    return _to_json(content.model_copy(update=extra))


def completion_events(
    model: str, said: Said, with_usage: bool, extra: dict[str, Any], calls: Sequence[SaidCall] = ()
) -> Iterator[str]:
    """Server-sent events: the answer in one piece, then how it ended, as OpenAI's chunks."""
    told = [{"index": place, **call.as_tool_call} for place, call in enumerate(calls)]
    text = ChoiceDelta.model_validate({"role": "assistant", **_content(said, told)})
    first = ChunkChoice(index=0, delta=text, finish_reason=None, logprobs=None)
    last = ChunkChoice(index=0, delta=ChoiceDelta(), finish_reason=_reason(said, calls), logprobs=None)
    changes: list[dict[str, object]] = [{"choices": [first]}, {"choices": [last], **extra}]
    if with_usage:
        changes.append({"usage": _usage(said)})

    created = int(time.time())
    chunk = ChatCompletionChunk(
        id=_new_id(), object="chat.completion.chunk", created=created, model=model, choices=[]
    )
    for change in changes:
        yield f"data: {_to_json(chunk.model_copy(update=change))}\n\n"
    yield "data: [DONE]\n\n"


def _content(said: Said, calls: Sequence[dict[str, Any]]) -> dict[str, Any]:
    if not calls:
        return {"content": said.text}
    before, mark, _ = said.text.partition("<tool_call>")  # in the other forms nothing stands before a call
    return {"content": (before.strip() if mark else "") or None, "tool_calls": calls}


def _reason(said: Said, calls: Sequence[SaidCall]) -> Literal["stop", "length", "tool_calls"]:
    return "tool_calls" if calls and said.finish_reason == "stop" else said.finish_reason


def _to_json(content: BaseModel) -> str:
    """Only the fields that were set. ASCII, because some readers of events end a line at U+2028."""
    return content.model_dump_json(exclude_unset=True, ensure_ascii=True)


def _new_id() -> str:
    return f"chatcmpl-{uuid.uuid4().hex}"


def _usage(said: Said) -> CompletionUsage:
    return CompletionUsage(
        prompt_tokens=said.prompt_tokens,
        completion_tokens=said.reply_tokens,
        total_tokens=said.prompt_tokens + said.reply_tokens,
    )
