"""The ``inspect`` command: from its arguments to an episode and its views."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cluster.common.quiet import quiet
from configs.bounds import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from cluster.inspection.compare import Compared
    from cluster.inspection.record import Record

EXAMPLES = """examples:
  engram inspect runs/quickstart-20260101-120000               what was kept
  engram inspect runs/quickstart-20260101-120000 --episode 3   the third one
  engram inspect runs/quickstart-20260101-120000 --episode 3 --html page.html
  engram inspect runs/quickstart-20260101-120000 --task recall-eval-0-0
  engram inspect runs/.../episodes/step-000012--train-44.1.json --compare

episodes.per_step, episodes.per_evaluation and episodes.failed set how many episodes a run keeps. --task shows
the siblings and rows of a task side by side. --compare loads the model, rebuilds the fast weights from the
episode's write log, and answers again with them and without.
"""

WATCH_EXAMPLES = """examples:
  engram watch                                          the newest run
  engram watch runs/quickstart-20260101-120000
  engram watch runs/quickstart-20260101-120000 --once   one look, for a log

It reads the run's folder (figures.jsonl, episodes/), so it works wherever that is seen. Ctrl-C ends it, and
leaves the run as it is.
"""


def watch(
    run: Annotated[
        str, typer.Argument(metavar="RUN", help="the run's folder", show_default="the one written to last")
    ] = "",
    once: Annotated[bool, typer.Option("--once", help="show it once and stop")] = False,
    output_dir: Annotated[str, typer.Option(metavar="DIR", help="where to look for the newest")] = "runs",
) -> None:
    """Watch a run: newest episodes, rewards, writes, leak, timeline."""
    from rich.console import Console

    from cluster.inspection.record import RecordError
    from cluster.inspection.watch import look, view
    from cluster.inspection.watch import watch as follow
    from cluster.runs.from_store import local_copy
    from cluster.runs.wanted_workers import newest_run

    folder = local_copy(run, weights=False) if run else newest_run(Path(output_dir))
    if not (folder / "config.yaml").is_file():
        raise RecordError(f"{folder}: is no run's folder: give one, e.g. runs/quickstart-20260101-120000")
    console = Console(highlight=False)
    if once:
        console.print(view(look(folder), console.width))
    else:
        follow(folder, console)


def inspect(
    run: Annotated[
        str,
        typer.Argument(
            metavar="RUN_OR_FILE",
            help="a run's or an evaluation's folder, or an episode's file; or its address in a store",
        ),
    ],
    episode: Annotated[
        str, typer.Option(metavar="N|NAME", help="an episode of the run: its number, or a part of its name")
    ] = "",
    task: Annotated[str, typer.Option(metavar="TASK", help="all kept episodes of a task, side by side")] = "",
    html: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="write the episode as one HTML page instead of showing it"),
    ] = None,
    compare: Annotated[
        bool,
        typer.Option(
            "--compare", help="also answer again with and without the fast weights (loads the model)"
        ),
    ] = False,
    policy: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="with --compare: the checkpoint that the episode was played on"),
    ] = None,
) -> None:
    """Look into an episode.

    What the agent read, wrote into its weights, and answered.
    """
    from rich.console import Console

    from cluster.inspection.record import list_records, load
    from cluster.inspection.terminal import show, show_list
    from cluster.runs.from_store import local_copy

    if policy is not None and not compare:
        raise ConfigError("argument --policy: belongs to --compare")
    console = Console(highlight=False)
    if task:
        if episode or html or compare:
            raise ConfigError(
                "argument --task: shows several episodes; leave out --episode, --html, --compare"
            )
        _show_task(local_copy(run, weights=False), task, console)
        return
    source = local_copy(run, weights=compare)
    path = _chosen(source, episode)
    if path is None:
        if html or compare:
            raise ConfigError("arguments --html and --compare need one episode: choose it with --episode N")
        show_list(source, list_records(source), console)
        return
    record = load(path)
    compared = _compared(record, path.absolute(), policy) if compare else ()
    if html is None:
        show(record, compared, console)
    else:
        _save_page(record, compared, html)
        console.print(f"{html}: open it in a browser", markup=False, soft_wrap=True)


def _show_task(run: Path, task: str, console: Console) -> None:
    """Raises RecordError where no episode, or one that is damaged, was kept of the task."""
    from cluster.inspection.record import RecordError, list_records, load
    from cluster.inspection.siblings import show_siblings

    records = [load(path) for path in list_records(run)]
    chosen = [record for record in records if record.task_id == task]
    if not chosen:
        names = ", ".join(sorted({record.task_id for record in records})[:5]) or "none"
        raise RecordError(f"--task {task}: {run} kept no episode of it; it has some of {names}")
    show_siblings(task, chosen, console)


def _compared(record: Record, path: Path, policy: Path | None) -> tuple[Compared, ...]:
    """The answers with and without fast weights. Raises RecordError for a write log of other weights."""
    from actors.protocols import WriterError
    from cluster.inspection.record import RecordError

    try:
        with quiet(verbose=False):
            from cluster.inspection.compare import compare

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
    """The episode's file; None for a folder where no episode is named. Raises RecordError, ConfigError."""
    from cluster.inspection.record import FOLDER, RecordError, list_records

    if run.is_file():
        if wanted:
            raise ConfigError(
                f"argument --episode: {run} is one episode; give the run's folder to choose from"
            )
        return run
    if not run.is_dir():
        raise RecordError(
            f"{run} does not exist: give the folder of a run, e.g. runs/quickstart-..., or an episode's file"
        )
    paths = list_records(run)
    if not paths:
        raise RecordError(
            f"{run / FOLDER} holds no episode: "
            "the run kept none (episodes.per_step, episodes.per_evaluation), or this is no run's folder"
        )
    if not wanted:
        return None
    if wanted.isdecimal() and 1 <= int(wanted) <= len(paths):
        return paths[int(wanted) - 1]
    fitting = [path for path in paths if wanted in path.stem]
    if len(fitting) == 1:
        return fitting[0]
    names = ", ".join(path.stem for path in (fitting or paths)[:5])
    raise RecordError(
        f"--episode {wanted}: {len(fitting)} of the {len(paths)} episodes fit; "
        f"give a number from 1 to {len(paths)}, or one of {names}"
    )
