"""Cuts a model's chat template into token pieces, so that a conversation grows by appending ids.

    ids = chat.system(prompt) + chat.user(text) + chat.assistant_open       -> the engine samples `generation`
    ids += generation + chat.assistant_close(generation) + chat.user(next) ...

A template is a program that renders a list of messages; it has no pieces of its own. So the pieces are cut
out of renderings of marker texts, once per tokenizer:

    <bos>system\n | MARK | <end>\n<start>user\n | MARK | <end>\n<start>assistant\n | MARK | <end>\n ...
    system_open            close + user_open             close + assistant_open          close

Invariants. Pieces put together are the tokens that the template itself gives for the same messages; the
constructor checks it. Text from outside never becomes a special token.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Ids = tuple[int, ...]
_ROLES = ("system", "user", "assistant", "user", "assistant")
# Words that no template has.
_MARKS = ("Qsystemq", "Quseraq", "Qreplyaq", "Quserbq", "Qreplybq")
_WORD = "What"


class ChatTemplateError(ValueError):
    """The tokenizer's chat template cannot be cut into pieces. The message names the model and the cause."""


@dataclass(frozen=True, slots=True)
class Turn:
    """The tokens [start, end) of a conversation, as text. ``role``: system, user, assistant or text."""

    role: str
    start: int
    end: int
    text: str


@dataclass(frozen=True, slots=True)
class _TemplateText:
    """The template's own text before and after the content of each role."""

    system_open: str
    system_close: str
    user_open: str
    user_close: str
    assistant_open: str
    assistant_close: str


class ChatFormat:
    """The token pieces of one tokenizer's chat template. Ids are Python ints. Threads may share it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raises ChatTemplateError when the template cannot be cut: the message says why."""
        self._tokenizer = tokenizer
        text = _cut(tokenizer)
        special = set(tokenizer.all_special_ids)
        self._system_open = self._encode_opening(text.system_open)
        self._system_close = self._encode_template(text.system_close)
        self.user_open: Ids = self._encode_opening(text.user_open)
        self._user_close = self._encode_template(text.user_close)
        self._reply_close = self._encode_template(text.assistant_close)
        self.assistant_open: Ids = self._encode_template(text.assistant_open)
        # The engine stops at this token. Were it ordinary text, it could stand inside a reply.
        if not self._reply_close or self._reply_close[0] not in special:
            raise ChatTemplateError(
                f"{_name(tokenizer)}: its chat template ends a reply with {text.assistant_close!r}, "
                "which is no special token"
            )
        stop, eos = self._reply_close[0], tokenizer.eos_token_id
        # Some models have an eos token besides the end of a turn, and sample it too.
        self.stop_token_ids: Ids = (stop, eos) if isinstance(eos, int) and eos != stop else (stop,)
        self._check(self._encode_opening(text.assistant_open))

    def system(self, text: str) -> Ids:
        """The opening of a conversation: the system turn, after bos if the template has one."""
        return self._system_open + self.encode(text) + self._system_close

    def user(self, text: str) -> Ids:
        """A whole user turn."""
        return self.user_open + self.encode(text) + self._user_close

    def assistant_close(self, sampled: Sequence[int]) -> Ids:
        """The tokens that close a sampled reply.

        A reply that ended has sampled the first of them, the stop token. A reply cut by length needs all.
        """
        if sampled and sampled[-1] == self._reply_close[0]:
            return self._reply_close[1:]
        return self._reply_close

    def reply(self, text: str) -> Ids:
        """A reply that is not sampled, such as a flashcard's answer: the text and the stop token."""
        return (*self.encode(text), self._reply_close[0])

    def encode(self, text: str) -> Ids:
        """Ids of plain text, stripped. "<|im_end|>" and the like stay ordinary characters."""
        # Stripped, because templates strip contents too. split_special_tokens: else text could forge turns.
        return tuple(
            self._tokenizer.encode(text.strip(), add_special_tokens=False, split_special_tokens=True)
        )

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ``ids`` without special tokens."""
        return str(
            self._tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        )

    def turns(self, ids: Sequence[int]) -> list[Turn]:
        """The turns of a conversation, for people to read.

        Tokens outside of any turn, such as the rest of a turn that truncation cut, have the role "text".
        """
        opens = [(self._system_open, "system"), (self.user_open, "user"), (self.assistant_open, "assistant")]
        closes = [(piece, "text") for piece in (self._system_close, self._user_close, self._reply_close)]
        pieces = [(piece, role) for piece, role in opens + closes if piece]
        turns: list[Turn] = []
        role, start, place = "text", 0, 0
        while place <= len(ids):
            # The piece that begins here, if any, and the role of the tokens after it.
            here = (pair for pair in pieces if tuple(ids[place : place + len(pair[0])]) == pair[0])
            piece, next_role = next(here, ((), ""))
            if piece or place == len(ids):
                turns.append(Turn(role, start, place, self.decode(ids[start:place])))
                role, start = next_role, place + len(piece)
            place += max(1, len(piece))
        return [turn for turn in turns if turn.text.strip()]

    def _encode_template(self, text: str) -> Ids:
        return tuple(self._tokenizer.encode(text, add_special_tokens=False)) if text else ()

    def _encode_opening(self, text: str) -> Ids:
        """Ids of template text that a content follows.

        Why: some tokenizers split "\\n\\n" in one way before a word and in another at the end of a text. So
        the text is encoded with a word behind it, and the word's ids are dropped.
        """
        word = self._encode_template(_WORD)
        ids = self._encode_template(text + _WORD)
        return ids[: -len(word)] if ids[-len(word) :] == word else self._encode_template(text)

    def _check(self, assistant_open_before_a_word: Ids) -> None:
        """Raises ChatTemplateError unless the pieces are the template's own tokens.

        It compares a prompt, and a prompt with a reply in it.
        """
        messages = [
            {"role": role, "content": f"{_WORD} is {mark}?"}
            for role, mark in zip(_ROLES[:4], _MARKS[:4], strict=True)
        ]
        contents = [message["content"] for message in messages]
        short = self.system(contents[0]) + self.user(contents[1])
        reply = self.encode(contents[2]) + self.assistant_close(())
        # The engine samples a reply after assistant_open as it is encoded at the end of a text. Here a word
        # follows it, so the piece as it is encoded before a word is compared.
        long = short + assistant_open_before_a_word + reply + self.user(contents[3]) + self.assistant_open
        cases = [(_render(self._tokenizer, messages[:2], True), short + self.assistant_open)]
        rendering = _render(self._tokenizer, messages, True)
        # Some templates rewrite earlier replies (they hide thoughts). Engram keeps replies as they were
        # sampled, so there is nothing to compare.
        if rendering.startswith(cases[0][0]):
            cases.append((rendering, long))
        for rendering, pieces in cases:
            if self._encode_template(rendering) != pieces:
                raise ChatTemplateError(
                    f"{_name(self._tokenizer)}: its tokenizer merges the chat template with the text, "
                    "so turns cannot be appended as ids"
                )


def _cut(tokenizer: PreTrainedTokenizerBase) -> _TemplateText:
    """Cut the template's own texts out of the rendering of five marker messages."""
    if not tokenizer.chat_template:
        raise ChatTemplateError(
            f"{_name(tokenizer)} has no chat template: take an instruct model of the Llama or Qwen families"
        )
    messages = [{"role": role, "content": mark} for role, mark in zip(_ROLES, _MARKS, strict=True)]
    before, after_system, _, after_reply, _, end = _around_marks(tokenizer, messages, False)
    user_close = _around_marks(tokenizer, messages[:2], False)[-1]
    prompt_end = _around_marks(tokenizer, messages[:2], True)[-1]
    # The conversation ends with a reply, so ``end`` closes a reply. What stands between it and the text of
    # the next user turn opens that turn.
    user_open = after_reply[len(end) :]
    is_uniform = (
        after_reply.startswith(end)
        and user_open
        and after_system.endswith(user_open)
        and prompt_end.startswith(user_close)
        and end
    )
    if not is_uniform:
        raise ChatTemplateError(
            f"{_name(tokenizer)}: its chat template does not write each turn the same way, "
            "so turns cannot be appended as ids"
        )
    return _TemplateText(
        system_open=before,
        system_close=after_system[: -len(user_open)],
        user_open=user_open,
        user_close=user_close,
        assistant_open=prompt_end[len(user_close) :],
        assistant_close=end,
    )


def _around_marks(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], open_reply: bool
) -> list[str]:
    """The rendering's texts before, between and after the contents of ``messages``."""
    rest = _render(tokenizer, messages, open_reply)
    parts: list[str] = []
    for message in messages:
        part, mark, rest = rest.partition(message["content"])
        if not mark:
            raise ChatTemplateError(
                f"{_name(tokenizer)}: its chat template leaves a message out or reorders them; "
                "a template with system turns is needed"
            )
        parts.append(part)
    return [*parts, rest]


def _render(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], open_reply: bool) -> str:
    from jinja2 import TemplateError

    try:
        # enable_thinking is Qwen3's switch; other templates ignore it. An answer has few tokens: no thoughts.
        return str(
            tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=open_reply, enable_thinking=False
            )
        )
    except TemplateError as error:
        turns = ", ".join(message["role"] for message in messages)
        raise ChatTemplateError(
            f"{_name(tokenizer)}: its chat template refuses a conversation of {turns}: {error}"
        ) from error


def _name(tokenizer: PreTrainedTokenizerBase) -> str:
    return tokenizer.name_or_path or type(tokenizer).__name__
