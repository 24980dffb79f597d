"""OpenAI's chat completions, as far as they mean something here.

    request:  JSON --pydantic--> _Body --> ChatRequest        what the engine cannot do is refused by name
    answer:   Reply --> openai.types.chat --> JSON, or server-sent events

Two additions are ours: the field ``conversation`` of a request, and the object ``engram`` of an answer.
"""

from __future__ import annotations

import json
import re
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from openai.types import CompletionUsage, ErrorObject
from openai.types.chat import ChatCompletion, ChatCompletionChunk, ChatCompletionMessage
from openai.types.chat.chat_completion import Choice
from openai.types.chat.chat_completion_chunk import Choice as ChunkChoice
from openai.types.chat.chat_completion_chunk import ChoiceDelta
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError

from actors.types import WriteRecord
from cluster.assistant.conversation import Reply
from configs.schema import RunConfig

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_WRITE_FIELDS = (
    "outcome", "reason", "revision", "steps", "seconds", "loss_before", "loss_after", "flashcards",
)  # fmt: skip
_NAME_RULE = "1 to 64 letters, digits, '.', '_' or '-', the first a letter or a digit"


class RequestError(Exception):
    """A client's mistake, in OpenAI's terms."""

    def __init__(self, status: int, message: str, param: str | None, code: str) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code


# --- requests -------------------------------------------------------------------------------------------


def _only(*neutral: object) -> AfterValidator:
    """Accept null and ``neutral``, which change nothing.

    Any other value would change the answer, so refuse it.
    """

    def check(value: object) -> object:
        # In Python True equals 1, in JSON it does not.
        same = (value == other and isinstance(value, bool) == isinstance(other, bool) for other in neutral)
        if value is None or any(same):
            return value
        allowed = ", or give " + " or ".join(map(json.dumps, neutral)) if neutral else ""
        raise PydanticCustomError("unsupported", f"is not supported: leave it out{allowed}")

    return AfterValidator(check)


def _text(content: object) -> object:
    """Join a list of text parts. Replace half a surrogate pair: no tokenizer takes it."""
    if isinstance(content, list) and all(isinstance(part, dict) for part in content):
        parts = [part.get("text", "") for part in content if part.get("type") == "text"]
        if len(parts) == len(content) and all(isinstance(part, str) for part in parts):
            content = "\n".join(parts)
    return content.encode("utf-8", errors="replace").decode() if isinstance(content, str) else content


class Message(BaseModel):
    """One message of a request."""

    model_config = ConfigDict(strict=True, frozen=True)

    role: Literal["system", "developer", "user", "assistant"] = Field(description="system, user or assistant")
    content: Annotated[str, BeforeValidator(_text)] = Field(
        pattern=r"\S", description="text that is not empty"
    )


class _Body(BaseModel):
    """The JSON of a request. ``description`` completes the message "FIELD must be ..."."""

    model_config = ConfigDict(strict=True, frozen=True)

    model: str | None = Field(None, description="a text")
    messages: list[Message] = Field(min_length=1, description="a list with one message or more")
    conversation: object = None
    max_completion_tokens: int | None = Field(None, ge=1, description="a whole number, 1 or more")
    max_tokens: int | None = Field(None, ge=1, description="a whole number, 1 or more")
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False, description="a number, 0 to 2")
    stream: bool | None = Field(None, description="true or false")
    stream_options: object = None

    n: Annotated[object, _only(1)] = None
    top_p: Annotated[object, _only(1)] = None
    presence_penalty: Annotated[object, _only(0)] = None
    frequency_penalty: Annotated[object, _only(0)] = None
    logprobs: Annotated[object, _only(False)] = None
    top_logprobs: Annotated[object, _only(0)] = None
    logit_bias: Annotated[object, _only({})] = None
    stop: Annotated[object, _only([])] = None
    seed: Annotated[object, _only()] = None
    tools: Annotated[object, _only([])] = None
    functions: Annotated[object, _only([])] = None
    response_format: Annotated[object, _only({"type": "text"})] = None
    modalities: Annotated[object, _only(["text"])] = None
    audio: Annotated[object, _only()] = None


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


def parse_request(content: bytes, header: str | None, config: RunConfig) -> ChatRequest:
    """Check the JSON of a request. ``header`` is X-Conversation-Id. Raises RequestError."""
    try:
        data = json.loads(content)  # not pydantic's parser: it refuses half a surrogate pair
    except (ValueError, RecursionError):
        raise _bad("the body is not JSON", None) from None
    if not isinstance(data, dict):
        raise _bad("the body must be a JSON object", None)
    try:
        body = _Body.model_validate(data)
    except ValidationError as error:
        raise _refusal(error) from None
    system_prompt, history, turns = _split(body.messages)
    # Both bounds are 1 or more. A bound larger than ours changes nothing that is promised.
    limit = config.sampling.max_answer_tokens
    default_temperature = config.assistant.temperature
    options = body.stream_options
    return ChatRequest(
        model=body.model or "",
        conversation=_conversation(body.conversation, header),
        system_prompt=system_prompt,
        history=history,
        turns=turns,
        max_tokens=min(body.max_completion_tokens or body.max_tokens or limit, limit),
        temperature=default_temperature if body.temperature is None else body.temperature,
        stream=body.stream or False,
        usage_in_stream=isinstance(options, dict) and options.get("include_usage") is True,
    )


def check_name(name: object, param: str) -> str:
    """Return ``name`` if it can name a conversation, and so a folder. Raises RequestError."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise _bad(f"{param} must be {_NAME_RULE}", param)
    return name


def _conversation(field: object, header: str | None) -> str | None:
    if isinstance(field, dict):  # as in OpenAI's Responses
        field = field.get("id")
    if field is not None and header is not None and field != header:
        raise _bad("the field conversation and the header X-Conversation-Id differ", "conversation")
    name = header if field is None else field
    return None if name is None else check_name(name, "conversation")


def _split(messages: Sequence[Message]) -> tuple[str | None, tuple[Message, ...], tuple[str, ...]]:
    """The system prompt, the history, and the user turns after the last assistant turn."""
    system_prompt = messages[0].content if messages[0].role in ("system", "developer") else None
    start = 0 if system_prompt is None else 1
    for place, message in enumerate(messages[start:], start):
        if message.role in ("system", "developer"):
            where = f"messages[{place}]"
            raise _bad(f"{where}: a system message can only be the first", where)
    new = len(messages)
    while new > start and messages[new - 1].role == "user":
        new -= 1
    if new == len(messages):
        raise _bad("the last message must be the user's", "messages")
    turns = tuple(message.content for message in messages[new:])
    return system_prompt, tuple(messages[start:new]), turns


def _refusal(error: ValidationError) -> RequestError:
    """The first fault as one line, e.g. "messages[0].role must be system, user or assistant"."""
    first = error.errors(include_url=False)[0]
    place, rule = "", ""
    model: type[BaseModel] = _Body
    for part in first["loc"]:
        if isinstance(part, int):
            place, rule, model = f"{place}[{part}]", "an object", Message
        else:
            place, rule = f"{place}.{part}" if place else part, model.model_fields[part].description or ""
    message = f"{place} {first['msg']}" if first["type"] == "unsupported" else f"{place} must be {rule}"
    return _bad(message, place)


def _bad(message: str, param: str | None) -> RequestError:
    return RequestError(400, message, param, "invalid_value")


# --- answers --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Answer:
    """What a request brought. ``writes`` are all that it caused; ``new``: the conversation began with it."""

    conversation: str | None
    new: bool
    reply: Reply
    writes: tuple[WriteRecord, ...]


@dataclass(frozen=True, slots=True)
class Engram:
    """Our addition to an answer. ``revision`` is that of the fast weights that answered."""

    conversation: str | None
    new: bool
    revision: int
    writes: tuple[dict[str, Any], ...]


class _Completion(ChatCompletion):
    engram: Engram


class _Chunk(ChatCompletionChunk):
    engram: Engram | None = None


def error_body(status: int, message: str, param: str | None, code: str) -> dict[str, Any]:
    kind = "invalid_request_error" if status < 500 else "server_error"
    kind = "rate_limit_error" if status == 429 else kind
    error = ErrorObject(message=message, type=kind, param=param, code=code)
    return {"error": error.model_dump(exclude_unset=True)}


def completion(model: str, answer: Answer) -> str:
    """The answer as JSON."""
    reply = answer.reply
    message = ChatCompletionMessage(role="assistant", content=reply.text)
    content = _Completion(
        id=_new_id(),
        object="chat.completion",
        created=int(time.time()),
        model=model,
        choices=[Choice(index=0, message=message, finish_reason=reply.finish_reason, logprobs=None)],
        usage=_usage(reply),
        engram=_engram(answer),
    )
    return _to_json(content)


def completion_events(model: str, answer: Answer, with_usage: bool) -> Iterator[str]:
    """Server-sent events: the answer in one piece, then how it ended, as OpenAI's chunks."""
    text = ChoiceDelta(role="assistant", content=answer.reply.text)
    reason = answer.reply.finish_reason
    first = ChunkChoice(index=0, delta=text, finish_reason=None, logprobs=None)
    last = ChunkChoice(index=0, delta=ChoiceDelta(), finish_reason=reason, logprobs=None)
    changes: list[dict[str, object]] = [{"choices": [first]}, {"choices": [last], "engram": _engram(answer)}]
    if with_usage:
        changes.append({"usage": _usage(answer.reply)})

    created = int(time.time())
    chunk = _Chunk(id=_new_id(), object="chat.completion.chunk", created=created, model=model, choices=[])
    for change in changes:
        yield f"data: {_to_json(chunk.model_copy(update=change))}\n\n"
    yield "data: [DONE]\n\n"


def summarize(record: WriteRecord) -> dict[str, Any]:
    """One write, for clients. In JSON the losses of a write that did not happen are null."""
    return {name: getattr(record, name) for name in _WRITE_FIELDS}


def _to_json(content: BaseModel) -> str:
    """Only the fields that were set. ASCII, because some readers of events end a line at U+2028."""
    return content.model_dump_json(exclude_unset=True, ensure_ascii=True)


def _new_id() -> str:
    return f"chatcmpl-{uuid.uuid4().hex}"


def _usage(reply: Reply) -> CompletionUsage:
    """Counts the context that the answer was sampled from.

    Most of a long request is in the weights then.
    """
    return CompletionUsage(
        prompt_tokens=reply.prompt_tokens,
        completion_tokens=reply.reply_tokens,
        total_tokens=reply.prompt_tokens + reply.reply_tokens,
    )


def _engram(answer: Answer) -> Engram:
    return Engram(
        answer.conversation, answer.new, answer.reply.revision, tuple(map(summarize, answer.writes))
    )
