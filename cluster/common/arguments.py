"""Command-line arguments that several commands share: their types, checks and completion with Tab.

Nothing heavy is imported at the top: ``--help`` and Tab answer at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
from typer.core import TyperCommand

from configs.bounds import ConfigError
from configs.shipped import find_config, shipped

EXAMPLE_COLUMNS = 79  # of a line that is not wrapped: a terminal has 80


def complete_config(incomplete: str) -> list[str]:
    """Shipped configurations. Where none fits, the shell completes a path."""
    return [name for name in shipped() if name.startswith(incomplete)]


def complete_setting(context: typer.Context, incomplete: str) -> Iterator[tuple[str, str]]:
    """Keys of the schema, then values where the schema lists them."""
    from configs.reference import settings

    key, equals, _ = incomplete.partition("=")
    prefix = f"{key}="
    given = context.params.get("settings") or []
    if len(given) > 1 and given[-1] == "=":  # bash hands key, = and value over as three words
        key, equals, prefix = given[-2], "=", ""
    if not equals:
        for known, setting in settings().items():
            yield f"{known}=", setting.help or setting.allowed
    elif key in settings():
        kind = settings()[key].kind
        values = get_args(kind) if get_origin(kind) is Literal else ("true", "false") if kind is bool else ()
        for value in values:
            yield f"{prefix}{value}", ""


def show_settings(wanted: bool) -> None:
    """Print every setting and end the command. Called when ``--settings`` is given, before anything else."""
    if wanted:
        from rich.console import Console

        from configs.reference import settings_help

        Console().print(settings_help())
        raise typer.Exit


Config = Annotated[
    str,
    typer.Argument(
        metavar="CONFIG",
        help="a shipped configuration by name, e.g. quickstart, or a YAML file",
        autocompletion=complete_config,
        show_default=False,
    ),
]


def setting_words(example: str) -> Any:
    """The argument of a command's settings. ``example``: one that its user may want."""
    return typer.Argument(
        metavar="key=value",
        help=f"settings to change, e.g. {example}",
        autocompletion=complete_setting,
        show_default=False,
    )


Settings = list[str] | None
PrintConfig = Annotated[
    bool, typer.Option("--print-config", help="print the resolved configuration and stop")
]
ListSettings = Annotated[
    bool,
    typer.Option("--settings", help="list every setting and stop", callback=show_settings, is_eager=True),
]


def required_config(command: str, text: str) -> Path:
    """The file of a command's CONFIG. Raises ConfigError."""
    if not text or "=" in text:
        raise ConfigError(f"{command} needs a configuration before the settings, e.g. quickstart")
    return find_config(text)


def split_names(option: str, text: str) -> tuple[str, ...]:
    """The names of "a,b,c", () of an empty text. Raises ConfigError."""
    names = tuple(name.strip() for name in text.split(",")) if text else ()
    if not all(names):
        raise ConfigError(f"argument {option}: {text!r} has an empty name: write a,b,c")
    return names


def require_distinct(sweeps: Sequence[str]) -> None:
    """Raise ConfigError where two ``--sweep`` have the same key: the later would replace the earlier."""
    keys = [sweep.partition("=")[0] for sweep in sweeps]
    twice = next((key for key in keys if keys.count(key) > 1), None)
    if twice is not None:
        values = [sweep.partition("=")[2] for sweep in sweeps if sweep.partition("=")[0] == twice]
        raise ConfigError(f"--sweep {twice} is given twice: write {twice}={','.join(values)}")


def split_seeds(option: str, text: str) -> tuple[int, ...]:
    """The seeds of "0,1,2", () of an empty text. Raises ConfigError."""
    parts = text.split(",") if text else []
    seeds = tuple(int(part) for part in parts if part.isdecimal())
    if len(set(seeds)) < len(parts):  # a part is no number, or two are equal, perhaps in other digits: 0,00
        cure = "give whole numbers from 0 on, each once, e.g. 0,1,2"
        raise ConfigError(f"argument {option}: {text!r} is not allowed: {cure}")
    return seeds


class Command(TyperCommand):
    """A command. Typer names the type behind each argument, such as ``<list[str]>``; this shows its name."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        records = [(param, param.get_help_record(ctx)) for param in self.get_params(ctx)]
        for title, kind in (("Arguments", "argument"), ("Options", "option")):
            shown = [record for param, record in records if record and param.param_type_name == kind]
            if kind == "argument":
                shown = [(name.partition(" <")[0], text) for name, text in shown]
            if shown:
                with formatter.section(title):
                    formatter.write_dl(shown)


def epilog(text: str) -> str:
    """``text`` for the end of a command's help.

    A paragraph with an indented line is shown as it is: click has a sign for it. Others are wrapped.
    """
    paragraphs = text.strip().split("\n\n")
    return "\n\n".join(f"\b\n{part}" if "\n " in f"\n{part}" else part for part in paragraphs)
