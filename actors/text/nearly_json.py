"""Reads objects that are nearly JSON, as models write them.

It takes single and curly quotes, trailing commas, bare keys, Python's True and None, and unescaped
apostrophes. It reads one object, objects one after the other, and objects in a list.

Invariant: it invents nothing. Each text that it returns stands in the input between two quotes (escapes
aside); numbers and true or false are returned as they are written. What does not close is left out. An object
that has one key twice is left out too: nobody can say which values belong together.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from actors.text.plain_text import encodable

Value = str | list["Value"] | dict[str, "Value"] | None

_MAX_CHARACTERS = 65_536  # of a text that is looked at
_MAX_BROKEN = 32  # braces that open no object: each of them may cost a scan of the rest
_MAX_NESTING = 16
_BLANK = re.compile(r"\s*")
_QUOTES: Mapping[str, str] = {'"': '"', "'": "'", "\u201c": "\u201d", "\u2018": "\u2019"}
_AFTER_TEXT = re.compile(r"\s*(?:[,:}\])]|$)")
_BARE_KEY = re.compile(r"[A-Za-z_]\w*(?=\s*:)")
_NUMBER = re.compile(r"[+-]?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?(?=\s*[,}\])])")
_WORD = re.compile(r"(?:true|false|null|none|nan)(?=\s*[,}\])])", re.IGNORECASE)
_ESCAPE = re.compile(r"u([0-9a-fA-F]{4})|x([0-9a-fA-F]{2})")
_ESCAPED: Mapping[str, str] = {"n": "\n", "t": "\t", "r": "\r", "b": " ", "f": " "}


class _BrokenError(ValueError):
    """No object can be read here. ``at_end``: because the text ends."""

    def __init__(self, at_end: bool) -> None:
        super().__init__()
        self.at_end = at_end


@dataclass(frozen=True, slots=True)
class Found:
    """An object of a text. ``value`` is None for a brace that opens none, ``cut`` where the text ends."""

    value: dict[str, Value] | None
    cut: bool = False


def objects(text: str) -> Iterator[Found]:
    """The outermost objects of ``text``, left to right. Never raises."""
    text = text[:_MAX_CHARACTERS]
    broken, place = 0, text.find("{")
    while place >= 0 and broken < _MAX_BROKEN:
        reader = _Reader(text, place)
        try:
            yield Found(reader.object(0))
            place = reader.place
        except _BrokenError as error:
            yield Found(None, error.at_end)
            broken += 1
            place += 1
        place = text.find("{", place)


class _Reader:
    def __init__(self, text: str, place: int) -> None:
        self._text = text
        self.place = place

    def object(self, depth: int) -> dict[str, Value]:
        self._take("{")
        read: dict[str, Value] = {}
        while not self._is_next("}"):
            key = self._key()
            if key in read:
                raise _BrokenError(at_end=False)
            self._take(":")
            read[key] = self._value(depth + 1)
            if not self._is_next(","):
                self._take("}", keep=True)
        return read

    def _list(self, depth: int, end: str) -> list[Value]:
        self.place += 1
        read: list[Value] = []
        while not self._is_next(end):
            read.append(self._value(depth + 1))
            if not self._is_next(","):
                self._take(end, keep=True)
        return read

    def _key(self) -> str:
        if self._peek() in _QUOTES:
            return self._string()
        return self._match(_BARE_KEY)

    def _value(self, depth: int) -> Value:
        first = self._peek()
        if depth > _MAX_NESTING:
            raise _BrokenError(at_end=False)
        if first in _QUOTES:
            return self._string()
        if first == "{":
            return self.object(depth)
        if first in "[(":
            return self._list(depth, "]" if first == "[" else ")")
        if _NUMBER.match(self._text, self.place):
            return self._match(_NUMBER)
        word = self._match(_WORD).lower()
        return word if word in ("true", "false") else None

    def _string(self) -> str:
        """A quote closes a text only where the object can go on: 'Nora's' needs no escape."""
        close = _QUOTES[self._text[self.place]]
        parts: list[str] = []
        stop = re.compile(rf"[\\{close}]")
        start = self.place + 1
        while (found := stop.search(self._text, start)) is not None:
            parts.append(self._text[start : found.start()])
            start = found.end()
            if found[0] == "\\":
                escaped, start = self._escape(start)
                parts.append(escaped)
            elif _AFTER_TEXT.match(self._text, start):
                self.place = start
                # \\ud83d\\ude42 are two escapes of one character
                return encodable("".join(parts))
            else:
                parts.append(found[0])
        raise _BrokenError(at_end=True)

    def _escape(self, place: int) -> tuple[str, int]:
        if code := _ESCAPE.match(self._text, place):
            return chr(int(code[1] or code[2], 16)), code.end()
        char = self._text[place : place + 1]
        return _ESCAPED.get(char, char), place + 1

    def _peek(self) -> str:
        blank = _BLANK.match(self._text, self.place)
        assert blank is not None
        self.place = blank.end()
        if self.place == len(self._text):
            raise _BrokenError(at_end=True)
        return self._text[self.place]

    def _is_next(self, char: str) -> bool:
        """Whether ``char`` comes next; it is then passed."""
        if self._peek() != char:
            return False
        self.place += 1
        return True

    def _take(self, char: str, keep: bool = False) -> None:
        if self._peek() != char:
            raise _BrokenError(at_end=False)
        self.place += not keep

    def _match(self, pattern: re.Pattern[str]) -> str:
        self._peek()
        found = pattern.match(self._text, self.place)
        if found is None:
            raise _BrokenError(at_end=False)
        self.place = found.end()
        return found[0]
