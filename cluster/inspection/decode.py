"""JSON back into frozen dataclasses, every value checked: a foreign or damaged file is one line that names the field, never a half-made value."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints


class DecodeError(ValueError):
    """What is not as declared: "segments[2].revision: expected a whole number, got a text"."""


def decode(kind: Any, value: object, where: str) -> Any:
    """``value`` (of json.loads) as ``kind``: str, bool, int, float (null is NaN), Literal, tuple[X, ...], Mapping[str, X] or a dataclass of these."""
    if is_dataclass(kind):
        return _dataclass(kind, value, where)
    origin = get_origin(kind)
    if origin is Literal:
        if value not in get_args(kind):
            raise _wrong(where, f"one of {', '.join(map(str, get_args(kind)))}", value)
        return value
    if origin is tuple:
        if not isinstance(value, list):
            raise _wrong(where, "a list", value)
        return tuple(
            decode(get_args(kind)[0], inner, f"{where}[{place}]") for place, inner in enumerate(value)
        )
    if origin is Mapping:
        if not isinstance(value, dict):
            raise _wrong(where, "an object", value)
        return {key: decode(get_args(kind)[1], inner, f"{where}.{key}") for key, inner in value.items()}
    return _scalar(kind, value, where)


def _scalar(kind: Any, value: object, where: str) -> Any:
    if kind is str and isinstance(value, str):
        return value
    if kind is bool and isinstance(value, bool):
        return value
    if kind is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if kind is float and (value is None or (isinstance(value, int | float) and not isinstance(value, bool))):
        return math.nan if value is None else float(value)
    expected = {str: "a text", bool: "true or false", int: "a whole number", float: "a number or null"}[kind]
    raise _wrong(where, expected, value)


def _dataclass(kind: Any, value: object, where: str) -> Any:
    if not isinstance(value, dict):
        raise _wrong(where, "an object", value)
    hints, names = get_type_hints(kind), [field.name for field in fields(kind)]
    prefix = f"{where}." if where else ""
    if missing := [name for name in names if name not in value]:
        raise DecodeError(f"{prefix}{missing[0]}: is missing")
    if unknown := [name for name in value if name not in names]:
        raise DecodeError(f"{prefix}{str(unknown[0])[:60]}: is not known here")
    try:
        return kind(**{name: decode(hints[name], value[name], f"{prefix}{name}") for name in names})
    except DecodeError:
        raise
    except ValueError as error:  # the value's own rules
        raise DecodeError(f"{where or 'the record'}: {error}") from None


def _wrong(where: str, expected: str, value: object) -> DecodeError:
    kinds: dict[type, str] = {
        str: "a text",
        bool: "a truth value",
        int: "a number",
        float: "a number",
        list: "a list",
        dict: "an object",
    }
    return DecodeError(
        f"{where or 'the record'}: expected {expected}, got {kinds.get(type(value), 'nothing' if value is None else 'something else')}"
    )
