"""The ``probe`` command: from its arguments to a probe."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from cluster.common.arguments import (
    Command,
    Config,
    ListSettings,
    PrintConfig,
    Settings,
    required_config,
    setting_words,
    split_seeds,
)
from cluster.common.quiet import Verbose, quiet
from configs.bounds import ConfigError
from configs.shipped import shipped

_GREEDY = ("--cell", "--sweep")
_BETWEEN = "\0"  # between the words of one option; no argument of a process can hold it
EXAMPLES = """examples:
  engram probe quickstart --cards recall:12
  engram probe quickstart --cards cards.jsonl --unrelated a.txt --each-step
  engram probe quickstart --cards recall:12 --seeds 0,1,2 \\
      --sweep fast_weights.basis=svd,random write.learning_rate=5e-4,2e-3
  engram probe quickstart --cards recall:12 \\
      --cell write.optimizer=sgd write.epochs=5 \\
      --cell write.optimizer=adam write.learning_rate=1e-3 write.epochs=20
  engram probe quickstart --cards recall:12 \\
      --sweep supervision=raw,summary,flashcards
  engram probe quickstart --study write
  engram probe quickstart --cards recall:64 --writes 16 \\
      --sweep write.rehearsal=0,4

cards: a JSON or JSONL file of {"question", "answer"[, "paraphrases": [...]]
       [, "telling"]}, or recall:N for N made-up facts with paraphrases
       (recall:train:N: other people and answers, to tune on; Nx2: each fact
       is written in two wordings)
grid:  settings of write.* and fast_weights.*, and supervision=flashcards,
       summary or raw: what of the facts a write trains on (write.rehearsal
       works with flashcards only)
"""


class ProbeCommand(Command):
    """The command's class. ``--cell a=1 b=2`` takes all words up to the next option, as ``--sweep`` does."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        joined: list[str] = []
        taking = False
        for word in args:
            if word in _GREEDY:
                joined += [word, ""]
                taking = True
            elif taking and not word.startswith("-"):
                joined[-1] += f"{_BETWEEN if joined[-1] else ''}{word}"
            else:
                joined.append(word)
                taking = False
        return super().parse_args(ctx, joined)


def complete_study(incomplete: str) -> list[str]:
    return [name for name in shipped("studies") if name.startswith(incomplete)]


def probe(
    config: Config = "",
    settings: Annotated[Settings, setting_words("write.epochs=20")] = None,
    study: Annotated[
        str,
        typer.Option(
            metavar="NAME|FILE",
            help=f"cards, seeds, writes and grid from a file; shipped: {', '.join(shipped('studies'))}",
            autocompletion=complete_study,
        ),
    ] = "",
    cards: Annotated[str, typer.Option(metavar="FILE|recall:N", help="what is written and asked")] = "",
    unrelated: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="text to measure damage on: running text, or .jsonl of questions",
            show_default="shipped text",
        ),
    ] = None,
    sweep: Annotated[
        list[str] | None,
        typer.Option(metavar="key=v1,v2 ...", help="the grid: every value with every other"),
    ] = None,
    cell: Annotated[
        list[str] | None,
        typer.Option(metavar="key=value ...", help="settings that belong together, one cell"),
    ] = None,
    each_step: Annotated[
        bool, typer.Option("--each-step", help="also measure after each optimizer step of a write")
    ] = False,
    writes: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="the cards come as N successive writes", show_default="1"),
    ] = None,
    seeds: Annotated[
        str, typer.Option(metavar="0,1,2", help="of the cards and of a random basis", show_default="0")
    ] = "",
    resume: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="go on in an earlier probe's folder; finished cells are kept"),
    ] = None,
    verbose: Verbose = False,
    print_config: PrintConfig = False,
    list_settings: ListSettings = False,
) -> None:
    """Measure what a write is worth.

    Recall of written cards and of paraphrases, damage to unrelated text.
    """
    from cluster.common.ray_job import job_overrides
    from cluster.probe.grid import Study, load_grid, load_study
    from configs.load import to_yaml

    path = required_config("probe", config)
    overrides = job_overrides(path, settings or [], os.environ)
    plan = load_study(study) if study else Study()
    chosen_seeds = split_seeds("--seeds", seeds) or plan.seeds
    cells, axes = _words("--cell", cell), itertools.chain.from_iterable(_words("--sweep", sweep))
    overrides = [*plan.settings, *overrides]
    base, grid = load_grid(path, overrides, cells or plan.cells, list(axes) or plan.sweep)
    if print_config:
        typer.echo(to_yaml(base), nl=False)
        return
    if not (cards or plan.cards):
        allowed = "a file of questions and answers, or recall:N for N made-up facts"
        raise ConfigError(f"probe needs --cards: {allowed}")

    from cluster.common.display import Display

    display = Display()
    with quiet(verbose):
        from cluster.probe.run import ProbeOptions
        from cluster.probe.run import probe as run

        chosen = ProbeOptions(
            cards=cards or plan.cards,
            unrelated=unrelated,
            each_step=each_step or plan.each_step,
            writes=writes or plan.writes,
            seeds=chosen_seeds,
            resume=resume,
        )
        run(base, grid, chosen, display)


def _words(option: str, values: list[str] | None) -> list[list[str]]:
    """The words of each use of ``option``. Raises ConfigError."""
    if not all(values or []):
        raise ConfigError(f"argument {option}: needs one setting or more, e.g. write.epochs=5")
    return [value.split(_BETWEEN) for value in values or []]
