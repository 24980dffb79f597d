"""The ``inspect`` subcommand: its arguments, and from them to an episode and its views."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cluster.inspection.compare import Compared
    from cluster.inspection.record import Record

_EXAMPLES = """examples:
  python -m cluster inspect runs/quickstart-20260101-120000                      which episodes the run kept
  python -m cluster inspect runs/quickstart-20260101-120000 --episode 3          the third of them
  python -m cluster inspect runs/quickstart-20260101-120000 --episode train-44.1 --html episode.html
  python -m cluster inspect runs/.../episodes/step-000012--train-44.1.json --compare

How many episodes a run keeps is set by episodes.per_step, episodes.per_evaluation and episodes.failed. --compare loads the model, rebuilds the fast
weights from the episode's log of writes, and answers again with them and without.
"""


def add_inspect(commands: Any) -> None:
    text = "look into an episode: what the agent read, wrote into its weights, and answered"
    command = commands.add_parser(
        "inspect",
        help=text,
        description=f"{text.capitalize()}.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument(
        "run",
        type=Path,
        metavar="RUN_OR_FILE",
        help="the folder of a run (or of an evaluation), or an episode's file",
    )
    command.add_argument(
        "--episode",
        default="",
        metavar="N|NAME",
        help="which of the run's: its number in the list, or a part of its name",
    )
    command.add_argument(
        "--html",
        type=Path,
        metavar="FILE",
        help="write the episode as one HTML page instead of showing it here",
    )
    command.add_argument(
        "--compare",
        action="store_true",
        help="also answer again with and without the fast weights (loads the model)",
    )
    command.set_defaults(settings=False)  # it has none
    command.add_argument(
        "--policy",
        type=Path,
        metavar="FOLDER",
        help="with --compare: the checkpoint that the episode was played on",
    )


def run_inspect(options: argparse.Namespace) -> None:
    """Raises ConfigError for the arguments, RecordError for the files, and what ``compare`` raises."""
    from rich.console import Console

    from cluster.inspection.record import list_records, load
    from cluster.inspection.terminal import show, show_list
    from configs.load import ConfigError

    if options.policy is not None and not options.compare:
        raise ConfigError("argument --policy: belongs to --compare")
    console = Console(highlight=False)
    path: Path | None = options.run
    if not options.run.is_file():
        path = _chosen(options.run, options.episode)
    elif options.episode:
        raise ConfigError(
            f"argument --episode: {options.run} is one episode; give the run's folder to choose from"
        )
    if path is None:
        if options.html or options.compare:
            raise ConfigError("arguments --html and --compare need one episode: choose it with --episode N")
        show_list(options.run, list_records(options.run), console)
        return
    record = load(path)
    compared = _compared(record, path.absolute(), options.policy) if options.compare else ()
    if options.html is None:
        show(record, compared, console)
    else:
        _save_page(record, compared, options.html)
        console.print(f"{options.html}: open it in a browser", markup=False, soft_wrap=True)


def _compared(record: Record, path: Path, policy: Path | None) -> tuple[Compared, ...]:
    """A log that cannot be replayed is the user's mistake: it belongs to other weights."""
    from actors.protocols import WriterError
    from cluster.inspection.compare import compare
    from cluster.inspection.record import RecordError

    try:
        return compare(record, path, policy)
    except WriterError as error:
        raise RecordError(f"{path}: {error}") from None


def _save_page(record: Record, compared: Sequence[Compared], target: Path) -> None:
    from cluster.inspection.page import render
    from cluster.inspection.record import RecordError, save_text

    try:
        save_text(render(record, compared), target)
    except OSError as error:
        raise RecordError(f"{target}: cannot be written ({error.strerror or error})") from None


def _chosen(run: Path, wanted: str) -> Path | None:
    """The record that ``wanted`` names; None where nothing is named. Raises RecordError."""
    from cluster.inspection.record import FOLDER, RecordError, list_records

    if not run.is_dir():
        raise RecordError(
            f"{run} does not exist: give the folder of a run, e.g. runs/quickstart-..., or an episode's file"
        )
    paths = list_records(run)
    if not paths:
        raise RecordError(
            f"{run / FOLDER} holds no episode: the run kept none (episodes.per_step, episodes.per_evaluation), or is no run's folder"
        )
    if not wanted:
        return None
    if wanted.isdecimal() and 1 <= int(wanted) <= len(paths):
        return paths[int(wanted) - 1]
    fitting = [path for path in paths if wanted in path.stem]
    if len(fitting) == 1:
        return fitting[0]
    have = ", ".join(path.stem for path in (fitting or paths)[:5])
    raise RecordError(
        f"--episode {wanted}: {len(fitting)} of the {len(paths)} episodes fit; give a number from 1 to {len(paths)}, or one of {have}"
    )
