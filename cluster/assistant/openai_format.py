"""OpenAI's chat completions as ``serve`` reads them, see actors/endpoint/ for what all endpoints share.

    JSON --> _Body --> ChatRequest        what cannot be done is refused by name: the list of fields is closed

The field ``conversation`` is ours. A message that ``serve`` itself has sent is taken back as it was.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field

from actors.endpoint import history
from actors.endpoint.requests import Body, bad_value, checked, only
from actors.speech import Decoding
from actors.text.tools import Tool, written_calls
from cluster.assistant.answering import Heard, Manner, unheard
from cluster.assistant.calling import CHOICES, CLOSED, Calling, Choice, Function, calling
from cluster.assistant.known import Line
from configs.schema import RunConfig

MOST_CHOICES = 16
_MOST_STOPS = 16
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_NAME_RULE = "1 to 64 letters, digits, '.', '_' or '-', the first a letter or a digit"
_ANY_OBJECT = '{"type": "object"}'
_NUMBER = "a number, {} to {}"
_TOKEN_ID = re.compile(r"[0-9]{1,9}")

Number = Annotated[float, Field(allow_inf_nan=False)]


# --- what a request may hold ----------------------------------------------------------------------------


class Message(history.Message):
    """One message of a request. The last fields come back from our own answers, as the client kept them."""

    model_config = CLOSED

    name: Annotated[object, only()] = None
    refusal: Annotated[object, only()] = None
    annotations: Annotated[object, only([])] = None
    audio: Annotated[object, only()] = None
    function_call: Annotated[object, only()] = None


class _Tool(BaseModel):
    model_config = CLOSED

    type: Literal["function"] = Field(description="function")
    function: Function = Field(description="an object with name, description and parameters")


class JsonSchema(BaseModel):
    """A schema by name, as OpenAI has it."""

    model_config = CLOSED

    name: str = Field(description="a text")
    schema_: dict[str, Any] = Field(alias="schema", description="a JSON schema")
    description: str | None = Field(None, description="a text")
    strict: bool | None = Field(None, description="true or false")  # a reply always keeps to it


class _ResponseFormat(BaseModel):
    model_config = CLOSED

    type: Literal["text", "json_object", "json_schema"] = Field(
        description="text, json_object or json_schema"
    )
    json_schema: JsonSchema | None = Field(None, description="an object with name and schema")


class StreamOptions(BaseModel):
    """Of a request with stream: true."""

    model_config = CLOSED

    include_usage: bool | None = Field(None, description="true or false")
    include_obfuscation: Annotated[object, only(False)] = None


class Sampled(Body):
    """The sampling settings that every route takes. The last fields change nothing in an answer."""

    model_config = CLOSED

    conversation: object = None
    temperature: Number | None = Field(None, ge=0, le=2, description=_NUMBER.format(0, 2))
    top_p: Number | None = Field(None, gt=0, le=1, description="a number above 0, to 1")
    top_k: int | None = Field(None, ge=-1, description="a whole number; -1 or 0 for all tokens")
    min_p: Number | None = Field(None, ge=0, le=1, description=_NUMBER.format(0, 1))
    presence_penalty: Number | None = Field(None, ge=-2, le=2, description=_NUMBER.format(-2, 2))
    frequency_penalty: Number | None = Field(None, ge=-2, le=2, description=_NUMBER.format(-2, 2))
    repetition_penalty: Number | None = Field(None, gt=0, le=2, description="a number above 0, to 2")
    logit_bias: dict[str, Number] | None = Field(None, description="an object of numbers by token id")
    seed: int | None = Field(None, description="a whole number")
    n: int | None = Field(None, ge=1, le=MOST_CHOICES, description=f"a whole number, 1 to {MOST_CHOICES}")
    stop: Annotated[
        list[Annotated[str, Field(min_length=1)]] | None,
        BeforeValidator(lambda stop: [stop] if isinstance(stop, str) else stop),
    ] = Field(
        None,
        max_length=_MOST_STOPS,
        description=f"a text or a list of at most {_MOST_STOPS} texts, none of them empty",
    )
    user: object = None
    metadata: object = None
    service_tier: object = None
    safety_identifier: object = None
    prompt_cache_key: object = None
    store: Annotated[object, only(False)] = None

    def manner(self, calling: Calling, top_logprobs: int, heard: Heard = unheard) -> Manner:
        """Raises RequestError."""
        decoding = Decoding(
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=max(0, self.top_k or 0),
            min_p=self.min_p or 0.0,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            repetition_penalty=1.0 if self.repetition_penalty is None else self.repetition_penalty,
            logit_bias=tuple(_bias(token, value) for token, value in (self.logit_bias or {}).items()),
            top_logprobs=top_logprobs,
            json_schema=calling.json_schema,
        )
        names = tuple(tool.name for tool in calling.tools)
        return Manner(decoding, tuple(self.stop or ()), self.seed, self.n or 1, names, heard)


class _Body(Sampled):
    messages: list[Message] = Field(min_length=1, description="a list with one message or more")
    stream_options: StreamOptions | None = Field(None, description="an object")
    logprobs: bool | None = Field(None, description="true or false")
    top_logprobs: int | None = Field(None, ge=0, le=20, description="a whole number, 0 to 20")
    response_format: _ResponseFormat | None = Field(None, description="an object with a type")
    tools: list[_Tool] | None = Field(None, description="a list of functions")
    tool_choice: Choice = Field(None, description=CHOICES)
    parallel_tool_calls: bool | None = Field(None, description="true or false")

    @property
    def usage_in_stream(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)


# --- what a request asks --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Places:
    """What a route calls the fields that a later error names, or an answer."""

    messages: str = "messages"
    system: str = "messages"
    schema: str = "response_format"
    limit: str = "max_tokens"


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """A request that can be answered.

    ``turns`` are the user's or tools' new turns, one or more; ``history`` is what stands before them.
    ``system_prompt`` and ``conversation`` are None if the request has none. ``asked_tokens``: its own bound,
    where that is more than ``max_tokens``.
    """

    conversation: str | None
    system_prompt: str | None
    history: tuple[Line, ...]
    turns: tuple[Line, ...]
    tools: tuple[Tool, ...]
    max_tokens: int
    asked_tokens: int | None
    temperature: float
    manner: Manner
    logprobs: bool
    stream: bool
    usage_in_stream: bool
    places: Places


def parse_request(data: Mapping[str, Any], header: str | None, config: RunConfig) -> ChatRequest:
    """Check a request. ``header`` is X-Conversation-Id. Raises RequestError."""
    body = checked(_Body, data)
    if body.top_logprobs and not body.logprobs:
        raise bad_value("top_logprobs needs logprobs: true", "top_logprobs")
    functions = {f"tools[{place}].function": tool.function for place, tool in enumerate(body.tools or ())}
    parallel, schema = body.parallel_tool_calls, _schema(body.response_format)
    called = calling(functions, body.tool_choice, parallel, schema)
    manner = body.manner(called, body.top_logprobs or 0)
    lines = [line for place, message in enumerate(body.messages) if (line := _line(message, place))]
    places = Places(
        schema="tool_choice" if called.forced else "response_format",
        limit="max_completion_tokens" if body.max_completion_tokens else "max_tokens",
    )
    return chat_request(body, header, config, lines, called.tools, manner, bool(body.logprobs), places)


def chat_request(
    body: Sampled,
    header: str | None,
    config: RunConfig,
    lines: Sequence[Line | str],
    tools: tuple[Tool, ...],
    manner: Manner,
    logprobs: bool,
    places: Places,
) -> ChatRequest:
    """Put a request together. ``lines``: its messages in order, a system message as a plain text."""
    conversation = _conversation(body.conversation, header)
    if conversation is not None and manner.choices > 1:
        raise bad_value("n must be 1 in a conversation: one reply goes on", "n")
    system_prompt, history, turns = _split(lines, places)
    limit, asked = config.sampling.max_answer_tokens, body.most_tokens
    return ChatRequest(
        conversation=conversation,
        system_prompt=system_prompt,
        history=history,
        turns=turns,
        tools=tools,
        max_tokens=min(asked or limit, limit),
        asked_tokens=asked if asked and asked > limit else None,
        temperature=config.assistant.temperature if body.temperature is None else body.temperature,
        manner=manner,
        logprobs=logprobs,
        stream=body.stream or False,
        usage_in_stream=body.usage_in_stream,
        places=places,
    )


def check_name(name: object, param: str) -> str:
    """Return ``name`` if it can name a conversation, and so a folder. Raises RequestError."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise bad_value(f"{param} must be {_NAME_RULE}", param)
    return name


def replied(text: str, calls: Iterable[tuple[str, str]], place: str = "") -> Line:
    """A reply as it stands in a history; the calls are (name, arguments)."""
    return Line("assistant", "\n".join([*filter(None, [text.strip()]), *written_calls(calls)]), place)


def kept_schema(kind: str, schema: Mapping[str, Any] | None, place: str) -> str:
    """The schema that a reply of this ``kind`` keeps to, as JSON; "" for any text. Raises RequestError."""
    match kind:
        case "text":
            return ""
        case "json_object":
            return _ANY_OBJECT
    if schema is None:
        raise bad_value(f"{place} must be a JSON schema", place)
    return json.dumps(schema, ensure_ascii=False)


def _conversation(field: object, header: str | None) -> str | None:
    if isinstance(field, dict):  # as in OpenAI's Responses
        field = field.get("id")
    if field is not None and header is not None and field != header:
        raise bad_value("the field conversation and the header X-Conversation-Id differ", "conversation")
    name = header if field is None else field
    return None if name is None else check_name(name, "conversation")


def _line(message: Message, place: int) -> Line | str:
    """A message as it is read; a system message is a plain text. "" for one that says nothing."""
    text, where = message.content.strip(), f"messages[{place}]"
    match message.role:
        case "system" | "developer":
            return text
        case "assistant":
            calls = [(call.function.name, call.function.arguments) for call in message.tool_calls or ()]
            return replied(text, calls, where)
        case role:
            if role == "user" and not text:
                raise bad_value(f"{where}.content must be text that is not empty", f"{where}.content")
            return Line(role, text, where)


def _split(
    lines: Sequence[Line | str], places: Places
) -> tuple[str | None, tuple[Line, ...], tuple[Line, ...]]:
    """The system prompt, the history, and the turns after the last assistant turn.

    System messages at the beginning are one prompt. A template has no place for later ones: each is a turn of
    the user's.
    """
    first = next((place for place, line in enumerate(lines) if isinstance(line, Line)), len(lines))
    system_prompt = "\n\n".join(line for line in lines[:first] if isinstance(line, str) and line)
    rest: list[Line] = []
    for line in lines[first:]:
        said = Line("user", line) if isinstance(line, str) else line
        if rest and said.role == rest[-1].role == "assistant":  # some send a text and its calls apart
            before = rest.pop()
            said = Line("assistant", f"{before.text}\n{said.text}".strip(), before.place)
        rest.append(said)
    new = len(rest)
    while new > 0 and rest[new - 1].role != "assistant":
        new -= 1
    if new == len(rest):
        raise bad_value("the last message must be the user's, or a tool's", places.messages)
    return system_prompt or None, tuple(rest[:new]), tuple(rest[new:])


def _schema(wanted: _ResponseFormat | None) -> str:
    if wanted is None:
        return ""
    schema = wanted.json_schema.schema_ if wanted.json_schema else None
    return kept_schema(wanted.type, schema, "response_format.json_schema.schema")


def _bias(token: str, value: float) -> tuple[int, float]:
    if not _TOKEN_ID.fullmatch(token) or not -100 <= value <= 100:
        raise bad_value("logit_bias must be numbers, -100 to 100, by token id", "logit_bias")
    return int(token), value
