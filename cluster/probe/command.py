"""The ``probe`` subcommand: its arguments, and from them to a probe."""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import Any

from cluster.probe.grid import Study, load_study
from configs.load import ConfigError, to_yaml
from configs.shipped import shipped

_EXAMPLES = """cards: a JSON or JSONL file of {"question", "answer"[, "paraphrases": [...]][, "telling"]}, or recall:N for N made-up facts with
       paraphrases (recall:train:N: other people and answers, to tune on)
grid:  settings of write.* and fast_weights.*, and supervision=flashcards|summary|raw: what of the facts a write trains on
       (write.rehearsal is of earlier flashcards: the others have none)

examples:
  python -m cluster probe configs/quickstart.yaml --cards recall:12
  python -m cluster probe configs/quickstart.yaml --cards cards.jsonl --unrelated novel.txt --each-step
  python -m cluster probe configs/quickstart.yaml --cards recall:12 --sweep fast_weights.basis=svd,random write.learning_rate=5e-4,2e-3 --seeds 0,1,2
  python -m cluster probe configs/quickstart.yaml --cards recall:12 --cell write.optimizer=sgd write.epochs=5 \\
      --cell write.optimizer=adam write.learning_rate=1e-3 write.epochs=20
  python -m cluster probe configs/quickstart.yaml --cards recall:12 --sweep supervision=raw,summary,flashcards
  python -m cluster probe configs/quickstart.yaml --study write
  python -m cluster probe configs/quickstart.yaml --cards recall:64 --writes 16 --sweep write.rehearsal=0,4
"""


def add_probe(commands: Any) -> None:
    text = "what a write is worth: recall of written cards and of paraphrases, damage to unrelated text"
    command = commands.add_parser(
        "probe",
        help=text,
        description=text.capitalize() + ".",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument(
        "config", nargs="?", default=None, metavar="CONFIG", help="a YAML file, e.g. configs/quickstart.yaml"
    )
    command.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings of all cells that differ from the file"
    )
    command.add_argument(
        "--study",
        metavar="NAME|FILE",
        help=f"cards, seeds, writes and grid from a file; shipped: {', '.join(shipped('studies'))}",
    )
    command.add_argument("--cards", metavar="FILE|recall:N", help="what is written and asked")
    command.add_argument(
        "--unrelated",
        type=Path,
        metavar="FILE",
        help="text to measure damage on: running text, or .jsonl of questions (shipped text)",
    )
    command.add_argument(
        "--sweep",
        nargs="+",
        action="append",
        default=[],
        metavar="key=v1,v2",
        help="the grid: every value with every other",
    )
    command.add_argument(
        "--cell",
        nargs="+",
        action="append",
        default=[],
        metavar="key=value",
        help="settings that belong together, one cell",
    )
    command.add_argument(
        "--each-step", action="store_true", help="measure after each optimizer step of a write, too"
    )
    command.add_argument(
        "--writes", type=_count, metavar="N", help="the cards come as N successive writes (default 1)"
    )
    command.add_argument(
        "--seeds", type=_seeds, metavar="0,1,2", help="of the cards and of a random basis (default 0)"
    )
    command.add_argument(
        "--resume",
        type=Path,
        metavar="FOLDER",
        help="go on in the folder of an earlier run: its finished cells are not run again",
    )
    command.add_argument(
        "--print-config", action="store_true", help="print the resolved configuration and stop"
    )
    command.add_argument("--settings", action="store_true", help="list every setting and stop")


def run_probe(options: argparse.Namespace) -> None:
    """Raises ConfigError for the arguments, and what ``probe`` raises."""
    from cluster.probe.grid import load_grid

    if options.config is None or "=" in options.config:
        raise ConfigError(
            "probe needs a configuration file before the settings, e.g. configs/quickstart.yaml"
        )
    study = Study() if options.study is None else load_study(options.study)
    sweep = list(itertools.chain.from_iterable(options.sweep))
    config, cells = load_grid(
        Path(options.config), options.overrides, options.cell or study.cells, sweep or study.sweep
    )
    if options.print_config:
        print(to_yaml(config), end="")  # noqa: T201  (what was asked for)
        return
    cards = options.cards or study.cards
    if not cards:
        raise ConfigError(
            "probe needs --cards: a file of questions and answers, or recall:N for N made-up facts"
        )

    from cluster.common.display import Display
    from cluster.probe.run import ProbeOptions, probe

    each_step, writes, seeds = (
        options.each_step or study.each_step,
        options.writes or study.writes,
        options.seeds or study.seeds,
    )
    chosen = ProbeOptions(cards, options.unrelated, each_step, writes, seeds, options.resume)
    probe(config, cells, chosen, Display())


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed: give a whole number, 1 or more")
    return int(text)


def _seeds(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    seeds = tuple(int(part) for part in parts if part.isdecimal())
    if len(set(seeds)) < len(parts):  # one is no number, or there twice, perhaps in other digits: 0,00
        raise argparse.ArgumentTypeError(
            f"{text!r} is not allowed: give whole numbers with commas between them, each once, e.g. 0,1,2"
        )
    return seeds
