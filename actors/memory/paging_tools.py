"""The tools of a paging agent (MemGPT, arXiv 2310.08560, section 2): the parser of calls, and their storage.

Core memory: short, a part of the prompt
    {"call": "core_append", "block": "facts", "text": "..."}
    {"call": "core_replace", "block": "facts", "old": "...", "new": "..."}
Archival storage: texts that the agent saved, found again by meaning
    {"call": "archival_insert", "text": "..."}
    {"call": "archival_search", "query": "...", "page": 1}
Recall storage: every message of the episode, found again by its words
    {"call": "recall_search", "query": "...", "page": 1}

Invariant: neither ``parse_call`` nor ``Storage.run`` raises for anything that a model can write. What is
wrong is counted, and told to the agent as the tool's result. The form of a call is ours: compact, for small
models. The common {"name": ..., "arguments": {...}} is understood too.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from actors.text.retrieval import Embedder, Hit, VectorIndex, WordIndex
from actors.text.split_text import split_text
from configs.schema import PagingConfig

BLOCKS = ("task", "facts")
"""Blocks of core memory (the paper's working context): the task, and what the agent knows about it."""

_MAX_OBJECTS = 8  # looked at in a reply
_MAX_NESTING = 64  # brackets in a reply: a recursive parser would run out of stack
_LEAST_PASSAGE = 24  # tokens: shorter passages are not worth showing, so a page shows fewer of them
_HEAD_TOKENS = 20  # of a page's first line
_NUMBER_TOKENS = 6  # of the number in front of a passage
_SHOWN_CHARACTERS = 60  # of the agent's text, when a result or an error repeats it
_CALL_KEY = re.compile(r"""\{\s*["']?call["']?\s*:""")
_DECODER = json.JSONDecoder(strict=False)


@dataclass(frozen=True, slots=True)
class Call:
    """A tool's name and arguments as the agent wrote them."""

    name: str
    arguments: Mapping[str, object]
    followed: bool  # by another call in the same reply, which is not made


@dataclass(frozen=True, slots=True)
class BadCall:
    """A reply that was meant to be a call and is none."""

    problem: str


class _Malformed(ValueError):
    """The call names no known tool, or an argument is missing or of the wrong kind."""


class _Refused(ValueError):
    """A well-formed call that cannot be done."""


def parse_call(text: str) -> Call | BadCall | None:
    """Return the first tool call in ``text``, or None for an answer (also for JSON that is no call)."""
    calls: list[tuple[str, Mapping[str, object]]] = []
    start = text.find("{")
    for _ in range(_MAX_OBJECTS):
        if start < 0:
            break
        value, end = _object_at(text, start)
        if value is None and not calls and _CALL_KEY.match(text, start):
            return BadCall("the call is no complete JSON object")
        call = None if value is None else _as_call(value)
        if call is not None:
            calls.append(call)
        start = text.find("{", end)
    if not calls:
        return None
    name, arguments = calls[0]
    return Call(name, arguments, followed=len(calls) > 1) if name else BadCall('"call" names no tool')


def _object_at(text: str, start: int) -> tuple[dict[str, object] | None, int]:
    """Return the JSON object that opens at ``start``, and where to look for the next one.

    Closing braces may be missing at the end of the text.
    """
    if max(text.count("{", start), text.count("[", start)) > _MAX_NESTING:
        return None, len(text)
    for missing in ("", "}", "}}"):
        try:
            value, end = _DECODER.raw_decode(text + missing, start)
        except ValueError:
            continue
        return value, min(end, len(text))
    return None, start + 1


def _as_call(value: Mapping[str, object]) -> tuple[str, Mapping[str, object]] | None:
    """Return (tool, arguments), with tool "" where it is not a text; None where the object is no call."""
    inner = value.get("arguments", value.get("parameters", {}))
    arguments = {**value, **inner} if isinstance(inner, dict) else dict(value)
    if "call" in value:
        return (_clean(value["call"]) if isinstance(value["call"], str) else ""), arguments
    name = value.get("name")
    return (name, arguments) if isinstance(name, str) and name in _TOOLS else None


class Storage:
    """Core memory, archival storage and recall storage of one episode.

    ``measure`` counts tokens. ``share`` bounds core memory and each result, in tokens.
    """

    def __init__(
        self,
        config: PagingConfig,
        embedder: Callable[[], Embedder],
        measure: Callable[[str], int],
        share: int,
        events: Counter[str],
    ) -> None:
        self.core: dict[str, str] = dict.fromkeys(BLOCKS, "")
        self.messages = 0  # in recall storage
        self._core_characters = config.core_characters
        self._share = share
        self._measure = measure
        self._page = max(1, min(config.results, (share - _HEAD_TOKENS) // (_LEAST_PASSAGE + _NUMBER_TOKENS)))
        self._passage_limit = (share - _HEAD_TOKENS) // self._page - _NUMBER_TOKENS
        self._events = events
        self._embedder = embedder
        self._archive: list[str] = []
        self._vectors: VectorIndex | None = None  # until the first insert: the embedder takes seconds to load
        self._passages: list[str] = []
        self._words: WordIndex | None = None

    @property
    def archived(self) -> int:
        """Texts in archival storage."""
        return len(self._archive)

    def remember(self, message: str) -> None:
        """Put a message into recall storage, in passages that a result can show.

        A heading stands in front of each of its passages. It is a first line in brackets: conversations say
        their date there.
        """
        heading, _, rest = message.partition("\n")
        in_brackets = heading.startswith("[") and heading.endswith("]")
        short = self._measure(heading) * 2 < self._passage_limit
        body, heading = (rest, f"{heading} ") if rest and in_brackets and short else (message, "")
        room = self._passage_limit - self._measure(heading)
        self._passages += [f"{heading}{piece.strip()}" for piece in self._pieces(body, room)]
        self.messages += 1
        self._words = None

    def set_task(self, question: str) -> None:
        """Begin the task block with ``question``, or with as much of it as the block takes."""
        text = _clean(question)
        if len(text) > self._core_characters or self._measure(text) > self._share // 2:
            self._events["tasks_cut"] += 1
            text = self._pieces(text[: self._core_characters], self._share // 2)[0].strip()
        self.core["task"] = text

    def run(self, call: Call | BadCall) -> str:
        """Make the call. Return its result or its fault in at most ``share`` tokens, as told to the agent."""
        if isinstance(call, BadCall):
            self._events["malformed"] += 1
            return f"Error: {call.problem}."
        try:
            if call.name not in _TOOLS:
                raise _Malformed(f"there is no tool {_short(call.name)}, only {', '.join(_TOOLS)}")
            result = _TOOLS[call.name](self, call.arguments)
        except _Malformed as error:
            self._events["malformed"] += 1
            result = f"Error: {error}."
        except _Refused as error:
            self._events["refused"] += 1
            result = f"Refused: {error}."
        if call.followed:
            self._events["extra_calls"] += 1
            result = f"Only the first call was made. {result}"
        return self._pieces(result, self._share)[0]

    def _core_append(self, arguments: Mapping[str, object]) -> str:
        block, text = _block(arguments), _text(arguments, "text")
        saved = self._set_core(block, f"{self.core[block]}\n{text}".strip())
        self._events["core_appends"] += 1
        return saved

    def _core_replace(self, arguments: Mapping[str, object]) -> str:
        block, old = _block(arguments), _text(arguments, "old")
        new = _text(arguments, "new", may_be_empty=True)
        if old not in self.core[block]:
            raise _Refused(f"block {block} does not hold {_short(old)}")
        lines = (line.strip() for line in self.core[block].replace(old, new).splitlines())
        saved = self._set_core(block, "\n".join(line for line in lines if line))
        self._events["core_replaces"] += 1
        return saved

    def _set_core(self, block: str, text: str) -> str:
        tokens = sum(self._measure(each) for each in {**self.core, block: text}.values())
        if len(text) > self._core_characters or tokens > self._share:
            raise _Refused(
                f"block {block} would be full ({len(text)} characters): "
                "replace or shorten something in it, or use archival_insert"
            )
        self.core[block] = text
        return f"Saved: block {block} has {len(text)} of {self._core_characters} characters."

    def _archival_insert(self, arguments: Mapping[str, object]) -> str:
        texts = [piece.strip() for piece in self._pieces(_text(arguments, "text"), self._passage_limit)]
        if self._vectors is None:
            self._vectors = VectorIndex(self._embedder())
        self._vectors.add(texts)
        self._archive += texts
        self._events["archival_inserts"] += 1
        return f"Saved: archival storage has {len(self._archive)} texts."

    def _archival_search(self, arguments: Mapping[str, object]) -> str:
        query, page = _query(arguments), _page(arguments)
        self._events["archival_searches"] += 1
        hits = [] if self._vectors is None else self._vectors.search(query, page * self._page)
        return self._show(hits, self._archive, len(self._archive), page)

    def _recall_search(self, arguments: Mapping[str, object]) -> str:
        query, page = _query(arguments), _page(arguments)
        self._events["recall_searches"] += 1
        if self._words is None:
            self._words = WordIndex(self._passages)
        hits = self._words.search(query, len(self._passages))
        return self._show(hits, self._passages, len(hits), page)

    def _show(self, hits: Sequence[Hit], texts: Sequence[str], found: int, page: int) -> str:
        first = (page - 1) * self._page
        shown = hits[first : first + self._page]
        if not shown:
            self._events["empty_searches"] += 1
            return f"Nothing on page {page}: {found} found." if found else "Nothing found."
        lines = [f"{first + place}. {texts[hit.place]}" for place, hit in enumerate(shown, 1)]
        return "\n".join([f"Found {found}, page {page} of {-(-found // self._page)}:", *lines])

    def _pieces(self, text: str, limit: int) -> list[str]:
        return split_text(text, self._measure, limit)


_TOOLS: Mapping[str, Callable[[Storage, Mapping[str, object]], str]] = {
    "core_append": Storage._core_append,
    "core_replace": Storage._core_replace,
    "archival_insert": Storage._archival_insert,
    "archival_search": Storage._archival_search,
    "recall_search": Storage._recall_search,
}


def _block(arguments: Mapping[str, object]) -> str:
    block = _text(arguments, "block").lower()
    if block not in BLOCKS:
        raise _Malformed(f"there is no block {_short(block)}, only {' and '.join(BLOCKS)}")
    return block


def _text(arguments: Mapping[str, object], name: str, may_be_empty: bool = False) -> str:
    value = arguments.get(name)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        value = str(value)
    text = _clean(value) if isinstance(value, str) else ""
    wordless = not any(char.isalnum() for char in text)  # e.g. "...", copied from the instructions
    if not isinstance(value, str) or (wordless and not may_be_empty):
        raise _Malformed(f'"{name}" must be a text{"" if may_be_empty else " with words in it"}')
    return text


def _query(arguments: Mapping[str, object]) -> str:
    return _text(arguments, "query" if "query" in arguments else "text")


def _page(arguments: Mapping[str, object]) -> int:
    value = arguments.get("page", 1)
    if isinstance(value, str) and value.strip().isdecimal():
        value = int(value.strip()[:9])
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= 10**6:
        raise _Malformed('"page" must be a whole number, 1 or more')
    return value


def _clean(text: str) -> str:
    """Return ``text`` on one line, without lone surrogates, which no tokenizer can encode."""
    return " ".join(text.encode("utf-8", "replace").decode("utf-8").split())


def _short(text: str) -> str:
    shown = text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."
    return json.dumps(shown, ensure_ascii=False)
