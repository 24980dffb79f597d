"""Cuts the text of a chat template out of renderings of marker messages.

    <bos>system\\n | MARK | <end>\\n<start>user\\n | MARK | <end>\\n<start>assistant\\n | MARK | <end>\\n ...
    system_open            close + user_open             close + assistant_open          close

A template without system turns (Mistral 7B, Gemma) gets the system text at the front of the first user turn.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from typing import TYPE_CHECKING, Any

from actors.text.tools import Tool

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = Mapping[str, Any]
ROLES = ("system", "user", "assistant", "user", "assistant")
# Words that no template has.
_MARKS = ("Qsystemq", "Quseraq", "Qreplyaq", "Quserbq", "Qreplybq")
_QUOTED = 'Qresult"q'  # of a tool: shows whether the template escapes it
_BLANK_LINE = "\n\n"


class ChatTemplateError(ValueError):
    """The tokenizer's chat template cannot be cut into pieces. The message names the model and the cause."""


@dataclass(frozen=True, slots=True)
class TemplateOptions:
    """What a template is told beside the messages.

    ``enable_thinking`` is the switch of Qwen3 and others; without it a template's replies have no thoughts.
    ``day`` is what a template takes for today (Llama 3.2 writes it into the system turn); None: today.
    """

    enable_thinking: bool = False
    day: date | None = None


@dataclass(frozen=True, slots=True)
class TemplateText:
    """The template's own text before and after the content of each role.

    ``merges_system``: the system text has no turn of its own. ``system_open`` then opens the first user turn
    too, and ``system_close`` stands between the system text and the user's.
    """

    system_open: str
    system_close: str
    user_open: str
    user_close: str
    assistant_open: str
    assistant_close: str
    merges_system: bool = False


@dataclass(frozen=True, slots=True)
class ToolText:
    """The template's own text around a system text with tools, and around a tool's result.

    ``escapes``: a result stands there as the inside of a JSON string (Llama 3).
    """

    system_open: str
    system_close: str
    result_open: str
    result_close: str
    escapes: bool


class Template:
    """Renders messages with the chat template of one tokenizer. ``is_dated``: it has asked for the day."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, options: TemplateOptions) -> None:
        self._tokenizer, self._options = tokenizer, options
        self.is_dated = False

    @property
    def name(self) -> str:
        return self._tokenizer.name_or_path or type(self._tokenizer).__name__

    def render(self, messages: Sequence[Message], open_reply: bool, tools: Sequence[Tool] = ()) -> str:
        """Raises ChatTemplateError where the template refuses the messages."""
        from jinja2 import TemplateError

        try:
            return str(
                self._tokenizer.apply_chat_template(
                    list(messages),
                    tools=[tool.function for tool in tools] or None,
                    tools_in_user_message=False,  # Llama 3: a context may be cleared of its first turn
                    tokenize=False,
                    add_generation_prompt=open_reply,
                    enable_thinking=self._options.enable_thinking,
                    strftime_now=self._today,
                )
            )
        except (TemplateError, TypeError, ValueError) as error:
            turns = ", ".join(message["role"] for message in messages)
            raise self.error(f"its chat template refuses a conversation of {turns}: {error}") from error

    def error(self, what: str, after_name: str = ":") -> ChatTemplateError:
        return ChatTemplateError(f"{self.name}{after_name} {' '.join(what.split())}")

    def _today(self, form: str) -> str:
        self.is_dated = True
        return (self._options.day or date.today()).strftime(form)


def cut(template: Template, has_template: bool) -> TemplateText:
    """Cut the template's own texts out of the rendering of five marker messages. Raises ChatTemplateError."""
    if not has_template:
        raise template.error("has no chat template: take an instruct model of the Llama or Qwen families", "")
    messages = [{"role": role, "content": mark} for role, mark in zip(ROLES, _MARKS, strict=True)]
    try:
        text = _cut(lambda until, opens: _around_marks(template, messages[:until], opens))
    except ChatTemplateError:
        # It has no system turns, or puts their text elsewhere.
        text = _cut(lambda until, opens: ["", *_around_marks(template, messages[1:until], opens)])
        if text is not None:
            text = _without_system(text)
    if text is None:
        raise template.error(
            "its chat template does not write each turn the same way, so turns cannot be appended as ids"
        )
    return text


def cut_tools(template: Template, text: TemplateText, tools: Sequence[Tool]) -> ToolText | None:
    """Cut the template's texts for ``tools``; None where it has none, or writes them in no usable place."""
    turns = ROLES[:2]
    messages: list[Message] = [
        {"role": role, "content": mark} for role, mark in zip(turns, _MARKS[:2], strict=True)
    ]
    try:
        bare = template.render(messages, True)
        if template.render(messages, True, tools) == bare:
            return None
        before, between, after = _around_marks(template, messages, True, tools)
        result = _around_result(template, text, tools)
    except ChatTemplateError:
        return None
    own_turn = not text.merges_system
    opens = between.endswith(text.user_open) if own_turn else before.endswith(text.user_open)
    same = own_turn or between == text.system_close
    if result is None or not opens or not same or after != text.user_close + text.assistant_open:
        return None
    return ToolText(before, between[: -len(text.user_open)] if own_turn else between, *result)


def with_result(messages: Sequence[Message], result: str, tools: Sequence[Tool]) -> list[Message]:
    """``messages`` with a call of the first tool and its ``result``."""
    call = {"name": tools[0].name, "arguments": {}}
    # Mistral wants an id of nine characters, and some templates want a content beside the call.
    calls = [{"id": "call00000", "type": "function", "function": call}]
    return [
        *messages,
        {"role": "assistant", "content": "", "tool_calls": calls},
        {"role": "tool", "content": result, "tool_call_id": "call00000", "name": tools[0].name},
    ]


def _around_result(
    template: Template, text: TemplateText, tools: Sequence[Tool]
) -> tuple[str, str, bool] | None:
    """(text before a result, text behind it, whether it is escaped)."""
    asked = {"role": "user", "content": _MARKS[1]}
    rendering = template.render(with_result([asked], _QUOTED, tools), True, tools)
    escaped = json.dumps(_QUOTED)[1:-1]
    escapes = _QUOTED not in rendering
    before, mark, after = rendering.partition(escaped if escapes else _QUOTED)
    called, close, opening = before.rpartition(text.assistant_close)
    if not mark or not called or not close or not after.endswith(text.assistant_open):
        return None
    return opening, after[: len(after) - len(text.assistant_open)], escapes


def _cut(around: Callable[[int, bool], list[str]]) -> TemplateText | None:
    """``around``: the texts around the first messages, so many. None where turns differ in form."""
    before, after_system, _, after_reply, _, end = around(len(ROLES), False)
    user_close = around(2, False)[-1]
    prompt_end = around(2, True)[-1]
    # The conversation ends with a reply, so ``end`` closes a reply. What stands between it and the text of
    # the next user turn opens that turn.
    user_open = after_reply[len(end) :]
    is_uniform = after_reply.startswith(end) and user_open and prompt_end.startswith(user_close) and end
    if not is_uniform:
        return None
    own_turn = after_system.endswith(user_open)
    # Llama 2 and later Mistral templates write the system text into the first user turn themselves.
    inside = not own_turn and bool(user_open.strip()) and user_open.strip() in before
    if not own_turn and not inside:
        return None
    return TemplateText(
        system_open=before,
        system_close=after_system if inside else after_system[: -len(user_open)],
        user_open=user_open,
        user_close=user_close,
        assistant_open=prompt_end[len(user_close) :],
        assistant_close=end,
        merges_system=inside,
    )


def _without_system(text: TemplateText) -> TemplateText:
    # Cut without a system message, what stands before the first user's text is in ``system_close``.
    return TemplateText(
        system_open=text.system_close + text.user_open,
        system_close=_BLANK_LINE,
        user_open=text.user_open,
        user_close=text.user_close,
        assistant_open=text.assistant_open,
        assistant_close=text.assistant_close,
        merges_system=True,
    )


def _around_marks(
    template: Template, messages: Sequence[Message], open_reply: bool, tools: Sequence[Tool] = ()
) -> list[str]:
    """The rendering's texts before, between and after the contents of ``messages``."""
    rest = template.render(messages, open_reply, tools)
    parts: list[str] = []
    for message in messages:
        part, mark, rest = rest.partition(message["content"])
        if not mark:
            raise template.error("its chat template leaves a message out or reorders them")
        parts.append(part)
    return [*parts, rest]
