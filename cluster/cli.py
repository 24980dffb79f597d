"""The command ``engram``: one function for each command, and the exit status of what it raises.

    words --> typer --> the command's function --> exit status, or an error in one line on stderr

Nothing heavy (torch, Ray, vLLM, MLflow) is imported at the top: ``--help``, Tab and a mistyped key answer at
once.
"""

from __future__ import annotations

import asyncio
import errno
import os
import sys
import textwrap
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.main import get_command

from cluster.assistant import command as assistant
from cluster.bench.suite import ABOUT
from cluster.common.arguments import (
    EXAMPLE_COLUMNS,
    Command,
    Config,
    ListSettings,
    PrintConfig,
    Settings,
    epilog,
    required_config,
    setting_words,
    split_seeds,
)
from cluster.common.printable import visible
from cluster.common.quiet import Verbose, quiet
from cluster.compare import command as compare
from cluster.evaluation import command as evaluation
from cluster.inspection import command as inspection
from cluster.inspection import trial_command as trial
from cluster.jobs import command as jobs
from cluster.probe import command as probing
from cluster.sizing import command as sizing
from configs.bounds import BoundError, ConfigError

_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO, errno.EACCES, errno.ESTALE)
EXIT_OK, EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 0, 1, 2, 130

_TRAIN_EXAMPLES = """examples:
  engram train quickstart
  engram train quickstart train.steps=4 rollout.workers=2
  engram train locomo environment.conversation.path=locomo10.json
  engram train quickstart resume=auto
  engram train quickstart --seeds 0,1,2     three runs, then their comparison
  engram train quickstart --seeds 0,1,2 --sweep objective.advantage=grpo,rloo
  engram train quickstart --supervise 5     goes on where its process died
  engram train quickstart train.steps=4 --print-config
"""
_SCALE_EXAMPLES = """examples:
  engram scale 4                the newest run in runs/ gets four workers
  engram scale 2 --run /shared/runs/paper-20260101-120000

New workers load the current weights before they get a task. Workers that go finish what they have. The run's
folder must be the one that the driver writes to (on a cluster: a shared one). rollout.schedule=[10:4,50:2]
does the same by training step.
"""
_BENCH_LIST = [
    textwrap.fill(f"  {name:11s} {about}", EXAMPLE_COLUMNS - 2, subsequent_indent=" " * 14)
    for name, about in ABOUT.items()
]
_BENCH_EXAMPLES = f"""benchmarks:
{chr(10).join(_BENCH_LIST)}

examples:
  engram bench                  every benchmark: hours on two cores
  engram bench writer learner   some of them
  engram bench rollout --repeats 9 --threads 1
  engram bench --quick          only whether they run; figures mean nothing
"""
_EXAMPLES = """examples:
  engram train quickstart                      train here, no service needed
  engram train quickstart --seeds 0,1,2        three runs, pooled over seeds
  engram plan one_gpu --gpus 1 --gpu-gib 24    what of it fits
  engram doctor                                what would stop a run here
  engram evaluate quickstart                   tasks, memory off and on
  engram probe quickstart --cards recall:12    recall of a write, and damage
  engram try my_shop:Shop                      play a task without a model
  engram watch                                 the newest run as it goes on
  engram inspect runs/quickstart-...           what an agent read and wrote
  engram compare runs/tmem-* runs/off-*        runs over seeds, side by side
  engram scale 4                               more or fewer rollout workers
  engram submit train quickstart output_dir=/shared/runs    on a Ray cluster
  engram chat runs/quickstart-...              talk to what was trained
  engram serve runs/quickstart-...             an OpenAI-compatible endpoint
  engram memory ada                            what a conversation has learnt
  engram export runs/quickstart-... exported   a plain Hugging Face folder
  engram bench                                 every seam beside a baseline
  engram train --settings                      every setting
  engram COMMAND --help                        more about a command
  engram --install-completion                  complete words with Tab

In a checkout python -m cluster is the same command.
"""

app = typer.Typer(
    rich_markup_mode=None,  # rich would wrap the examples, and put a mistake into a box
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)


def console_script() -> None:
    """The console script. Unlike ``python -m cluster`` it works in every folder.

    The current folder is not at the front of sys.path: a user's cluster.py or configs/ there hides nothing.
    At its end it still offers modules that only the user has (environment.custom=my_tasks:build).
    """
    sys.path.append(str(Path.cwd()))
    sys.exit(main())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns its exit status: 0 done, 1 the run failed, 2 the user's mistake, 130 interrupted.
    """
    words = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    try:
        status: int | None = get_command(app).main(words, prog_name="engram", standalone_mode=False)
    except typer.TyperException as error:
        return _complain(_usage(error), EXIT_USAGE)
    except (ConfigError, BoundError) as error:
        return _complain(str(error), EXIT_USAGE)
    except asyncio.CancelledError:  # a job's stop (SIGTERM) cancels the run, which has said what was saved
        status = EXIT_INTERRUPTED
    except OSError as error:
        if error.errno not in _OF_THE_DISK:
            raise
        cure = "make room or get the right to it, then go on: what was saved before is whole (resume=auto)"
        place = error.filename or "a file"
        return _complain(f"{place}: cannot be written or read ({error.strerror}); {cure}", EXIT_FAILED)
    except (RuntimeError, ValueError) as error:
        failed = _status_of(error)
        if failed is None:
            raise
        # What Ray brings from another process holds that process's traceback. Its cause is the error itself.
        return _complain(str(getattr(error, "cause", None) or error), failed)
    if status == EXIT_INTERRUPTED:  # typer's status for Ctrl-C
        print("interrupted", file=sys.stderr)
    return status or EXIT_OK


# --- the commands that have no room of their own -----------------------------------------------------------


def train(
    config: Config = "",
    settings: Annotated[Settings, setting_words("train.steps=20")] = None,
    seeds: Annotated[
        str,
        typer.Option(
            metavar="0,1,2",
            help="a run for each, one after another; then all are compared",
            show_default="one run",
        ),
    ] = "",
    sweep: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=A,B", help="runs for each value; several --sweep are multiplied"),
    ] = None,
    verbose: Verbose = False,
    print_config: PrintConfig = False,
    list_settings: ListSettings = False,
    supervise: Annotated[
        int,
        typer.Option(
            "--supervise",
            min=0,
            metavar="N",
            help="start a training whose process died again from its last checkpoint, at most N times",
        ),
    ] = 0,
) -> int:
    """Evaluate, train, evaluate again, and compare.

    With --seeds or --sweep several runs. What is missing of them is trained, then a table pools them.
    """
    from cluster.common.ray_job import job_overrides
    from configs.load import load_config, to_yaml

    words = settings or []
    misplaced = next((word for word in words if word.startswith("checkpoint=")), None)
    if misplaced is not None:
        raise ConfigError(f"argument {misplaced!r}: belongs to evaluate; train takes resume=FOLDER")
    path = required_config("train", config)
    if supervise and (seeds or sweep):
        raise ConfigError(f"--supervise {supervise}: watches one run, without --seeds and --sweep")
    if (seeds or sweep) and not print_config:
        return _train_several(path, words, seeds, sweep or [], verbose)
    loaded = load_config(path, job_overrides(path, words, os.environ))
    if print_config:
        print(to_yaml(loaded), end="")
        return EXIT_OK
    if supervise:
        from cluster.train.supervise import Supervisor, this_command

        command = [*this_command(sys.argv[1:]), "train", config, *(["--verbose"] if verbose else [])]
        return Supervisor(command, words, loaded, supervise, partial(print, flush=True)).run()

    from cluster.common.display import Display

    display = Display()
    with quiet(verbose):
        from cluster.train.run import train_config

        train_config(loaded, display)
    return EXIT_OK


def _train_several(path: Path, words: list[str], seeds: str, sweep: list[str], verbose: bool) -> int:
    from cluster.common.display import Display

    display, chosen = Display(), split_seeds("--seeds", seeds)
    with quiet(verbose):
        from cluster.compare.seeds import play_in_process, train_runs, wanted_runs

        runs = wanted_runs(path, words, chosen, sweep)
    return train_runs(runs, verbose, display, play_in_process)


def scale(
    workers: Annotated[int, typer.Argument(min=1, metavar="N", help="how many there should be")],
    run: Annotated[
        str, typer.Option(metavar="FOLDER", help="the run's folder", show_default="the one written to last")
    ] = "",
    output_dir: Annotated[str, typer.Option(metavar="DIR", help="where to look for it")] = "runs",
) -> None:
    """Add or remove rollout workers while a run goes on."""
    from cluster.runs.wanted_workers import ask_for, newest_run

    run_dir = Path(run) if run else newest_run(Path(output_dir))
    ask_for(run_dir, workers)
    print(f"{run_dir}: asked for {workers} rollout worker(s); the run says when they serve")


def complete_benchmark(incomplete: str) -> list[str]:
    return [name for name in ABOUT if name.startswith(incomplete)]


def bench(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="NAME",
            help="which benchmarks",
            show_default="all",
            autocompletion=complete_benchmark,
        ),
    ] = None,
    model: Annotated[
        str, typer.Option(metavar="MODEL", help="smollm2-135m, a folder or a hub name")
    ] = "smollm2-135m",
    repeats: Annotated[int, typer.Option(min=1, metavar="N", help="pairs of measurements of each case")] = 5,
    threads: Annotated[int, typer.Option(min=1, metavar="N", help="CPU threads of what is measured")] = 1,
    quick: Annotated[
        bool, typer.Option("--quick", help="smallest sizes, one repeat: only shows that it runs")
    ] = False,
    output_dir: Annotated[Path, typer.Option(metavar="DIR", help="where the report goes")] = Path("runs"),
    no_tracking: Annotated[bool, typer.Option("--no-tracking", help="do not log to MLflow")] = False,
    verbose: Verbose = False,
) -> None:
    """Measure every seam against a named baseline.

    Both take turns on this machine. Prints tables; writes report.md, report.json and plots; logs to MLflow.
    """
    from cluster.common.display import Display

    display = Display()
    with quiet(verbose):
        from cluster.bench.run import BenchOptions
        from cluster.bench.run import bench as run

        chosen = BenchOptions(
            names=tuple(names or ()),
            model=model,
            repeats=1 if quick else repeats,
            threads=threads,
            quick=quick,
            output_dir=output_dir,
            tracking=not no_tracking,
        )
        run(chosen, display)


# --- all commands, in the order of --help ------------------------------------------------------------------


class _SubmitCommand(Command):
    """Submit's own options stand before the command that it submits; all words behind are that command's."""

    allow_interspersed_args = False


def _add(function: Callable[..., Any], examples: str, kind: type[Command] = Command, name: str = "") -> None:
    app.command(name or None, cls=kind, epilog=epilog(examples))(function)


def _show_version(wanted: bool) -> None:
    """Print Engram's version and end the command."""
    if wanted:
        from cluster.sizing.doctor import own_version

        typer.echo(f"engram {own_version()}")
        raise typer.Exit


@app.callback(epilog=epilog(_EXAMPLES))
def _engram(
    version: Annotated[
        bool,
        typer.Option("--version", help="show the version and stop", callback=_show_version, is_eager=True),
    ] = False,
) -> None:
    """Train and evaluate agents that write their own weights in mid-episode."""


_add(train, _TRAIN_EXAMPLES)
_add(evaluation.evaluate, evaluation.EXAMPLES)
_add(probing.probe, probing.EXAMPLES, probing.ProbeCommand)
_add(trial.try_environment, trial.EXAMPLES, name="try")
_add(inspection.watch, inspection.WATCH_EXAMPLES)
_add(inspection.inspect, inspection.EXAMPLES)
_add(compare.compare, compare.EXAMPLES)
_add(scale, _SCALE_EXAMPLES)
_add(assistant.chat, assistant.CHAT_EXAMPLES)
_add(assistant.serve, assistant.SERVE_EXAMPLES)
_add(assistant.memory, assistant.MEMORY_EXAMPLES)
_add(assistant.export, assistant.EXPORT_EXAMPLES)
_add(jobs.submit, jobs.SUBMIT_EXAMPLES, _SubmitCommand)
_add(jobs.status, jobs.STATUS_EXAMPLES)
_add(jobs.logs, jobs.LOGS_EXAMPLES)
_add(jobs.stop, jobs.STOP_EXAMPLES)
_add(bench, _BENCH_EXAMPLES)
_add(sizing.plan, sizing.PLAN_EXAMPLES)
_add(sizing.doctor, sizing.DOCTOR_EXAMPLES)


# --- errors ------------------------------------------------------------------------------------------------


def _usage(error: typer.TyperException) -> str:
    """Typer's message for a wrong word. It keeps the options similar to an unknown one apart."""
    similar = getattr(error, "possibilities", None)
    if similar:
        return f"{error.message}; did you mean {' or '.join(similar)}?"
    return error.format_message().replace("Value error, ", "")  # pydantic's prefix


def _complain(message: str, status: int) -> int:
    print(f"error: {visible(' '.join(message.split()))}", file=sys.stderr)
    return status


def _status_of(error: Exception) -> int | None:
    """The exit status of an error whose message is for the user.

    None for a programming error, whose traceback is wanted. The imports take seconds, and an error has time.
    """
    from actors.fast_weights.delta import BasisError
    from actors.protocols import EngineError, ReceiptError, TaskError, WriterError
    from actors.text.chat_template import ChatTemplateError
    from cluster.assistant.opening import AssistantError
    from cluster.bench.values import BenchError
    from cluster.common.errors import AllFailed, CheckpointError, ClusterError, MachineError
    from cluster.inspection.record import RecordError
    from cluster.probe.values import ProbeError
    from cluster.runs.wanted_workers import ScaleError
    from configs.models import ModelError
    from configs.user_code import ExtensionError
    from learner.types import LearnerError

    files = CheckpointError | RecordError
    again = MachineError | AllFailed  # another start would meet it too: --supervise ends
    parts = TaskError | ModelError | ChatTemplateError | ExtensionError
    if isinstance(error, files | again | parts | AssistantError | ProbeError | ScaleError):
        return EXIT_USAGE
    writes = EngineError | ReceiptError | WriterError
    failures = ClusterError | BasisError | writes | LearnerError | BenchError
    return EXIT_FAILED if isinstance(error, failures) else None
