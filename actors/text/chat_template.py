"""Cuts a model's chat template into token pieces, so that a conversation grows by appending ids.

    ids = chat.opening(prompt) + chat.user(text) + chat.assistant_open      -> the engine samples `generation`
    ids += generation + chat.assistant_close(generation) + chat.user(next) ...
    answer = chat.said(generation)

A template is a program that renders a list of messages; it has no pieces of its own. So they are cut out of
renderings of marker texts, once per tokenizer (template_text.py).

Invariants. Pieces put together are the tokens that the template itself gives for the same messages; the
constructor checks it. Text from outside never becomes a control token (plain_text.py).

Where the template has no system turns, the system text opens the first user turn: see ``join``.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from actors.text.plain_text import is_control, plain_encoder
from actors.text.template_text import (
    ROLES,
    ChatTemplateError,
    Template,
    TemplateOptions,
    TemplateText,
    ToolText,
    cut,
    cut_tools,
    with_result,
)
from actors.text.thoughts import end_of_thought, is_thought_mark, visible_reply
from actors.text.tools import Tool, plain_rendering
from configs.models import declared_stop_ids
from configs.schema import ModelConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["ChatFormat", "ChatTemplateError", "Ids", "TemplateOptions", "Turn", "open_chat"]
Ids = tuple[int, ...]
_WORD = "What"
_MOST_TOLD = 64
_CONTENTS = tuple(f"{_WORD} is Q{name}q?" for name in ("system", "usera", "replya", "userb"))


@dataclass(frozen=True, slots=True)
class Turn:
    """The tokens [start, end) of a conversation, as text. ``role``: system, user, assistant or text."""

    role: str
    start: int
    end: int
    text: str


@dataclass(frozen=True, slots=True)
class _Wrap:
    """What the template puts around a content: ids, texts that touch the content, ids.

    ``escapes``: the content stands there as the inside of a JSON string.
    """

    open: Ids
    before: str
    after: str
    close: Ids
    escapes: bool = False


def open_chat(model_path: Path | str, config: ModelConfig) -> ChatFormat:
    """Load the tokenizer in ``model_path``. Raises ChatTemplateError."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(model_path))
    options = TemplateOptions(config.enable_thinking, config.day)
    return ChatFormat(tokenizer, options, declared_stop_ids(Path(model_path)))


class ChatFormat:
    """The token pieces of one tokenizer's chat template. Ids are Python ints. Threads may share it."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        options: TemplateOptions | None = None,
        stop_token_ids: Sequence[int] = (),
    ) -> None:
        """``stop_token_ids``: the eos tokens that the model declares beside the tokenizer's.

        Raises ChatTemplateError when the template cannot be cut: the message says why.
        """
        self._tokenizer = tokenizer
        self._template = Template(tokenizer, options or TemplateOptions())
        self._plain = plain_encoder(tokenizer)
        added = tokenizer.added_tokens_decoder.items()
        self._hidden_marks = {
            token_id: token.content
            for token_id, token in added
            if token.special and is_thought_mark(token.content)
        }
        text = cut(self._template, bool(tokenizer.chat_template))
        special = set(tokenizer.all_special_ids) | {id for id, token in added if token.special}
        self._system_open = self._encode_opening(text.system_open)
        self._system_close = self._encode_closing(text.system_close)
        self.user_open: Ids = self._encode_opening(text.user_open)
        self._user_close = self._encode_closing(text.user_close)
        self._reply_close = self._encode_closing(text.assistant_close)
        self.assistant_open: Ids = self._encode_template(text.assistant_open)
        end = end_of_thought(text.assistant_open)
        self.opens_thought = bool(end)
        self._end_of_thought = self._encode_template(end)
        # The engine stops at this token. Were it ordinary text, it could stand inside a reply.
        if not self._reply_close or self._reply_close[0] not in special:
            raise self._template.error(
                f"its chat template ends a reply with {text.assistant_close!r}, which is no special token"
            )
        eos = tokenizer.eos_token_id
        # Some models have eos tokens besides the end of a turn, and sample them too.
        declared = [eos, *stop_token_ids] if isinstance(eos, int) else stop_token_ids
        self.stop_token_ids: Ids = tuple(dict.fromkeys((self._reply_close[0], *declared)))
        self._merges_system = text.merges_system
        self._text = text
        self._told: dict[str, ChatFormat] = {}  # by the tools, as JSON: siblings have the same
        self._around_system = ("", "")  # texts of the template that touch the system text
        self._result: _Wrap | None = None
        self._fit(text)

    @property
    def is_dated(self) -> bool:
        """True when the template writes the day into its turns, so that prompts change overnight."""
        return self._template.is_dated

    def with_tools(self, tools: Sequence[Tool]) -> ChatFormat:
        """This format with ``tools`` in every opening: in the template's own form, or else in words.

        Raises ChatTemplateError where a tool's own text holds a control token.
        """
        if not tools:
            return self
        written = json.dumps([tool.function for tool in tools], ensure_ascii=False)
        if written not in self._told:
            self._refuse_control_tokens(written)
            if len(self._told) == _MOST_TOLD:
                self._told.clear()
            self._told[written] = self._telling(tools)
        return self._told[written]

    def _telling(self, tools: Sequence[Tool]) -> ChatFormat:
        chat = copy.copy(self)
        text = cut_tools(self._template, self._text, tools)
        if text is None or not chat._takes(text, tools):
            chat = copy.copy(self)
            chat._around_system = ("", f"\n\n{plain_rendering(tools)}")
        return chat

    @property
    def tells_tools(self) -> bool:
        """Whether the tools stand in the template's own form, and so does what they give."""
        return self._result is not None

    def result(self, text: str) -> Ids:
        """A whole turn with what a tool gave."""
        if self._result is None:
            return self.user(f"Result of the tool:\n{text}")
        wrap, text = self._result, text.strip()
        inner = json.dumps(text, ensure_ascii=False)[1:-1] if wrap.escapes else text
        return (*wrap.open, *self._plain(f"{wrap.before}{inner}{wrap.after}"), *wrap.close)

    def system(self, text: str) -> Ids:
        """The opening of a conversation: the system turn, after bos if the template has one.

        Where the template has no system turns, it opens the first user turn: what follows goes through
        ``join``.
        """
        before, after = self._around_system
        ids = tuple(self._plain(f"{before}{text.strip()}{after}"))
        if self._merges_system and not ids:
            return self._system_open[: len(self._system_open) - len(self.user_open)]
        return self._system_open + ids + self._system_close

    def user(self, text: str) -> Ids:
        """A whole user turn."""
        return self.user_open + self.encode(text) + self._user_close

    def join(self, system: Ids, turn: Ids) -> Ids:
        """``turn``, a user turn, without what ``system`` has opened already."""
        opened = self.opened_by(system)
        return turn[len(opened) :] if turn[: len(opened)] == opened else turn

    def opened_by(self, system: Ids) -> Ids:
        """What the first user turn behind ``system`` lacks; nothing where system texts have own turns."""
        is_open = self._merges_system and system[: len(self._system_open)] == self._system_open
        return self.user_open if is_open else ()

    def opening(self, system_prompt: str, first: str) -> Ids:
        """A conversation's opening with its first user turn."""
        system = self.system(system_prompt)
        return system + self.join(system, self.user(first))

    def assistant_close(self, sampled: Sequence[int]) -> Ids:
        """The tokens that close a sampled reply.

        A reply that ended has sampled the first of them, the stop token. A reply cut by length needs all.
        """
        if sampled and sampled[-1] == self._reply_close[0]:
            return self._reply_close[1:]
        return self._reply_close

    def reply(self, text: str) -> Ids:
        """A reply that is not sampled, such as a flashcard's answer: the text and the stop token.

        Where the generation prompt opens a thought, the reply ends it first: the text is its visible part.
        """
        return (*self._end_of_thought, *self.encode(text), self._reply_close[0])

    def said(self, sampled: Sequence[int]) -> str:
        """What a sampled reply says: without its stop token and its thoughts."""
        ended = bool(sampled) and sampled[-1] in self.stop_token_ids
        return visible_reply(self.decode(sampled[:-1] if ended else sampled), self.opens_thought)

    def plainly(self, sampled: Sequence[int]) -> str:
        """The text of a continuation: without its stop token, with its thoughts."""
        ended = bool(sampled) and sampled[-1] in self.stop_token_ids
        return self.decode(sampled[:-1] if ended else sampled)

    def continued(self, text: str) -> Ids:
        """Ids of a text that is no turn, as it is: after bos where the tokenizer begins a text with it."""
        return (*self._tokenizer.encode(""), *self._plain(text))

    def encode(self, text: str) -> Ids:
        """Ids of plain text, stripped. "<|im_end|>", "</think>" and the like stay ordinary characters."""
        # Stripped, because templates strip contents too.
        return tuple(self._plain(text.strip()))

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ``ids`` without special tokens. Thoughts keep their marks."""
        if not self._hidden_marks:
            return self._decode(list(ids))
        parts: list[str] = []
        run: list[int] = []
        for token_id in ids:
            if token_id in self._hidden_marks:
                parts += [self._decode(run), self._hidden_marks[token_id]]
                run = []
            else:
                run.append(token_id)
        return "".join([*parts, self._decode(run)])

    def piece(self, token_id: int) -> str:
        """A token as the tokenizer's vocabulary writes it, special tokens too, for people to read."""
        return str(self._tokenizer.convert_ids_to_tokens(token_id))

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def turns(self, ids: Sequence[int]) -> list[Turn]:
        """The turns of a conversation, for people to read.

        Tokens outside of any turn, such as the rest of a turn that truncation cut, have the role "text".
        """
        first, behind = ("user", ()) if self._merges_system else ("system", self._system_close)
        # Without an opening of its own (Mistral), a reply begins where the user turn ends.
        after_user = "text" if self.assistant_open else "assistant"
        opens = [(self._system_open, first), (self.user_open, "user"), (self.assistant_open, "assistant")]
        closes = [(behind, "text"), (self._user_close, after_user), (self._reply_close, "text")]
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

    def _takes(self, text: ToolText, tools: Sequence[Tool]) -> bool:
        """Take the pieces for ``tools``. Returns whether they are the template's own tokens."""
        if self._merges_system:
            self._system_open = self._encode_opening(text.system_open)
        else:
            wrap = self._wrap(text.system_open, text.system_close)
            self._system_open, self._system_close = wrap.open, wrap.close
            self._around_system = (wrap.before, wrap.after)
        self._result = replace(self._wrap(text.result_open, text.result_close), escapes=text.escapes)
        system, user, *_ = _CONTENTS
        messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
        prompt = self._encode_template(self._template.render(messages, True, tools))
        called = self._encode_template(
            self._template.render(with_result(messages[1:], user, tools), True, tools)
        )
        # Behind a merged system text stands what ``_fit`` has compared.
        start = self.opening(system, user) + self.assistant_open
        start = self._system_open + self.encode(system) if self._merges_system else start
        end = self.result(user) + self.assistant_open
        return prompt[: len(start)] == start and called[-len(end) :] == end

    def _wrap(self, opening: str, closing: str) -> _Wrap:
        """Cut the template's texts at the control tokens that stand nearest to the content between them.

        Why: without a control token between them, a tokenizer merges the template's text and the content.
        """
        marks = [
            mark
            for token in self._tokenizer.added_tokens_decoder.values()
            if is_control(mark := token.content)
        ]
        start = max((opening.rfind(mark) + len(mark) for mark in marks if mark in opening), default=0)
        end = min((closing.find(mark) for mark in marks if mark in closing), default=len(closing))
        return _Wrap(
            self._encode_template(opening[:start]),
            opening[start:],
            closing[:end],
            self._encode_template(closing[end:]),
        )

    def _refuse_control_tokens(self, written: str) -> None:
        """Tools come from a server: the template must not make control tokens of their text."""
        for token_id in set(self._encode_template(written)) - set(self.encode(written)):
            name = self._tokenizer.added_tokens_decoder.get(token_id)
            if name is not None:
                raise self._template.error(f"a tool's own text holds the control token {name.content!r}")

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

    def _encode_closing(self, text: str) -> Ids:
        """Ids of template text behind a content: some tokenizers put a blank in front of a text."""
        word = self._encode_template(_WORD)
        ids = self._encode_template(_WORD + text)
        return ids[len(word) :] if ids[: len(word)] == word else self._encode_template(text)

    def _encode_between(self, text: str) -> Ids:
        """Ids of template text between two contents."""
        word = self._encode_template(_WORD)
        ids = self._encode_opening(_WORD + text)
        return ids[len(word) :] if ids[: len(word)] == word else ids

    def _fit(self, text: TemplateText) -> None:
        """Find the pieces that give the template's own tokens. Raises ChatTemplateError without any."""
        reply_before_a_word = self._encode_opening(text.assistant_open)
        # Some tokenizers begin a word's token with a blank: then one must stand in front of the user's text.
        closes = [text.system_close, f"{text.system_close} "] if text.merges_system else [text.system_close]
        for close in closes:
            if text.merges_system:
                self._system_close = self._encode_between(close)
            if self._is_exact(close, reply_before_a_word):
                return
        raise self._template.error(
            "its tokenizer merges the chat template with the text, so turns cannot be appended as ids"
        )

    def _is_exact(self, system_close: str, assistant_open_before_a_word: Ids) -> bool:
        """Whether the pieces are the template's own tokens, of a prompt and of one with a reply in it."""
        contents = list(_CONTENTS)
        roles = list(ROLES[:4])
        pieces = self.opening(contents[0], contents[1])
        if self._merges_system:
            contents[:2], roles[:1] = [f"{contents[0]}{system_close}{contents[1]}"], []
        messages = [{"role": role, "content": text} for role, text in zip(roles, contents, strict=True)]
        prompt = self._template.render(messages[:-2], True)
        if self._encode_template(prompt) != pieces + self.assistant_open:
            return False
        rendering = self._template.render(messages, True)
        # Some templates rewrite earlier replies (they hide thoughts). Engram keeps replies as they were
        # sampled, so there is nothing to compare.
        if not rendering.startswith(prompt):
            return True
        # The engine samples a reply after assistant_open as it is encoded at the end of a text. Here a word
        # follows it. How a template puts the reply behind it is not compared: Engram's is as it was sampled.
        ids = self._encode_template(rendering)
        before = pieces + assistant_open_before_a_word
        after = self.assistant_close(()) + self.user(contents[-1]) + self.assistant_open
        return ids[: len(before)] == before and ids[-len(after) :] == after
