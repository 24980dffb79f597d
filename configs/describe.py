"""Every setting by its dotted key, read from the schema: what the loader checks keys against and what ``--help`` shows."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

from configs.schema import RunConfig

if TYPE_CHECKING:
    from rich.console import RenderableType

PLAIN_TYPES = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
_COMMENTED_FIELD = re.compile(r"^    (\w+): .*?  # (.+)$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Setting:
    """One leaf of the configuration. ``allowed`` says in words what a value may be; ``help`` is the field's comment in the schema."""

    key: str
    kind: object
    allowed: str
    default: object
    help: str


@dataclass(frozen=True, slots=True)
class Section:
    """One dataclass of the schema. ``key`` is "" for the run itself; ``title`` is its docstring on one line."""

    key: str
    title: str
    settings: tuple[Setting, ...]


@cache
def sections() -> tuple[Section, ...]:
    """The schema's sections in its own order, the run's plain settings first."""
    return tuple(_walk("", RunConfig))


@cache
def settings() -> dict[str, Setting]:
    """All settings by dotted key."""
    return {setting.key: setting for section in sections() for setting in section.settings}


def describe() -> list[tuple[str, str, object, str]]:
    """(key, allowed values in words, default, help) of every setting."""
    return [(setting.key, setting.allowed, setting.default, setting.help) for setting in settings().values()]


def help_table() -> RenderableType:
    """The settings as rich tables, one a section, each under its section's docstring."""
    from rich.console import Group
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    parts: list[RenderableType] = []
    for section in sections():
        if not section.settings:
            continue
        table = Table(box=None, pad_edge=False, show_header=False)
        table.add_column(style="cyan", no_wrap=True)
        table.add_column(style="green", no_wrap=True)
        table.add_column()
        for setting in section.settings:
            note = f"{setting.allowed}; {setting.help}" if setting.help else setting.allowed
            table.add_row(Text(setting.key), Text(shown_default(setting.default)), Text(note))
        parts += [
            Text(section.key or "the run", style="bold"),
            Text(section.title, style="dim"),
            Padding(table, (0, 0, 1, 2)),
        ]
    return Group(*parts)


def _walk(prefix: str, cls: type[Any]) -> Iterator[Section]:
    hints = get_type_hints(cls)
    notes = dict(_COMMENTED_FIELD.findall(inspect.getsource(cls)))
    leaves: list[Setting] = []
    nested: list[tuple[str, type[Any]]] = []
    defaults = cls()
    for field in fields(cls):
        key, kind = f"{prefix}{field.name}", hints[field.name]
        if isinstance(kind, type) and is_dataclass(kind):
            nested.append((f"{key}.", kind))
        else:
            leaves.append(
                Setting(key, kind, _allowed(kind), getattr(defaults, field.name), notes.get(field.name, ""))
            )
    title = inspect.cleandoc(cls.__doc__ or "").split("\n\n")[0].replace("\n", " ")
    yield Section(prefix.removesuffix("."), title, tuple(leaves))
    for key, kind in nested:
        yield from _walk(key, kind)


def _allowed(kind: Any) -> str:
    if kind in PLAIN_TYPES:
        return PLAIN_TYPES[kind]
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(str, get_args(kind)))}"
    if get_origin(kind) is tuple:
        return f"a list [...], each item {_allowed(get_args(kind)[0])}"
    if get_origin(kind) is dict:
        return "a mapping {key: value, ...}"
    raise TypeError(f"the schema has a field of type {kind}, for which describe.py has no words")


def shown_default(default: object) -> str:
    """As it is written on the command line."""
    if isinstance(default, tuple):
        return f"[{','.join(map(str, default))}]"
    if isinstance(default, dict):
        return "{}" if not default else str(default)
    return str(default).lower() if isinstance(default, bool) else '""' if default == "" else str(default)
