"""Requests of OpenAI's chat completions: what every endpoint here accepts, and how it refuses the rest.

    bytes --read_json--> dict --checked--> a Body of the endpoint, or RequestError

Both endpoints use it: ``serve`` (cluster/assistant/) and the one of a user's harness (loopback.py). What
would change the answer and cannot be done is refused by name.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterable, Mapping
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError
from starlette.requests import ClientDisconnect

from actors.text.plain_text import encodable_value


class RequestError(Exception):
    """A client's mistake, in OpenAI's terms."""

    def __init__(self, status: int, message: str, param: str | None, code: str) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code


def bad_value(message: str, param: str | None) -> RequestError:
    return RequestError(400, message, param, "invalid_value")


def client_gone() -> RequestError:
    """Nobody receives this answer; the metrics count it."""
    return RequestError(499, "the client has gone", None, "client_gone")


def only(*neutral: object) -> AfterValidator:
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


def joined(*kinds: str) -> BeforeValidator:
    """Take a list of text parts of these ``kinds`` as one text."""

    def join(content: object) -> object:
        if isinstance(content, list) and all(
            isinstance(part, dict) and part.get("type") in kinds and isinstance(part.get("text"), str)
            for part in content
        ):
            return "\n".join(part["text"] for part in content)
        return content

    return BeforeValidator(join)


Text = Annotated[str, joined("text")]
Neutral = Annotated[object, only()]


class Body(BaseModel):
    """What all endpoints understand alike. ``description`` completes the message "FIELD must be ..."."""

    model_config = ConfigDict(strict=True, frozen=True)

    model: str | None = Field(None, description="a text")
    max_completion_tokens: int | None = Field(None, ge=1, description="a whole number, 1 or more")
    max_tokens: int | None = Field(None, ge=1, description="a whole number, 1 or more")
    stream: bool | None = Field(None, description="true or false")
    stream_options: object = None

    n: Annotated[object, only(1)] = None
    top_p: Annotated[object, only(1)] = None
    presence_penalty: Annotated[object, only(0)] = None
    frequency_penalty: Annotated[object, only(0)] = None
    logprobs: Annotated[object, only(False)] = None
    top_logprobs: Annotated[object, only(0)] = None
    logit_bias: Annotated[object, only({})] = None
    seed: Neutral = None
    tools: Annotated[object, only([])] = None
    functions: Annotated[object, only([])] = None
    response_format: Annotated[object, only({"type": "text"})] = None
    modalities: Annotated[object, only(["text"])] = None
    audio: Neutral = None

    @property
    def most_tokens(self) -> int | None:
        """The request's own bound of the reply."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def usage_in_stream(self) -> bool:
        options = self.stream_options
        return isinstance(options, dict) and options.get("include_usage") is True


Role = Literal["system", "developer", "user", "assistant"]
B = TypeVar("B", bound=Body)


async def read_json(
    content_type: str, stream: AsyncIterable[bytes], limit: int, setting: str = ""
) -> dict[str, Any]:
    """Read a body of at most ``limit`` bytes, which must be a JSON object. Raises RequestError.

    A browser asks before it sends JSON to another origin, and is refused. So web pages cannot talk to a local
    server. ``setting``: where the limit stands.
    """
    if content_type.partition(";")[0].strip().lower() != "application/json":
        raise RequestError(415, "the Content-Type must be application/json", None, "unsupported_media_type")
    body = bytearray()
    try:
        async for piece in stream:
            body += piece
            if len(body) > limit:
                message = f"the body is over {limit} bytes" + (f" ({setting})" if setting else "")
                raise RequestError(413, message, None, "body_too_large")
    except ClientDisconnect:
        raise client_gone() from None
    return parse_json(bytes(body))


def parse_json(content: bytes) -> dict[str, Any]:
    """The object in ``content``, all its texts ``encodable``. Raises RequestError."""
    try:
        # not pydantic's parser: it refuses half a surrogate pair
        data = encodable_value(json.loads(content, parse_constant=_refuse))
    except (ValueError, RecursionError):
        raise bad_value("the body is not JSON", None) from None
    if not isinstance(data, dict):
        raise bad_value("the body must be a JSON object", None)
    return data


def _refuse(constant: str) -> None:
    """NaN and the infinities are no JSON, though Python's parser takes them."""
    raise ValueError(constant)


def checked(kind: type[B], data: Mapping[str, Any]) -> B:
    """``data`` as a ``kind``. Raises RequestError."""
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise _refusal(error, kind) from None


def _refusal(error: ValidationError, kind: type[BaseModel]) -> RequestError:
    """The first fault as one line, e.g. "messages[0].role must be system, user or assistant".

    A wrong ``type`` comes first: all other fields of its object are those of another type.
    """
    faults = error.errors(include_url=False)
    first = min(faults, key=lambda fault: fault["loc"][-1:] != ("type",))
    place, rule = "", ""
    model: type[BaseModel] | None = kind
    for part in first["loc"]:
        if isinstance(part, int):
            place = f"{place}[{part}]"
            rule = "an object" if model else rule
        else:
            name = part[:100]  # a client's, of any length
            place = f"{place}.{name}" if place else name
            known = _field(model, part)
            if known is not None:
                model, rule = _model_in(known.annotation), known.description or ""
            elif model:
                rule = f"valid ({first['msg']})"
    match first["type"]:
        case "unsupported":
            message = f"{place} {first['msg']}"
        case "extra_forbidden":
            message = f"{place} is not supported: leave it out"
        case _:
            message = f"{place} must be {rule}"
    return bad_value(message, place)


def _field(model: type[BaseModel] | None, name: str) -> FieldInfo | None:
    fields = model.model_fields if model else {}
    return next((field for key, field in fields.items() if name in (key, field.alias)), None)


def _model_in(annotation: object) -> type[BaseModel] | None:
    """The model of a field's values, or of those in its list."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((model for inner in get_args(annotation) if (model := _model_in(inner))), None)
