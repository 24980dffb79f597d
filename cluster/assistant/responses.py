"""OpenAI's Responses, in the form that keeps nothing: a client sends its history with every request.

    JSON --> _Body --> ChatRequest --> a turn as a chat completion's --> a response object, or its events

What would ask the server to remember a response (previous_response_id, store) is refused: ``conversation``
names a conversation that does.
"""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo
from pydantic_core import PydanticCustomError

from actors.endpoint.answers import SaidCall, SaidChoice, new_id
from actors.endpoint.requests import Role, bad_value, checked, joined, only
from cluster.assistant.calling import CHOICES, CLOSED, Choice, Function, calling
from cluster.assistant.known import Line
from cluster.assistant.openai_answers import Answer
from cluster.assistant.openai_format import (
    ChatRequest,
    Places,
    Sampled,
    chat_request,
    kept_schema,
    replied,
)
from cluster.assistant.routes import Service, named_by
from cluster.assistant.streaming import Stream
from configs.files import dump_json
from configs.schema import RunConfig


def _of(*kinds: str) -> AfterValidator:
    """Items of these ``kinds`` need the field, and no others may have it."""

    def check(value: object, info: ValidationInfo) -> object:
        kind = info.data.get("type")
        if value is None and kind in kinds:
            raise PydanticCustomError("missing", "is missing")
        if value is not None and kind not in kinds:
            raise PydanticCustomError("unsupported", f"is not a field of a {kind}: leave it out")
        return value

    return AfterValidator(check)


_texts = joined("input_text", "output_text", "text")


class _Item(BaseModel):
    """An item of the input: a message, a call that was answered, or a call's result.

    The last fields come back from our own answers.
    """

    model_config = ConfigDict(**CLOSED, validate_default=True)

    type: Literal["message", "function_call", "function_call_output"] = Field(
        "message", description="message, function_call or function_call_output"
    )
    role: Annotated[Role | None, _of("message")] = Field(
        None, description="system, developer, user or assistant"
    )
    content: Annotated[str | None, _texts, _of("message")] = Field(None, description="text")
    name: Annotated[str | None, _of("function_call")] = Field(None, description="a text")
    arguments: Annotated[str | None, _of("function_call")] = Field(None, description="JSON in a text")
    call_id: Annotated[str | None, _of("function_call", "function_call_output")] = Field(
        None, description="a text"
    )
    output: Annotated[str | None, _texts, _of("function_call_output")] = Field(None, description="text")
    id: object = None
    status: object = None
    phase: object = None

    def line(self, place: str) -> Line | str:
        """The item as it is read; a system message is a plain text. Raises RequestError."""
        match self.type:
            case "function_call":
                return replied("", [(self.name or "", self.arguments or "")], place)
            case "function_call_output":
                return Line("tool", (self.output or "").strip(), place)
        text = (self.content or "").strip()
        if self.role in ("system", "developer"):
            return text
        if self.role == "user" and not text:
            raise bad_value(f"{place}.content must be text that is not empty", f"{place}.content")
        return Line("assistant" if self.role == "assistant" else "user", text, place)


class _Format(BaseModel):
    model_config = CLOSED

    type: Literal["text", "json_object", "json_schema"] = Field(
        description="text, json_object or json_schema"
    )
    name: str | None = Field(None, description="a text")
    schema_: dict[str, Any] | None = Field(None, alias="schema", description="a JSON schema")
    description: str | None = Field(None, description="a text")
    strict: bool | None = Field(None, description="true or false")


class _Text(BaseModel):
    model_config = CLOSED

    format: _Format | None = Field(None, description="an object with a type")
    verbosity: Annotated[object, only("medium")] = None


class _StreamOptions(BaseModel):
    model_config = CLOSED

    include_obfuscation: Annotated[object, only(False)] = None


class _Tool(Function):
    type: Literal["function"] = Field(description="function")


class _Body(Sampled):
    input: Annotated[
        list[_Item],
        BeforeValidator(
            lambda given: [{"role": "user", "content": given}] if isinstance(given, str) else given
        ),
    ] = Field(min_length=1, description="a text, or a list of messages, calls and results")
    instructions: str | None = Field(None, description="a text")
    max_output_tokens: int | None = Field(None, ge=1, description="a whole number, 1 or more")
    text: _Text | None = Field(None, description="an object with a format")
    tools: list[_Tool] | None = Field(None, description="a list of functions")
    tool_choice: Choice = Field(None, description=CHOICES)
    parallel_tool_calls: bool | None = Field(None, description="true or false")
    stream_options: _StreamOptions | None = Field(None, description="an object")
    max_tokens: Annotated[object, only()] = None  # type: ignore[assignment]
    max_completion_tokens: Annotated[object, only()] = None  # type: ignore[assignment]
    n: Annotated[int | None, only(1)] = None
    previous_response_id: Annotated[object, only()] = None
    background: Annotated[object, only(False)] = None
    truncation: Annotated[object, only("disabled")] = None
    include: Annotated[object, only([])] = None
    reasoning: Annotated[object, only({})] = None
    metadata: dict[str, str] | None = Field(None, description="an object of texts")

    @property
    def most_tokens(self) -> int | None:
        return self.max_output_tokens


def add_responses(routes: APIRouter, service: Service) -> None:
    @routes.post("/v1/responses")
    async def respond(request: Request) -> Response:
        body = checked(_Body, await service.read(request))
        asked = _asked(body, named_by(request), service.parts.opening.config)
        stream = await service.chat(request, asked)
        form = _Form(service.name, body)
        if asked.stream:
            return service.events(form.events(stream), stream)
        answer = await stream.whole()
        return Response(_json(form.response(answer)), media_type="application/json")


def _asked(body: _Body, header: str | None, config: RunConfig) -> ChatRequest:
    functions: dict[str, Function] = {f"tools[{place}]": tool for place, tool in enumerate(body.tools or ())}
    called = calling(functions, body.tool_choice, body.parallel_tool_calls, _schema(body.text))
    lines = [item.line(f"input[{place}]") for place, item in enumerate(body.input)]
    told = [body.instructions.strip()] if body.instructions else []
    places = Places(
        messages="input",
        system="instructions" if told else "input",
        schema="tool_choice" if called.forced else "text.format",
        limit="max_output_tokens",
    )
    manner = body.manner(called, 0)
    return chat_request(body, header, config, [*told, *lines], called.tools, manner, False, places)


def _schema(text: _Text | None) -> str:
    wanted = text.format if text else None
    return kept_schema(wanted.type, wanted.schema_, "text.format.schema") if wanted else ""


class _Form:
    """One answer in OpenAI's form: a message if something is said, and an item for each call."""

    def __init__(self, model: str, body: _Body) -> None:
        self._message_id = new_id("msg")
        self._head = {
            "id": new_id("resp"),
            "object": "response",
            "created_at": int(time.time()),
            "model": model,
            "instructions": body.instructions,
            "tools": [dict(tool) for tool in body.tools or ()],
            "tool_choice": body.tool_choice.as_of_responses if body.tool_choice else "auto",
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "metadata": body.metadata or {},
            "store": False,
            "error": None,
        }
        self._events = 0

    def response(self, answer: Answer) -> dict[str, Any]:
        (choice,), reply = answer.said, answer.reply
        cut = choice.finish_reason == "length"
        status = "incomplete" if cut else "completed"
        text = choice.content
        said = [self._message(text, status)] if text or not choice.calls else []
        usage = {
            "input_tokens": reply.prompt_tokens,
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens": reply.reply_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": reply.prompt_tokens + reply.reply_tokens,
        }
        return self._head | {
            "status": status,
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "output": [*said, *map(_call, choice.calls)],
            "usage": usage,
            "engram": json.loads(dump_json(answer.engram, indent=None)),
        }

    async def events(self, stream: Stream[Answer]) -> AsyncIterator[str]:
        """The answer as it comes."""
        begun = self._head | {"status": "in_progress", "output": [], "incomplete_details": None}
        yield self._event("response.created", response=begun)
        yield self._event("response.in_progress", response=begun)
        place = {"item_id": self._message_id, "output_index": 0, "content_index": 0}
        said = False
        async for _, text in stream.pieces():
            if not said:
                said = True
                for event in self._opening(place):
                    yield event
            yield self._event("response.output_text.delta", **place, delta=text, logprobs=[])
        answer = await stream.whole()
        (choice,), response = answer.said, self.response(answer)
        if not said and not choice.calls:  # nothing was said at all: an empty message
            said = True
            for event in self._opening(place):
                yield event
        for event in self._closing(choice, response, place if said else None):
            yield event
        yield self._event(f"response.{response['status']}", response=response)

    def _opening(self, place: Mapping[str, Any]) -> Iterator[str]:
        item = self._message(None, "in_progress") | {"content": []}
        yield self._event("response.output_item.added", output_index=0, item=item)
        yield self._event("response.content_part.added", **place, part=_part(""))

    def _closing(
        self, choice: SaidChoice, response: Mapping[str, Any], place: Mapping[str, Any] | None
    ) -> Iterator[str]:
        text = choice.content or ""
        if place is not None:
            yield self._event("response.output_text.done", **place, text=text, logprobs=[])
            yield self._event("response.content_part.done", **place, part=_part(text))
            item = self._message(text, response["status"])
            yield self._event("response.output_item.done", output_index=0, item=item)
        for index, call in enumerate(choice.calls, int(place is not None)):
            item = _call(call)
            where = {"item_id": item["id"], "output_index": index}
            begun = item | {"arguments": "", "status": "in_progress"}
            yield self._event("response.output_item.added", output_index=index, item=begun)
            kind, arguments = "response.function_call_arguments", call.arguments
            yield self._event(f"{kind}.delta", **where, delta=arguments)
            yield self._event(f"{kind}.done", **where, name=call.name, arguments=arguments)
            yield self._event("response.output_item.done", output_index=index, item=item)

    def _message(self, text: str | None, status: str) -> dict[str, Any]:
        content = [_part(text or "")]
        return {"id": self._message_id, "type": "message", "role": "assistant"} | {
            "status": status,
            "content": content,
        }

    def _event(self, kind: str, **fields: Any) -> str:
        number, self._events = self._events, self._events + 1
        return f"event: {kind}\ndata: {_json({'type': kind, 'sequence_number': number} | fields)}\n\n"


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": []}


def _call(call: SaidCall) -> dict[str, Any]:
    told = {"call_id": call.id, "name": call.name, "arguments": call.arguments}
    return {"id": f"fc_{call.id}", "type": "function_call", "status": "completed"} | told


def _json(value: Mapping[str, Any]) -> str:
    """ASCII, because some readers of events end a line at U+2028."""
    return json.dumps(value, ensure_ascii=True)
