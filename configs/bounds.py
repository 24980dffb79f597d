"""How the schema refuses a value: key, value, bound and cure in one line."""

from __future__ import annotations

import math
import re

_LONGEST = 200


class BoundError(ValueError):
    """A setting's value is out of bounds. ``key`` is relative to its section until the loader puts the section in front."""

    def __init__(self, key: str, value: object, bound: str) -> None:
        super().__init__(key, value, bound)
        self.key, self.value, self.bound = key, value, bound

    def __str__(self) -> str:
        return f"{self.key}={shown(self.value)} is not allowed: it must be {self.bound}"


def shown(value: object) -> str:
    """``value`` for a message: as Python writes it, cut where it would fill a screen."""
    text = repr(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def require(condition: bool, key: str, value: object, bound: str, cure: str = "") -> None:
    """Raise BoundError unless ``condition`` holds."""
    if not condition:
        raise BoundError(key, value, f"{bound}; {cure}" if cure else bound)


def positive(config: object, *names: str) -> None:
    """The named fields must be finite and greater than 0."""
    for name in names:
        value = getattr(config, name)
        require(math.isfinite(value) and value > 0, name, value, "greater than 0")


def not_negative(config: object, *names: str) -> None:
    """The named fields must be finite and 0 or more."""
    for name in names:
        value = getattr(config, name)
        require(math.isfinite(value) and value >= 0, name, value, "0 or more")


def custom_resource(name: str) -> None:
    """``name`` is empty, or can be a custom resource of a Ray cluster."""
    own = re.fullmatch(r"[A-Za-z][\w-]*", name) is not None and name.lower() not in (
        "cpu",
        "gpu",
        "memory",
        "object_store_memory",
    )
    require(
        name == "" or own,
        "resource",
        name,
        "a name of letters, digits, _ and -",
        "CPU, GPU and memory have settings of their own",
    )
