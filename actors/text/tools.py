"""Tools as a model is told of them, and the calls that it writes.

    Qwen 2.5 and 3, Hermes   <tool_call>{"name": "price", "arguments": {"item": "lamp"}}</tool_call>
    Llama 3                  {"name": "price", "parameters": {"item": "lamp"}}
    Mistral                  [TOOL_CALLS] [{"name": "price", "arguments": {"item": "lamp"}}]
                             [TOOL_CALLS]price[ARGS]{"item": "lamp"}

Every form is read, whichever the model has. A mark such as [TOOL_CALLS] may be gone, as control tokens are
not decoded. vLLM has such parsers too: they need its tokenizers and its requests, and one has to be chosen
for each model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from actors.text.plain_text import encodable_value

_BLOCK = re.compile(r"<tool_call>(.*?)(?:</tool_call>|$)", re.DOTALL)
CALL_MARK = "<tool_call>"
_MARKS = ("<|python_tag|>", "[TOOL_CALLS]")
# possessive: a long run of blanks is read once, and not again for each of its parts
_NAMED = re.compile(r"([\w.-]++)\s*+(?:\[CALL_ID\]\s*+\w++\s*+)?(\[ARGS\])?\s*+(?={)")
_BETWEEN = " \t\r\n,;"
_DECODER = json.JSONDecoder()


@dataclass(frozen=True, slots=True)
class Tool:
    """``parameters`` is the JSON schema of the arguments."""

    name: str
    description: str
    parameters: Mapping[str, Any]

    @property
    def function(self) -> dict[str, Any]:
        """The tool as chat templates take it."""
        function = {"name": self.name, "description": self.description, "parameters": dict(self.parameters)}
        return {"type": "function", "function": function}


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that the model wrote. ``fault`` says why it cannot be run; then it has no arguments."""

    name: str
    arguments: Mapping[str, Any]
    fault: str = ""


def calls_in(reply: str, names: Collection[str]) -> tuple[ToolCall, ...]:
    """The calls in a visible reply; none where it is an answer. ``names``: of the tools that there are."""
    blocks = _BLOCK.findall(reply)
    if blocks:
        return tuple(call for block in blocks for call in _marked(block, names))
    text = reply.strip()
    for mark in _MARKS:
        if text.startswith(mark):
            return _marked(text.removeprefix(mark).replace(mark, " "), names)
    values = list(_values(text))
    # A JSON object may be an answer: unmarked, only what has the shape of a call is one.
    if values and all(_is_call(value) for value in values):
        return tuple(map(_call, values))
    return _named(text, names)


def readable_calls(reply: str, names: Collection[str]) -> tuple[ToolCall, ...]:
    """The calls in a visible reply; none where one of them is faulty: then the reply is a text as it is."""
    found = calls_in(reply, names)
    return () if any(call.fault for call in found) else found


def before_calls(reply: str) -> str:
    """The text that stands before the calls of a reply. In the forms without a mark there is none."""
    before, mark, _ = reply.partition(CALL_MARK)
    return before if mark else ""


def written_calls(calls: Iterable[tuple[str, str]]) -> list[str]:
    """Calls as a model would write them, for a history that it did not write. They are (name, arguments)."""
    form = CALL_MARK + '{{"name": {}, "arguments": {}}}</tool_call>'
    return [form.format(json.dumps(name), arguments) for name, arguments in calls]


def surely_text(beginning: str, names: Collection[str]) -> str:
    """How much of a reply's beginning is text, whatever follows it."""
    start = beginning.lstrip()
    for mark in (*_MARKS, "{", "[", *names):
        if start.startswith(mark) or mark.startswith(start):
            return ""
    before, mark, _ = beginning.partition(CALL_MARK)
    return before if mark else beginning[: len(beginning) - overlap(beginning, CALL_MARK)]


def overlap(text: str, mark: str) -> int:
    """How many characters at the end of ``text`` may be the beginning of ``mark``."""
    sizes = range(min(len(text), len(mark) - 1), 0, -1)
    return next((size for size in sizes if text.endswith(mark[:size])), 0)


def plain_rendering(tools: Sequence[Tool]) -> str:
    """The tools in words, for a model whose chat template has none."""
    lines = [json.dumps(tool.function["function"], ensure_ascii=False) for tool in tools]
    form = '<tool_call>{"name": "NAME", "arguments": {...}}</tool_call>'
    return "\n".join(["You can call these tools:", *lines, f"To call one, reply with {form} alone."])


def _marked(text: str, names: Collection[str]) -> tuple[ToolCall, ...]:
    """The calls in a text that says it holds some: at least one, perhaps faulty."""
    values = list(_values(text.strip()))
    if values:
        return tuple(map(_call, values))
    return _named(text.strip(), names) or (ToolCall("", {}, "the call is not JSON"),)


def _values(text: str) -> Iterator[Any]:
    """The JSON objects that make up ``text``, in lists or one behind another; none beside other text."""
    place, found = 0, []
    while place < len(text):
        if text[place] in _BETWEEN:
            place += 1
            continue
        try:
            value, place = _decoded(text, place)
        except (ValueError, RecursionError):
            return
        found += value if isinstance(value, list) else [value]
    yield from (value for value in found if isinstance(value, dict))


def _decoded(text: str, place: int) -> tuple[Any, int]:
    """The JSON value at ``place`` and where it ends. Raises ValueError, RecursionError.

    A model may spell half of a character ("\\ud83d"). Neither a tool server nor an answer can hold it.
    """
    value, end = _DECODER.raw_decode(text, place)
    return encodable_value(value), end


def _is_call(value: Mapping[str, Any]) -> bool:
    return isinstance(value.get("name"), str) and ("arguments" in value or "parameters" in value)


def _call(value: Mapping[str, Any]) -> ToolCall:
    inner = value.get("function")
    if isinstance(inner, Mapping):
        value = inner
    name = value.get("name", inner)
    if not isinstance(name, str) or not name:
        return ToolCall("", {}, 'the call has no "name"')
    arguments = value.get("arguments", value.get("parameters"))
    if isinstance(arguments, str):  # as in OpenAI's API
        arguments = next(_values(arguments), arguments) if arguments.strip() else {}
    if arguments is not None and not isinstance(arguments, Mapping):
        return ToolCall(name, {}, 'the "arguments" are no JSON object')
    return ToolCall(name, arguments or {})


def _named(text: str, names: Collection[str]) -> tuple[ToolCall, ...]:
    """The calls in ``price{"item": "lamp"}``; none where a name is unknown."""
    calls: list[ToolCall] = []
    place = 0
    while match := _NAMED.match(text, place):
        try:
            arguments, place = _decoded(text, match.end())
        except (ValueError, RecursionError):
            return (*calls, ToolCall(match[1], {}, "the arguments are not JSON")) if match[2] else ()
        if not match[2] and match[1] not in names:
            return ()
        calls.append(ToolCall(match[1], arguments))
        place = len(text) - len(text[place:].lstrip(_BETWEEN))
    return tuple(calls) if place == len(text) else ()
