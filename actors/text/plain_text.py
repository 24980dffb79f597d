"""Encodes text from outside, so that no control token can stand in it.

A tokenizer matches its added tokens before all else. Some of them are control tokens although it does not
call them special: Qwen's <tool_call> and </think>. A user's text that spells one must stay ordinary text.
Nor can a tokenizer or a file take lone surrogates, the halves of a character.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from itertools import pairwise
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


Encoder = Callable[[str], list[int]]
_HARMLESS = re.compile(r"\w+|\s+")  # a word or a run of blanks may be an added token too: it controls nothing


def is_control(added: str) -> bool:
    """Whether an added token may control a model: it is no mere word, and no blanks."""
    return not _HARMLESS.fullmatch(added)


def plain_encoder(tokenizer: PreTrainedTokenizerBase) -> Encoder:
    """A function from text to ids, none of which is an added token of ``tokenizer``."""

    def without_special(text: str) -> list[int]:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        return ids

    added = {
        token_id: token.content
        for token_id, token in tokenizer.added_tokens_decoder.items()
        if not token.special and is_control(token.content)
    }
    if not added:
        return without_special
    encode = _without_added(tokenizer) or without_special
    names = re.compile("|".join(re.escape(name) for name in sorted(added.values(), key=len, reverse=True)))

    def plain(text: str) -> list[int]:
        ids = encode(text)
        if added.keys().isdisjoint(ids):
            return ids
        # The name is a word of the vocabulary too: cut behind its first character, it is not found.
        cuts = [0, *(match.start() + 1 for match in names.finditer(text)), len(text)]
        return [id for start, end in pairwise(cuts) for id in encode(text[start:end])]

    return plain


def _without_added(tokenizer: PreTrainedTokenizerBase) -> Encoder | None:
    """A copy of the tokenizer without control tokens. None where it is not of the library `tokenizers`."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not hasattr(backend, "to_str"):
        return None
    state = json.loads(backend.to_str())
    kept = [
        token
        for token in state["added_tokens"]
        if not token["special"] and _HARMLESS.fullmatch(token["content"])
    ]
    state |= {"added_tokens": kept, "post_processor": None, "truncation": None, "padding": None}
    bare = type(backend).from_str(json.dumps(state))

    def encode(text: str) -> list[int]:
        return list(bare.encode(text, add_special_tokens=False).ids)

    return encode


def encodable(text: str) -> str:
    """``text`` with each character that UTF-8 cannot hold replaced by U+FFFD; usually ``text`` itself.

    Why: JSON can spell half of a character ("\\ud83d"), and every encoder refuses it.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        # utf-16 joins two halves that stand side by side, as JSON means them
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def encodable_value(value: Any) -> Any:
    """A JSON value with all its texts made ``encodable``, the names of its fields too."""
    match value:
        case str():
            return encodable(value)
        case list():
            return [encodable_value(item) for item in value]
        case dict():
            return {encodable(name): encodable_value(item) for name, item in value.items()}
    return value
