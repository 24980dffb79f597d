"""The model's chat template as token pieces, so that a conversation grows by appending ids and is never re-tokenised.

    ids = chat.system(prompt) + chat.user(text) + chat.assistant_open          -> the engine samples `generation`
    ids += generation + chat.assistant_close(generation) + chat.user(next) ...

The pieces are found once, by rendering marker texts through the template and cutting the rendering at the markers. Invariant: pieces put together are
the tokens that the template itself gives for the same messages (checked at construction); text from outside never becomes a special token.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Ids = tuple[int, ...]
_MARKS = ("Qsystemq", "Quseraq", "Qreplyaq", "Quserbq", "Qreplybq")
_WORD = "What"
_ROLES = ("system", "user", "assistant", "user", "assistant")


class ChatTemplateError(ValueError):
    """The tokenizer's chat template cannot be cut into pieces. One line: which model, what was found, what is needed."""


@dataclass(frozen=True, slots=True)
class Turn:
    """The tokens [start, end) of a conversation and their text. ``role``: system, user, assistant or text."""

    role: str
    start: int
    end: int
    text: str


@dataclass(frozen=True, slots=True)
class _TemplateText:
    """The template's own text around the contents of a conversation."""

    system_open: str
    system_close: str
    user_open: str
    user_close: str
    assistant_open: str
    assistant_close: str


class ChatFormat:
    """Token pieces of one tokenizer's chat template. All ids are python ints of the tokenizer's vocabulary; safe to share between threads."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raises ChatTemplateError when the tokenizer has no template, or one without system turns or an end-of-turn token."""
        self._tokenizer = tokenizer
        text = _cut(tokenizer)
        special = set(tokenizer.all_special_ids)
        self._system_open = self._encode_opening(text.system_open)
        self._system_close = self._encode_template(text.system_close)
        self.user_open: Ids = self._encode_opening(text.user_open)
        self._user_close = self._encode_template(text.user_close)
        self._reply_close = self._encode_template(text.assistant_close)
        self.assistant_open: Ids = self._encode_template(text.assistant_open)
        if not self._reply_close or self._reply_close[0] not in special:
            raise ChatTemplateError(
                f"{_name(tokenizer)}: its chat template ends a reply with {text.assistant_close!r}, which is no special token"
            )
        eos = tokenizer.eos_token_id
        self.stop_token_ids: Ids = (
            tuple(dict.fromkeys((self._reply_close[0], eos)))
            if isinstance(eos, int)
            else (self._reply_close[0],)
        )
        self._check(self._encode_opening(text.assistant_open))

    def system(self, text: str) -> Ids:
        """The opening of a conversation: the template's beginning (with bos, if it has one) and the system turn."""
        return self._system_open + self.encode(text) + self._system_close

    def user(self, text: str) -> Ids:
        """A whole user turn."""
        return self.user_open + self.encode(text) + self._user_close

    def assistant_close(self, sampled: Sequence[int]) -> Ids:
        """What follows a sampled reply: the rest of the template's closing if it ended with the stop token, else (cut by length) all of it."""
        if sampled and sampled[-1] == self._reply_close[0]:
            return self._reply_close[1:]
        return self._reply_close

    def reply(self, text: str) -> Ids:
        """A reply that was not sampled (a demonstration, a flashcard's answer): the text's ids and the stop token."""
        return (*self.encode(text), self._reply_close[0])

    def encode(self, text: str) -> Ids:
        """Ids of plain text, stripped; "<|im_end|>" and the like in it stay ordinary characters."""
        return tuple(
            self._tokenizer.encode(text.strip(), add_special_tokens=False, split_special_tokens=True)
        )

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ``ids`` without special tokens."""
        return str(
            self._tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        )

    def turns(self, ids: Sequence[int]) -> list[Turn]:
        """``ids`` of a conversation by its turns, for people to read; what stands outside of any (a turn cut by truncation) has the role "text"."""
        opens = [(self._system_open, "system"), (self.user_open, "user"), (self.assistant_open, "assistant")]
        marks = [
            *opens,
            (self._system_close, "text"),
            (self._user_close, "text"),
            (self._reply_close, "text"),
        ]
        found: list[Turn] = []
        role, start, place = "text", 0, 0
        while place <= len(ids):
            mark, follows = next(
                (
                    (mark, name)
                    for mark, name in marks
                    if mark and tuple(ids[place : place + len(mark)]) == mark
                ),
                ((), ""),
            )
            if mark or place == len(ids):
                found.append(Turn(role, start, place, self.decode(ids[start:place])))
                role, start = follows, place + len(mark)
            place += max(1, len(mark))
        return [turn for turn in found if turn.text.strip()]

    def _encode_template(self, text: str) -> Ids:
        return tuple(self._tokenizer.encode(text, add_special_tokens=False)) if text else ()

    def _encode_opening(self, text: str) -> Ids:
        """Ids of template text that a word will follow: some tokenizers split "\\n\\n" otherwise before a word than at the end of a text."""
        word = self._encode_template(_WORD)
        ids = self._encode_template(text + _WORD)
        return ids[: -len(word)] if ids[-len(word) :] == word else self._encode_template(text)

    def _check(self, opened_before_a_word: Ids) -> None:
        """Raises ChatTemplateError unless the pieces are the template's tokens: of a prompt, and of a prompt with a reply in it."""
        messages = [
            {"role": role, "content": f"{_WORD} is {mark}?"}
            for role, mark in zip(_ROLES[:4], _MARKS[:4], strict=True)
        ]
        contents = [message["content"] for message in messages]
        short = self.system(contents[0]) + self.user(contents[1])
        reply = self.encode(contents[2]) + self.assistant_close(())
        long = short + opened_before_a_word + reply + self.user(contents[3]) + self.assistant_open
        pairs = [(messages[:2], short + self.assistant_open)]
        if _render(self._tokenizer, messages, True).startswith(_render(self._tokenizer, messages[:2], True)):
            pairs.append(
                (messages, long)
            )  # otherwise the template rewrites earlier replies (hidden thoughts); ours stay as they were sampled
        for given, pieces in pairs:
            expected = tuple(
                self._tokenizer.encode(_render(self._tokenizer, given, True), add_special_tokens=False)
            )
            if expected != pieces:
                raise ChatTemplateError(
                    f"{_name(self._tokenizer)}: its tokenizer merges the chat template with the text, so turns cannot be appended as ids"
                )


def _cut(tokenizer: PreTrainedTokenizerBase) -> _TemplateText:
    """The template's text before, between and after the messages of a five-turn conversation."""
    if not tokenizer.chat_template:
        raise ChatTemplateError(
            f"{_name(tokenizer)} has no chat template: take an instruct model of the Llama or Qwen families"
        )
    messages = [{"role": role, "content": mark} for role, mark in zip(_ROLES, _MARKS, strict=True)]
    before, after_system, _, between, _, end = _split(tokenizer, messages, False, _MARKS)
    user_close = _split(tokenizer, messages[:2], False, _MARKS[:2])[-1]
    prompt_end = _split(tokenizer, messages[:2], True, _MARKS[:2])[-1]
    user_open = between[len(end) :]
    if not (
        between.startswith(end)
        and user_open
        and after_system.endswith(user_open)
        and prompt_end.startswith(user_close)
        and end
    ):
        raise ChatTemplateError(
            f"{_name(tokenizer)}: its chat template does not write each turn the same way, so turns cannot be appended as ids"
        )
    return _TemplateText(
        system_open=before,
        system_close=after_system[: -len(user_open)],
        user_open=user_open,
        user_close=user_close,
        assistant_open=prompt_end[len(user_close) :],
        assistant_close=end,
    )


def _split(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], open_reply: bool, marks: Sequence[str]
) -> list[str]:
    rest = _render(tokenizer, messages, open_reply)
    parts: list[str] = []
    for mark in marks:
        part, found, rest = rest.partition(mark)
        if not found:
            raise ChatTemplateError(
                f"{_name(tokenizer)}: its chat template leaves a message out or reorders them; a template with system turns is needed"
            )
        parts.append(part)
    return [*parts, rest]


def _render(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], open_reply: bool) -> str:
    from jinja2 import TemplateError

    try:
        # enable_thinking is Qwen3's switch; other templates ignore it. Thoughts would eat the few tokens that an answer has.
        return str(
            tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=open_reply, enable_thinking=False
            )
        )
    except TemplateError as error:
        message = f"{_name(tokenizer)}: its chat template refuses a system, user, assistant, user, assistant conversation: {error}"
        raise ChatTemplateError(message) from error


def _name(tokenizer: PreTrainedTokenizerBase) -> str:
    return tokenizer.name_or_path or type(tokenizer).__name__
