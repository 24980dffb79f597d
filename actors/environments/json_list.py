"""A long JSON list, item by item: LongMemEval-S is a quarter of a gigabyte, and every rollout worker reads it.

for start, size, item in stream_list(source):     # source.read_bytes(start, size) is the item again
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from actors.environments.fields import Source
from actors.protocols import TaskError

_CHUNK = 1 << 23  # bytes read at once; the item that a chunk's end cuts is parsed twice
_SPACE = re.compile(r"[ \t\r\n]*")


def stream_list(source: Source) -> Iterator[tuple[int, int, Any]]:
    """(first byte, bytes, value) of each item. Holds one chunk and one item at a time. Raises TaskError."""
    source.read_bytes(size=1)  # gives the reasons why a file cannot be read
    with Path(source.path).open("rb") as file:
        text = _Text(file, source)
        if text.next_character() != "[":
            raise TaskError(
                f"{source.path}: expected a list, got something else: give {source.setting} the path of {source.what}"
            )
        text.skip(1)
        if text.next_character() == "]":
            return
        for number in range(2**63):
            text.next_character()
            yield text.value(number)
            separator = text.next_character()
            if separator == "]":
                return
            if separator != ",":
                raise TaskError(
                    f"{source.path}: not JSON after item {number}: expected ',' or ']', got {separator or 'the end of the file'!r}"
                )
            text.skip(1)


class _Text:
    """The file's text: ``_text`` is what of it is in memory, ``_at`` characters of that lie behind us, and we are at ``_byte`` of the file."""

    def __init__(self, file: BinaryIO, source: Source) -> None:
        self._file = file
        self._source = source
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._json = json.JSONDecoder()
        self._text = ""
        self._at = 0
        self._byte = 0

    def next_character(self) -> str:
        """The next one that is not white space, "" at the end of the file."""
        while True:
            space = _SPACE.match(self._text, self._at)
            assert space is not None
            self.skip(space.end() - self._at)
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._read_more():
                return ""

    def skip(self, ascii_characters: int) -> None:
        self._at += ascii_characters
        self._byte += ascii_characters

    def value(self, number: int) -> tuple[int, int, Any]:
        while True:
            try:
                value, end = self._json.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                place = self._byte + _bytes(self._text[self._at : error.pos])
                if self._read_more():
                    continue
                raise TaskError(
                    f"{self._source.path}: item {number}: not JSON at byte {place}: {error.msg}"
                ) from error
            except ValueError as error:  # a number of thousands of digits
                raise TaskError(f"{self._source.path}: item {number}: not JSON: {error}") from error
            except RecursionError as error:
                raise TaskError(
                    f"{self._source.path}: item {number}: nested too deeply for {self._source.what}"
                ) from error
            start, size = self._byte, _bytes(self._text[self._at : end])
            self._at, self._byte = end, start + size
            return start, size, value

    def _read_more(self) -> bool:
        read = self._file.tell()
        data = self._file.read(_CHUNK)
        try:
            self._text = self._text[self._at :] + self._decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            raise TaskError(f"{self._source.path}: not UTF-8 text near byte {read + error.start}") from error
        self._at = 0
        return bool(data)


def _bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())
