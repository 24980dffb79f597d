"""How ``--help`` looks: examples as they are typed, prose as wide as the terminal, no Python types."""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand

EXAMPLE_COLUMNS = 79  # of a line that is not wrapped: a terminal has 80


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
