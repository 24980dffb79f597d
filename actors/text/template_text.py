"""Cuts the text of a chat template out of renderings of marker messages.

    <bos>system\\n | MARK | <end>\\n<start>user\\n | MARK | <end>\\n<start>assistant\\n | MARK | <end>\\n ...
    system_open            close + user_open             close + assistant_open          close

A template without system turns (Mistral 7B, Gemma) gets the system text at the front of the first user turn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, str]
ROLES = ("system", "user", "assistant", "user", "assistant")
# Words that no template has.
_MARKS = ("Qsystemq", "Quseraq", "Qreplyaq", "Quserbq", "Qreplybq")
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


class Template:
    """Renders messages with the chat template of one tokenizer. ``is_dated``: it has asked for the day."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, options: TemplateOptions) -> None:
        self._tokenizer, self._options = tokenizer, options
        self.is_dated = False

    @property
    def name(self) -> str:
        return self._tokenizer.name_or_path or type(self._tokenizer).__name__

    def render(self, messages: Sequence[Message], open_reply: bool) -> str:
        """Raises ChatTemplateError where the template refuses the messages."""
        from jinja2 import TemplateError

        try:
            return str(
                self._tokenizer.apply_chat_template(
                    list(messages),
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


def _around_marks(template: Template, messages: Sequence[Message], open_reply: bool) -> list[str]:
    """The rendering's texts before, between and after the contents of ``messages``."""
    rest = template.render(messages, open_reply)
    parts: list[str] = []
    for message in messages:
        part, mark, rest = rest.partition(message["content"])
        if not mark:
            raise template.error("its chat template leaves a message out or reorders them")
        parts.append(part)
    return [*parts, rest]
