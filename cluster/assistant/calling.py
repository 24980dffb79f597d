"""Tools of a request: which a reply may call, whether it must, and the schema that it then keeps to.

    tools, tool_choice --calling--> Calling

A call that keeps to a schema has the form without a mark: {"name": "price", "arguments": {...}}.
Why one call and no list: a small model may not end a list by itself, and one call is what was asked for.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

from actors.endpoint.requests import bad_value
from actors.text.tools import Tool

Mode = Literal["auto", "none", "required"]
CLOSED = ConfigDict(strict=True, frozen=True, extra="forbid")


class Function(BaseModel):
    """A tool's function."""

    model_config = CLOSED

    name: str = Field(min_length=1, description="a text")
    description: str | None = Field(None, description="a text")
    parameters: dict[str, Any] | None = Field(None, description="a JSON schema")
    strict: bool | None = Field(None, description="true or false")

    @property
    def tool(self) -> Tool:
        return Tool(self.name, self.description or "", self.parameters or {})


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """``name``: of the function that must be called, "" where any will do.

    ``allowed``: the names of those that there are for this turn; None for all.
    """

    mode: Mode
    name: str = ""
    allowed: tuple[str, ...] | None = None

    @property
    def as_of_responses(self) -> str | dict[str, Any]:
        if self.allowed is not None:
            tools = [{"type": "function", "name": name} for name in self.allowed]
            return {"type": "allowed_tools", "mode": self.mode, "tools": tools}
        return {"type": "function", "name": self.name} if self.name else self.mode


def _read_choice(given: object) -> ToolChoice | None:
    """``{"type": "function", "function": {"name": "price"}}``; Responses have the name beside the type.

    ``{"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [...]}}`` likewise.
    """
    match given:
        case None | ToolChoice():
            return given
        case "auto" | "none" | "required":
            return ToolChoice(given)
        case {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools, **deeper}, **more}:
            return _allowed(mode, tools, {**deeper, **more})
        case {"type": "allowed_tools", "mode": mode, "tools": tools, **more}:
            return _allowed(mode, tools, more)
    return ToolChoice("required", _function_name(given))


def _allowed(mode: object, tools: object, more: Mapping[Any, Any]) -> ToolChoice:
    match mode, tools:
        case ("auto" | "required" as known, list(listed)) if not more:
            return ToolChoice(known, allowed=tuple(map(_function_name, listed)))
    raise PydanticCustomError("tool_choice", "not a choice")


def _function_name(given: object) -> str:
    match given:
        case {"type": "function", "function": {"name": str(name), **deeper}, **more} if not (deeper or more):
            return name
        case {"type": "function", "name": str(name), **more} if not more:
            return name
    raise PydanticCustomError("tool_choice", "not a choice")


Choice = Annotated[ToolChoice | None, BeforeValidator(_read_choice)]
CHOICES = f"{', '.join(get_args(Mode))}, a function by its name, or allowed_tools"


@dataclass(frozen=True, slots=True)
class Calling:
    """``tools`` are those that the model is told of. ``json_schema``: what its reply keeps to, "" for any.

    ``forced``: the reply is a call.
    """

    tools: tuple[Tool, ...]
    json_schema: str
    forced: bool


def calling(
    functions: Mapping[str, Function], choice: ToolChoice | None, parallel: bool | None, answer: str
) -> Calling:
    """What a request means by its tools. ``functions`` by their place in it; ``answer``: its own schema.

    Raises RequestError.
    """
    choice = choice or ToolChoice("auto")
    mode, name = choice.mode, choice.name
    if mode == "none":
        return Calling((), answer, forced=False)
    if choice.allowed is not None:
        functions = _only(functions, choice.allowed)
    tools = tuple(function.tool for function in functions.values())
    called = [tool for tool in tools if name in ("", tool.name)]
    forced = mode == "required"
    if forced and not called:
        wanted = f"the function {name[:100]!r}" if name else "a tool"
        raise bad_value(f"tool_choice asks for {wanted}, which is not in tools", "tool_choice")
    keeps = forced or (bool(answer) and bool(tools))
    if not keeps:
        _require_loose(functions, parallel)
        return Calling(tools, answer, forced=False)
    return Calling(tools, _schema_of(called, "" if forced else answer), forced)


def _only(functions: Mapping[str, Function], allowed: Sequence[str]) -> Mapping[str, Function]:
    """Those of ``functions`` that are allowed. Raises RequestError for a name that is none of theirs."""
    known = {function.name for function in functions.values()}
    for name in allowed:
        if name not in known:
            message = f"tool_choice allows the function {name[:100]!r}, which is not in tools"
            raise bad_value(message, "tool_choice")
    return {place: function for place, function in functions.items() if function.name in allowed}


def _require_loose(functions: Mapping[str, Function], parallel: bool | None) -> None:
    """Refuse what only a reply that keeps to a schema can promise."""
    cure = "leave it out, or ask for a call by tool_choice (required, or a function by its name)"
    if parallel is False and functions:
        raise bad_value(f"parallel_tool_calls: false cannot be kept here: {cure}", "parallel_tool_calls")
    for place, function in functions.items():
        if function.strict:
            where = f"{place}.strict"
            raise bad_value(f"{where}: nothing keeps a call to its schema here: {cure}", where)


def _schema_of(tools: Sequence[Tool], answer: str) -> str:
    """The JSON schema of one call of ``tools``, or else of an ``answer`` to a schema of its own.

    Each part stands in it as it is, since xgrammar takes a reference to ``{"type": "object"}`` for an empty
    object; and once more in ``$defs``, where the part's own references lead. Raises RequestError.
    """
    parts: dict[str, Any] = {"answer": json.loads(answer)} if answer else {}
    parts |= {f"call_{place}": {"type": "object", **tool.parameters} for place, tool in enumerate(tools)}
    try:
        inner = {name: _moved(schema, f"#/$defs/{name}") for name, schema in parts.items()}
        calls = [_call_of(tool.name, inner[f"call_{place}"]) for place, tool in enumerate(tools)]
        either = [inner["answer"], *calls] if answer else calls
        return json.dumps({"$defs": inner, "anyOf": either}, ensure_ascii=False)
    except RecursionError:
        raise bad_value("tools: a schema is nested too deeply", "tools") from None


def _call_of(name: str, arguments: Any) -> dict[str, Any]:
    properties = {"name": {"const": name}, "arguments": arguments}
    form = {"type": "object", "properties": properties, "required": ["name", "arguments"]}
    return {**form, "additionalProperties": False}


def _moved(schema: Any, root: str) -> Any:
    """A schema that stands at ``root`` of another one: what it refers to has moved with it."""
    match schema:
        case list():
            return [_moved(item, root) for item in schema]
        case dict():
            return {
                key: root + value[1:]
                if key == "$ref" and isinstance(value, str) and value.startswith("#")
                else _moved(value, root)
                for key, value in schema.items()
            }
    return schema
