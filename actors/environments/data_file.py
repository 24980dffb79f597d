"""Reads users' data files: JSON lists item by item, JSON Lines line by line. pydantic checks each item.

Where JSON Lines are wanted, a list of the same objects is read too. gzip, bzip2 and xz are unpacked.

    file = DataFile("talks.json", "environment.conversation.path", "a LoCoMo file (a list of conversations)")
    for place, talk in file.items(Talk, "sample_id"): ...

What cannot be encoded (half of a character, bytes that are no UTF-8) becomes U+FFFD; a warning counts it.
Harmless faults are forgiven: a byte order mark, ids as numbers, null where nothing is meant. What would
change a score is not: a NaN as an answer. Every fault is a TaskError of one line: file, item or line, field,
what is allowed. "talks.json: item 3 ('harbour'): qa.1.answer: Input should be a text or a number".
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import json
import logging
import lzma
import math
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, BinaryIO, TypeVar

import ijson
from pydantic import BeforeValidator
from pydantic_core import PydanticCustomError

from actors.environments.hub_data import is_hub, local_copy
from actors.protocols import TaskError
from configs.files import FileError, parse_json

_log = logging.getLogger(__name__)
T = TypeVar("T")
_CHUNK = 1 << 16  # bytes
_HEAD = 8  # bytes
_SHOWN_FAULT = 300  # characters: a file's own keys stand in a fault's place, and they may be long
_SHOWN_NAME = 80  # characters
_DEPTH = {"start_map": 1, "start_array": 1, "end_map": -1, "end_array": -1}
_TO_BRACE = re.compile(rb"[^}]*}|[^}]+")
_EXACT = 2**53  # every whole number below it is a float of its own
_LONGEST_ESCAPE = 6  # bytes, of "\\ud83d"
_HALF = re.compile(rb"\\u[dD][89a-fA-F]")  # an escape of half a character
_ESCAPE = re.compile(
    rb"\\(?:u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|(u[dD][89a-fA-F][0-9a-fA-F]{2})|.)",
    re.DOTALL,
)
_ASCII = bytes(code if code < 0x80 else ord("?") for code in range(256))
_PACKED: Mapping[bytes, Callable[[BinaryIO], Any]] = {
    b"\x1f\x8b": lambda file: gzip.GzipFile(fileobj=file),
    b"BZh": bz2.BZ2File,
    b"\xfd7zXZ\x00": lzma.LZMAFile,
}
PARQUET = b"PAR1"
_FOREIGN = {
    b"PK\x03\x04": "a zip archive (or a spreadsheet): unpack it, or save it as JSON lines",
    b"\x28\xb5\x2f\xfd": "compressed with zstd: unpack it",
    codecs.BOM_UTF16_LE: "UTF-16: save it as UTF-8",
    codecs.BOM_UTF16_BE: "UTF-16: save it as UTF-8",
    PARQUET: "a Parquet file, and JSON is read here: save it as JSON lines, or name it hub:FOLDER",
}
_UNREADABLE = (OSError, EOFError, zlib.error, lzma.LZMAError)
_PARSER_REASON = re.compile(r"error: ([^\\\n]+)")  # the rest of its message draws the place on two more lines


def invalid(message: str) -> PydanticCustomError:
    """An error for pydantic validators, reported with exactly these words."""
    return PydanticCustomError("data_file", "{message}", {"message": message})


def text(value: object) -> str:
    """Check that ``value`` is a text and not blank, for pydantic."""
    if not isinstance(value, str) or not value.strip():
        raise invalid("Input should be a text that is not blank")
    return value


def text_or_number(value: object) -> str:
    """Turn a text or a number into a text, for pydantic. NaN is none: it stands where a value is missing."""
    if isinstance(value, bool) or not isinstance(value, (str, int, float)) or not str(value).strip():
        raise invalid("Input should be a text or a number")
    if isinstance(value, float) and not math.isfinite(value):
        raise invalid(f"Input should be a text or a number, not {value}")
    # 3.0 and 1e3 are 3 and 1000 to whoever answers: Arrow makes floats of whole numbers beside a null
    whole = isinstance(value, float) and value.is_integer() and abs(value) < _EXACT
    return str(int(value) if whole else value)


def text_or_nothing(value: object) -> object:
    """Let null stand for no text, for pydantic."""
    return "" if value is None else value


def message_text(content: object) -> object:
    """The text of a chat message: "" for null, the texts of a list of parts."""
    if not isinstance(content, list):
        return "" if content is None else content
    return "".join(str(part.get("text") or "") for part in content if isinstance(part, dict))


def list_or_nothing(value: object) -> tuple[object, ...]:
    """Let null stand for an empty list, and a single text for a list of one, for pydantic."""
    if isinstance(value, list):
        return tuple(value)
    if value is None or isinstance(value, str):
        return () if value is None else (value,)
    raise invalid("Input should be a list")


def _one_or_more(check: Callable[[object], str]) -> Callable[[object], object]:
    """Let a single value stand for a list of one."""

    def as_list(value: object) -> object:
        if not isinstance(value, list):
            return [check(value)]
        if not value:
            raise invalid("Input should have at least one entry")
        return value

    return as_list


Text = Annotated[str, BeforeValidator(text)]
TextOrNumber = Annotated[str, BeforeValidator(text_or_number)]
MessageText = Annotated[str, BeforeValidator(message_text)]
OptionalText = Annotated[str, BeforeValidator(text_or_nothing)]
Texts = Annotated[list[Text], BeforeValidator(_one_or_more(text))]
TextsOrNumbers = Annotated[list[TextOrNumber], BeforeValidator(_one_or_more(text_or_number))]


@dataclass(frozen=True, slots=True)
class Place:
    """Where an item of a JSON list stands: its number from 0, and its bytes [start, end) of the file."""

    number: int
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class DataFile:
    """A file that a setting names, or a data set of the hub (hub_data.py).

    ``what`` describes it: "a LoCoMo file (a list of conversations)".

    Every method raises TaskError.
    """

    path: str
    setting: str
    what: str
    listed: bool = False  # how a data set of the hub is read: as a JSON list, or as JSON lines

    @contextmanager
    def open(self) -> Iterator[BinaryIO]:
        """Open the file, or the copy of a data set, for reading. What cannot be read in the block is told."""
        head = self.head()
        if (kind := next((_FOREIGN[mark] for mark in _FOREIGN if head.startswith(mark)), None)) is not None:
            raise self.fault("", f"it is {kind}; {self.setting} wants {self.what}")
        unpack = next((_PACKED[mark] for mark in _PACKED if head.startswith(mark)), None)
        try:
            with self._file.open("rb") as file:
                yield file if unpack is None else unpack(file)
        except _UNREADABLE as error:
            raise self._unreadable(error) from error

    def head(self) -> bytes:
        """The first bytes of the file, as they lie on the disk."""
        if not self.path:
            raise TaskError(f"{self.setting} is empty: give the path of {self.what}")
        try:
            if self._file.is_fifo():  # what is read of a pipe is gone, so it is taken for what is wanted
                return b""
            with self._file.open("rb") as file:
                return file.read(_HEAD)
        except OSError as error:
            raise self._unreadable(error) from error

    @property
    def _file(self) -> Path:
        return local_copy(self.path, self.listed) if is_hub(self.path) else Path(self.path)

    def _unreadable(self, error: Exception) -> TaskError:
        cause = f"{self.path}: cannot be read ({getattr(error, 'strerror', None) or error})"
        return TaskError(f"{cause}: give {self.setting} the path of {self.what}")

    def read(self) -> bytes:
        """The whole file."""
        with self.open() as file:
            return file.read().removeprefix(codecs.BOM_UTF8)

    def parse(self, content: bytes, kind: type[T], name: str = "") -> T:
        """``content`` as ``kind``. ``name`` says in messages which part of the file it is."""
        cleaned, count = encodable_json(content)
        self._warn(count)
        return self._value(cleaned, kind, lambda: name)

    def lines(self, kind: type[T]) -> Iterator[tuple[int, T]]:
        """(line number from 1, value) of each line that is not blank; of a JSON list, of each item."""
        if self._is_list():
            for number, (_, value) in enumerate(self.items(kind, ""), start=1):
                yield number, value
            return
        replaced = 0
        with self.open() as file:
            for number, line in enumerate(file, start=1):
                content, count = encodable_json(line.removeprefix(codecs.BOM_UTF8) if number == 1 else line)
                replaced += count
                if content.strip():
                    yield number, self._value(content, kind, partial("line {}".format, number))
        self._warn(replaced)

    def named_lines(self, kind: type[T]) -> Iterator[tuple[str, T]]:
        """(what messages call it, value) of each of ``lines``: "line 3", or "item 2" of a list."""
        is_list = self._is_list()
        for number, value in self.lines(kind):
            yield f"item {number - 1}" if is_list else f"line {number}", value

    def _is_list(self) -> bool:
        """Whether the file holds one JSON list, and not a line for each value. A pipe holds lines."""
        if self.path and self._file.is_fifo():
            return False
        with self.open() as file:
            start = file.read(_CHUNK).removeprefix(codecs.BOM_UTF8).lstrip()
        return start.startswith(b"[")

    def items(self, kind: type[T], id_field: str) -> Iterator[tuple[Place, T]]:
        """Each item of a JSON list of objects. Messages name an item by its number and its ``id_field``.

        Holds one item and one chunk at a time: LongMemEval-S is a quarter of a gigabyte, and each rollout
        worker reads it.
        """
        start = replaced = 0
        with self.open() as file:
            for number, end in enumerate(self._item_ends()):
                content = file.read(end - start).removeprefix(codecs.BOM_UTF8).lstrip(b"[, \t\r\n")
                place, start = Place(number, end - len(content), end), end
                cleaned, count = encodable_json(content)
                replaced += count
                yield place, self._value(cleaned, kind, partial(_name, number, cleaned, id_field))
        self._warn(replaced)

    def read_item(self, place: Place, kind: type[T]) -> T | None:
        """An item again; None where the file has changed and holds no such item there."""
        with self.open() as file:
            file.seek(place.start)
            content, _ = encodable_json(file.read(place.end - place.start))
        try:
            return parse_json(content, kind)
        except FileError:
            return None

    def _value(self, content: bytes, kind: type[T], name: Callable[[], str]) -> T:
        """``content`` as ``kind``. ``name`` is asked for the part's name when it is none."""
        try:
            return parse_json(content, kind)
        except FileError as error:
            raise self.fault(name(), str(error)) from None

    def _warn(self, replaced: int) -> None:
        if replaced:
            _log.warning("%s: %d character(s) that cannot be encoded became U+FFFD", self.path, replaced)

    def fault(self, name: str, fault: str) -> TaskError:
        """The error that a part of the file is wrong."""
        shown = fault if len(fault) <= _SHOWN_FAULT else f"{fault[:_SHOWN_FAULT]}..."
        return TaskError(f"{self.path}: {name}: {shown}" if name else f"{self.path}: {shown}")

    def empty(self, parts: str) -> TaskError:
        """The error that the file has none of its ``parts`` ("items")."""
        return self.fault("", f"it has no {parts}: give {self.setting} the path of {self.what}")

    def no_list(self) -> TaskError:
        """The error that the file is no JSON list."""
        return self.fault("", f"Input should be a JSON list: give {self.setting} the path of {self.what}")

    def _item_ends(self) -> Iterator[int]:
        """The byte after each item of the list.

        Why: ijson parses a stream but tells no byte offsets, and an episode reads its own item again. Only
        a "}" ends an object. So the parser gets the file in pieces that end at the next "}": when it reports
        the end of an item, the item ends with the piece.
        """
        events = ijson.sendable_list()
        # Basic events: ijson's other events name their path, which takes memory quadratic in the depth.
        # use_float: without it a number of thousands of digits is a SystemError of ijson 3.6.
        parser = ijson.basic_parse_coro(events, use_float=True)
        number, depth, end = 0, 0, 0
        try:
            for piece in self._pieces():
                # Only the structure counts here, and the parser refuses what cannot be encoded.
                parser.send(_HALF.sub(rb"\\u00", piece.translate(_ASCII)))
                end += len(piece)
                for event, _ in events:
                    outside = depth == 0
                    depth += _DEPTH.get(event, 0)
                    if outside and event != "start_array":
                        raise self.no_list()
                    if depth == 1 and not outside:
                        if event != "end_map":
                            raise self.fault(f"item {number}", "Input should be an object")
                        yield end
                        number += 1
                events.clear()
            parser.close()
        except ijson.JSONError as error:
            reason = _PARSER_REASON.search(str(error))
            cause = f"not JSON ({reason[1] if reason else error}) after byte {end}"
            raise self.fault(f"item {number}", cause) from None
        if events:  # a number is over only when the file is
            raise self.no_list()

    def _pieces(self) -> Iterator[bytes]:
        with self.open() as file:
            mark = file.read(len(codecs.BOM_UTF8))
            # blanks in its place: the bytes are counted
            start = b" " * len(mark) if mark == codecs.BOM_UTF8 else mark
            while chunk := start + file.read(_CHUNK):
                start = b""
                while b"\\" in chunk[-_LONGEST_ESCAPE:] and (more := file.read(_LONGEST_ESCAPE)):
                    chunk += more  # an escape is never cut in two
                yield from _TO_BRACE.findall(chunk)


def encodable_json(content: bytes) -> tuple[bytes, int]:
    """JSON text whose characters can all be encoded, and how many were replaced by U+FFFD."""
    count = 0

    def whole(escape: re.Match[bytes]) -> bytes:
        nonlocal count
        if escape[1] is None:
            return escape[0]
        count += 1
        return rb"\ufffd"

    if _HALF.search(content):
        content = _ESCAPE.sub(whole, content)
    try:
        content.decode()
    except UnicodeDecodeError:
        text = content.decode(errors="replace")
        count += text.count("\ufffd") - content.count("\ufffd".encode())
        content = text.encode()
    return content, count


def _name(number: int, content: bytes, id_field: str) -> str:
    try:
        item = json.loads(content)
    except (ValueError, RecursionError):
        item = None
    name = item.get(id_field) if isinstance(item, dict) else None
    shown = str(name)[:_SHOWN_NAME] if isinstance(name, (str, int)) and name != "" else ""
    return f"item {number} ({shown!r})" if shown else f"item {number}"
