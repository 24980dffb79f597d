"""Answers of OpenAI's chat completions: replies as JSON, or as server-sent events; and errors.

Both endpoints use it: ``serve`` sends text as it is sampled, the one of a user's harness in one piece.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from openai.types import CompletionUsage, ErrorObject, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk, ChatCompletionMessage
from openai.types.chat.chat_completion import Choice as ChatChoice
from openai.types.chat.chat_completion import ChoiceLogprobs
from openai.types.chat.chat_completion_chunk import Choice as ChunkChoice
from openai.types.chat.chat_completion_chunk import ChoiceDelta
from openai.types.chat.chat_completion_chunk import ChoiceLogprobs as ChunkLogprobs
from pydantic import BaseModel

from actors.text.tools import ToolCall, before_calls
from actors.types import FinishReason


@dataclass(frozen=True, slots=True)
class SaidCall:
    """A tool call of a reply. ``arguments`` is JSON."""

    id: str
    name: str
    arguments: str

    @classmethod
    def of(cls, id: str, call: ToolCall) -> SaidCall:
        """A call that the model wrote."""
        return cls(id, call.name, json.dumps(dict(call.arguments), ensure_ascii=False))

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


def model_body(name: str) -> dict[str, Any]:
    return Model(id=name, object="model", created=0, owned_by="engram").model_dump(exclude_unset=True)


def models_body(name: str) -> dict[str, Any]:
    return {"object": "list", "data": [model_body(name)]}


@dataclass(frozen=True, slots=True)
class SaidChoice:
    """A reply as a client sees it. The ``calls`` take their place in its text."""

    text: str
    finish_reason: FinishReason
    calls: tuple[SaidCall, ...] = ()
    logprobs: ChoiceLogprobs | None = None

    @property
    def content(self) -> str | None:
        """What is said beside the calls. In the forms without a mark nothing stands before a call."""
        if not self.calls:
            return self.text
        return before_calls(self.text).strip() or None

    @property
    def reason(self) -> Literal["stop", "length", "tool_calls"]:
        return "tool_calls" if self.calls and self.finish_reason == "stop" else self.finish_reason


def completion(
    model: str, choices: Sequence[SaidChoice], counted: CompletionUsage, extra: Mapping[str, Any]
) -> str:
    """The answer as JSON. ``extra``: fields of an endpoint's own."""
    content = ChatCompletion(
        id=new_id("chatcmpl"),
        object="chat.completion",
        created=int(time.time()),
        model=model,
        choices=[_choice(place, choice) for place, choice in enumerate(choices)],
        usage=counted,
    )
    return to_json(content.model_copy(update=dict(extra)))


def completion_events(
    model: str, choice: SaidChoice, counted: CompletionUsage | None, extra: Mapping[str, Any]
) -> Iterator[str]:
    """Server-sent events: the answer in one piece, then how it ended. ``counted``: where it is asked for."""
    chunks = Chunks(model, counted is not None)
    yield chunks.begin(0, choice.content or "", choice.calls)
    yield chunks.end(0, choice, extra)
    if counted is not None:
        yield chunks.count(counted)
    yield DONE


DONE = "data: [DONE]\n\n"


class Chunks:
    """The server-sent events of one answer, as OpenAI's chunks. Each choice has a beginning and an end."""

    def __init__(self, model: str, counted: bool = False) -> None:
        """``counted``: a last event will count the tokens; the others then say that they do not."""
        self._empty = ChatCompletionChunk(
            id=new_id("chatcmpl"),
            object="chat.completion.chunk",
            created=int(time.time()),
            model=model,
            choices=[],
            **({"usage": None} if counted else {}),
        )

    def begin(self, index: int, text: str, calls: Sequence[SaidCall] = ()) -> str:
        told = {"tool_calls": _numbered(calls)} if calls else {}
        content = {"content": text or None} if calls else {"content": text}
        return self._of(index, {"role": "assistant", **content, **told})

    def text(self, index: int, text: str) -> str:
        return self._of(index, {"content": text})

    def calls(self, index: int, calls: Sequence[SaidCall]) -> str:
        return self._of(index, {"tool_calls": _numbered(calls)})

    def end(self, index: int, choice: SaidChoice, extra: Mapping[str, Any]) -> str:
        """How a choice ended, with the log-probs of all its tokens if it has any."""
        told = choice.logprobs
        logprobs = None if told is None else ChunkLogprobs(content=told.content, refusal=None)
        last = ChunkChoice(index=index, delta=ChoiceDelta(), finish_reason=choice.reason, logprobs=logprobs)
        return self._event({"choices": [last], **extra})

    def count(self, counted: CompletionUsage) -> str:
        return self._event({"usage": counted})

    def _of(self, index: int, delta: Mapping[str, Any]) -> str:
        told = ChoiceDelta.model_validate(delta)
        choice = ChunkChoice(index=index, delta=told, finish_reason=None, logprobs=None)
        return self._event({"choices": [choice]})

    def _event(self, change: Mapping[str, Any]) -> str:
        return f"data: {to_json(self._empty.model_copy(update=dict(change)))}\n\n"


def to_json(content: BaseModel) -> str:
    """Only the fields that were set. ASCII, because some readers of events end a line at U+2028."""
    return content.model_dump_json(exclude_unset=True, ensure_ascii=True)


def new_id(kind: str) -> str:
    return f"{kind}-{uuid.uuid4().hex}"


def usage(said: Said) -> CompletionUsage:
    return CompletionUsage(
        prompt_tokens=said.prompt_tokens,
        completion_tokens=said.reply_tokens,
        total_tokens=said.prompt_tokens + said.reply_tokens,
    )


def _choice(index: int, choice: SaidChoice) -> ChatChoice:
    told = {"tool_calls": [call.as_tool_call for call in choice.calls]} if choice.calls else {}
    message = ChatCompletionMessage.model_validate({"role": "assistant", "content": choice.content, **told})
    return ChatChoice(index=index, message=message, finish_reason=choice.reason, logprobs=choice.logprobs)


def _numbered(calls: Sequence[SaidCall]) -> list[dict[str, Any]]:
    return [{"index": place, **call.as_tool_call} for place, call in enumerate(calls)]
