"""Every setting by its dotted key, read from the schema, with its help text.

The loader checks keys against it, ``--settings`` prints it, ``make reference`` writes configs/REFERENCE.md.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

from configs.schema import RunConfig
from configs.shipped import shipped

if TYPE_CHECKING:
    from rich.console import RenderableType

PATH = Path(__file__).with_name("REFERENCE.md")
PLAIN_TYPES: dict[Any, str] = {
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    float | None: "a number, or null",
}
_FIELD = re.compile(r"((?:^    # .*\n)*)^    (\w+): .*?(?:  # (.+))?$", re.MULTILINE)
_HEAD = """# Settings

Made from `configs/schema.py` by `make reference`; do not edit. A run's settings are these defaults, then its
file, then `key=value` arguments. The same list in the terminal: `engram train --settings`.

Files: {files}.
The folders `rows/` and `benchmarks/` hold what `engram evaluate` lays over them.
"""


_ABSENT = {
    "tensor_parallel": "an engine runs on one GPU (no tensor parallelism): raise rollout.workers",
    "pipeline_parallel": "an engine runs on one GPU (no pipeline parallelism): raise rollout.workers",
}


def absent(key: str) -> str:
    """What to do without a setting that other projects have; "" where ``key`` is no such name."""
    name = key.rpartition(".")[2].replace("-", "_").replace("model_", "").removesuffix("_size")
    return _ABSENT.get(name, "")


@dataclass(frozen=True, slots=True)
class Setting:
    """One leaf of the configuration.

    ``allowed`` says in words what a value may be. ``help`` is the comment above or beside the field in the
    schema.
    """

    key: str
    kind: object
    allowed: str
    default: object
    help: str

    @property
    def default_text(self) -> str:
        """The default as it is written on the command line."""
        if isinstance(self.default, tuple):
            return f"[{','.join(map(str, self.default))}]"
        if isinstance(self.default, bool):
            return str(self.default).lower()
        if self.default is None:
            return "null"
        return '""' if self.default == "" else str(self.default)


@dataclass(frozen=True, slots=True)
class Section:
    """One dataclass of the schema.

    ``key`` is "" for the run itself. ``title`` is the docstring on one line.
    """

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


def settings_help() -> RenderableType:
    """Each section with its docstring; below it each setting with its default, then what is allowed.

    No table: beside the longest keys a terminal of 80 columns has no room for what is allowed.
    """
    from rich.console import Group
    from rich.padding import Padding
    from rich.text import Text

    parts: list[RenderableType] = []
    for section in filled_sections():
        parts += [Text(section.key or "the run", style="bold"), Text(section.title, style="dim")]
        for setting in section.settings:
            note = f"{setting.allowed}; {setting.help}" if setting.help else setting.allowed
            name = Text.assemble((setting.key, "cyan"), "  ", (setting.default_text, "green"))
            parts += [Padding(name, (0, 0, 0, 2)), Padding(Text(note), (0, 0, 0, 6))]
        parts.append(Text())
    return Group(*parts)


def reference() -> str:
    """Every setting with its default and what is allowed, as Markdown, one table for each section."""
    files = ", ".join(f"`{name}.yaml`" for name in shipped())
    return "\n".join([_HEAD.format(files=files), *map(_markdown, filled_sections())])


def filled_sections() -> list[Section]:
    """The sections that have settings of their own."""
    return [section for section in sections() if section.settings]


def _markdown(section: Section) -> str:
    lines = [f"## {section.key or 'The run'}", "", _escaped(section.title), ""]
    lines += ["| setting | default | allowed | |", "|---|---|---|---|"]
    for setting in section.settings:
        cells = (f"`{setting.key}`", f"`{setting.default_text}`", setting.allowed, setting.help)
        lines.append(f"| {' | '.join(map(_escaped, cells))} |")
    return "\n".join([*lines, ""])


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("``", "`")


def _walk(prefix: str, cls: type[Any]) -> Iterator[Section]:
    hints, notes, defaults = get_type_hints(cls), _notes(cls), cls()
    leaves: list[Setting] = []
    nested: list[tuple[str, type[Any]]] = []
    for field in fields(cls):
        key, kind = f"{prefix}{field.name}", hints[field.name]
        if isinstance(kind, type) and is_dataclass(kind):
            nested.append((f"{key}.", kind))
        else:
            default, note = getattr(defaults, field.name), notes[field.name]
            leaves.append(Setting(key, kind, _allowed(kind), default, note))
    title = " ".join((cls.__doc__ or "").split())
    yield Section(prefix.removesuffix("."), title, tuple(leaves))
    for key, kind in nested:
        yield from _walk(key, kind)


def _notes(cls: type[Any]) -> dict[str, str]:
    """The comment of each field: the lines above it and the text behind it."""
    return {
        name: " ".join([*(line.removeprefix("    # ") for line in above.splitlines()), beside]).strip()
        for base in reversed(cls.__mro__)
        if is_dataclass(base)
        for above, name, beside in _FIELD.findall(inspect.getsource(base))
    }


def _allowed(kind: Any) -> str:
    if kind in PLAIN_TYPES:
        return PLAIN_TYPES[kind]
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(str, get_args(kind)))}"
    if get_origin(kind) is tuple:
        return f"a list [...], each item {_allowed(get_args(kind)[0])}"
    if get_origin(kind) is dict:
        return "a mapping {key: value, ...}"
    raise TypeError(f"the schema has a field of type {kind}, for which reference.py has no words")


if __name__ == "__main__":
    PATH.write_text(reference(), encoding="utf-8")
