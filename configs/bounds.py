"""How a setting is refused: key, value, bound and cure in one line."""

from __future__ import annotations

import datetime as dt
import math
import os
import re

HIDDEN = "(hidden)"  # in place of a value that may hold a secret
_LONGEST = 200  # characters of a value in a message
_RAYS_OWN = ("cpu", "gpu", "memory", "object_store_memory")


class ConfigError(ValueError):
    """The configuration cannot be used. One line: where, which key, and what is allowed."""


class BoundError(ValueError):
    """A setting's value is out of bounds.

    ``key`` is relative to its section. The loader puts the section's name in front.
    """

    def __init__(self, key: str, value: object, bound: str) -> None:
        super().__init__(key, value, bound)
        self.key, self.value, self.bound = key, value, bound

    def __str__(self) -> str:
        return f"{self.key}={shown(self.value)} is not allowed: it must be {self.bound}"


def shown(value: object) -> str:
    """``value`` for a message: as Python writes it, cut after 200 characters."""
    text = repr(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def require(condition: bool, key: str, value: object, bound: str, cure: str = "") -> None:
    """Raise BoundError unless ``condition`` holds."""
    if not condition:
        raise BoundError(key, value, f"{bound}; {cure}" if cure else bound)


def folder_name(config: object, name: str) -> None:
    """Require that a field names a folder, and cannot lead out of the one that this folder stands in."""
    value = str(getattr(config, name))
    plain = value.isprintable() and "/" not in value and not value.startswith((".", "-"))
    fits = 0 < len(value.encode()) <= 100  # bytes: a date is added
    bound = "1 to 100 printable characters without /, the first neither . nor -"
    require(plain and fits, name, value, bound, "it names a folder in output_dir")


def positive(config: object, *names: str) -> None:
    """Require that the named fields are finite and greater than 0."""
    for name in names:
        value = getattr(config, name)
        require(math.isfinite(value) and value > 0, name, value, "greater than 0")


def not_negative(config: object, *names: str) -> None:
    """Require that the named fields are finite and 0 or more."""
    for name in names:
        value = getattr(config, name)
        require(math.isfinite(value) and value >= 0, name, value, "0 or more")


def fraction(config: object, name: str) -> None:
    """Require that the named field lies between 0 and 1."""
    value = getattr(config, name)
    require(0 < value < 1, name, value, "between 0 and 1, both excluded")


def home_expanded(config: object, *names: str) -> None:
    """Put the home folder in place of a leading ~ of the named paths, while ``config`` is constructed."""
    for name in names:
        path: str = getattr(config, name)
        if path.startswith("~"):
            object.__setattr__(config, name, os.path.expanduser(path))  # noqa: PTH111 - Path drops a last "/"


def a_day(text: str) -> bool:
    """True for a day such as 2026-11-30, and for no text."""
    try:
        return not text or dt.date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False


def custom_resource(name: str) -> None:
    """Require that ``name`` is empty, or can be a custom resource of a Ray cluster."""
    custom = re.fullmatch(r"[A-Za-z][\w-]*", name) is not None and name.lower() not in _RAYS_OWN
    bound, cure = "a name of letters, digits, _ and -", "CPU, GPU and memory have settings of their own"
    require(name == "" or custom, "resource", name, bound, cure)
