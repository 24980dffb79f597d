"""Reads YAML as people write it: by the core schema of YAML 1.2, with the text of each scalar kept.

name: 1e3        the text "1e3" for a setting that is a text, 1000.0 for a number
name: on         the text "on": only true and false are truth values
steps: 0010      a text, never 8: `load` refuses it for a number
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import yaml

_TAG = "tag:yaml.org,2002:"
_RESOLVED = (
    ("merge", r"<<", "<"),
    ("null", r"~|null|Null|NULL|", ("~", "n", "N", "")),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    # A number with a leading zero is a text: YAML 1.1 reads it in base 8, YAML 1.2 in base 10.
    ("int", r"[-+]?(?:0|[1-9][0-9]*)|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(?:\.[0-9]+|(?:0|[1-9][0-9]*)(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)"
        r"|\.(?:nan|NaN|NAN)",
        "-+0123456789.",
    ),
)


@dataclass(frozen=True, slots=True)
class Scalar:
    """A number or a truth value, with the text that stands in the file."""

    text: str
    value: bool | int | float


def parse(text: str) -> Any:
    """Mappings, lists, texts, None and Scalars. Raises yaml.YAMLError, ValueError, RecursionError."""
    return yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader


def values(tree: Any) -> Any:
    """``tree`` with its numbers and truth values."""
    if isinstance(tree, dict):
        return {values(key): values(item) for key, item in tree.items()}
    if isinstance(tree, list):
        return [values(item) for item in tree]
    return tree.value if isinstance(tree, Scalar) else tree


def texts(tree: Any) -> Any:
    """``tree`` with a text for each scalar, as it was written."""
    if isinstance(tree, dict):
        return {texts(key): texts(item) for key, item in tree.items()}
    if isinstance(tree, list):
        return [texts(item) for item in tree]
    return tree.text if isinstance(tree, Scalar) else tree


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    yaml_implicit_resolvers: dict[Any, Any] = {}  # noqa: RUF012 - PyYAML's, filled below

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self._checked: set[int] = set()  # ids of nodes: a merge adds keys to a mapping that may stand twice

    def flatten_mapping(self, node: Any) -> None:
        if id(node) not in self._checked:
            self._checked.add(id(node))
            self._refuse_twice(node)
        super().flatten_mapping(node)

    def _refuse_twice(self, node: Any) -> None:
        """Refuse a key that stands twice: the first value would be lost."""
        seen: set[str] = set()
        for key, _ in node.value:
            if key.tag != f"{_TAG}merge" and isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        "while constructing a mapping",
                        node.start_mark,
                        f"found duplicate key {key.value}",
                        key.start_mark,
                    )
                seen.add(key.value)


def _scalar(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> Scalar:
    text = str(loader.construct_scalar(node))
    kind, lowered = node.tag.removeprefix(_TAG), text.lower()
    if kind == "bool":
        return Scalar(text, lowered == "true")
    if kind == "int":
        return Scalar(text, int(text, 0) if lowered[:2] in ("0o", "0x") else int(text))
    return Scalar(text, float(lowered.replace(".inf", "inf").replace(".nan", "nan")))


for _kind, _pattern, _first in _RESOLVED:
    _Loader.add_implicit_resolver(f"{_TAG}{_kind}", re.compile(f"^(?:{_pattern})$"), list(_first))
for _kind in ("bool", "int", "float"):
    _Loader.add_constructor(f"{_TAG}{_kind}", _scalar)
