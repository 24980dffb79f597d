"""Users' data files, read and checked: whatever is wrong is one line with the file, the item or line, the field and what was expected there.

item = Field("talks.json", "item 3", value)
item["turns"].items()[0]["speaker"].text()   ->   "Ida", or TaskError "talks.json: item 3, turns[0].speaker: expected a text, got null"
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from actors.protocols import TaskError

_MISSING = object()
_LONGEST_ITEM = 80  # characters of a file's own name for an item, in messages


@dataclass(frozen=True, slots=True)
class Field:
    """A value of a file and where it stands, for messages. Every method but ``get`` raises TaskError when the value is of another kind."""

    path: str
    item: str
    value: object
    name: str = ""  # inside the item: "turns[0].speaker"

    def __getitem__(self, key: str) -> Field:
        """The field ``key`` of an object; one that is missing is found so by whoever asks for its value."""
        return self.get(key, _MISSING)

    def get(self, key: str, default: object) -> Field:
        fields = self.object()
        return Field(
            self.path, self.item, fields.get(key, default), f"{self.name}.{key}" if self.name else key
        )

    def either(self, keys: Sequence[str], default: object) -> Field:
        """The first of these fields that the object has."""
        fields = self.object()
        return self.get(next((key for key in keys if key in fields), keys[0]), default)

    def called(self, item: str) -> Field:
        """The same under a better name of its item."""
        return replace(self, item=item)

    def object(self) -> dict[str, Any]:
        if not isinstance(self.value, dict):
            raise self.error("an object")
        return self.value

    def items(self) -> list[Field]:
        """The entries of a list."""
        if not isinstance(self.value, list):
            raise self.error("a list")
        return [
            Field(self.path, self.item, value, f"{self.name}[{place}]")
            for place, value in enumerate(self.value)
        ]

    def text(self, may_be_blank: bool = False) -> str:
        if not isinstance(self.value, str) or not (may_be_blank or self.value.strip()):
            raise self.error("a text")
        return self.value

    def scalar(self) -> str:
        """A text or a number, as text."""
        if (
            isinstance(self.value, bool)
            or not isinstance(self.value, (str, int, float))
            or not str(self.value).strip()
        ):
            raise self.error("a text or a number")
        return str(self.value)

    def error(self, expected: str) -> TaskError:
        item = self.item if len(self.item) <= _LONGEST_ITEM else f"{self.item[:_LONGEST_ITEM]}..."
        where = f"{item}, {self.name}" if self.name else item
        return TaskError(f"{self.path}: {where}: expected {expected}, got {_kind(self.value)}")


def _kind(value: object) -> str:
    if value is _MISSING:
        return "nothing"
    if value is None:
        return "null"
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        return "a list"
    return repr(value) if len(repr(value)) < 40 else f"{repr(value)[:36]}..."


@dataclass(frozen=True, slots=True)
class Source:
    """A file that a setting names. ``what`` says what it should be: "a LoCoMo file (a JSON list of conversations)"."""

    path: str
    setting: str
    what: str

    def read(self) -> str:
        """Raises TaskError."""
        return self.decode(self.read_bytes())

    def read_bytes(self, start: int = 0, size: int = -1) -> bytes:
        """``size`` bytes from ``start`` on, all of them when it is -1. Raises TaskError."""
        if not self.path:
            raise TaskError(f"{self.setting} is empty: give the path of {self.what}")
        try:
            with Path(self.path).open("rb") as file:
                file.seek(start)
                return file.read(size)
        except OSError as error:
            raise TaskError(
                f"{self.path}: cannot be read ({error.strerror}): give {self.setting} the path of {self.what}"
            ) from error

    def decode(self, data: bytes) -> str:
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise TaskError(f"{self.path}: not UTF-8 text at byte {error.start}") from error

    def json(self) -> Any:
        """The whole file as one JSON value. Raises TaskError."""
        try:
            return json.loads(self.read())
        except json.JSONDecodeError as error:
            raise TaskError(
                f"{self.path}: not JSON at line {error.lineno} column {error.colno}: {error.msg}"
            ) from error
        except RecursionError as error:
            raise TaskError(f"{self.path}: nested too deeply for {self.what}") from error
        except ValueError as error:  # a number of thousands of digits
            raise TaskError(f"{self.path}: not JSON: {error}") from error

    def json_list(self, of: str) -> list[Field]:
        """The items of a JSON list of ``of`` ("conversations"), called "item 0", "item 1", ... Raises TaskError."""
        values = self.json()
        if not isinstance(values, list):
            raise TaskError(f"{self.path}: expected a list of {of}, got {_kind(values)}")
        return [Field(self.path, f"item {number}", value) for number, value in enumerate(values)]

    def json_lines(self) -> Iterator[Field]:
        """One JSON value a line, called "line 1", "line 2", ...; blank lines are passed over. Raises TaskError."""
        for number, line in enumerate(self.read().split("\n"), start=1):
            if not line.strip():
                continue
            try:
                yield Field(self.path, f"line {number}", json.loads(line))
            except json.JSONDecodeError as error:
                raise TaskError(
                    f"{self.path}: line {number}: not JSON at column {error.colno}: {error.msg}"
                ) from error
            except RecursionError as error:
                raise TaskError(f"{self.path}: line {number}: nested too deeply for {self.what}") from error
            except ValueError as error:  # a number of thousands of digits
                raise TaskError(f"{self.path}: line {number}: not JSON: {error}") from error
