"""``python -m cluster``: parse, load the configuration, run one command. A user's mistake is one line on stderr and exit status 2."""

from __future__ import annotations

import argparse
import asyncio
import importlib
import os
import sys
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any

from cluster.assistant.command import COMMANDS as ASSISTANT_COMMANDS
from cluster.assistant.command import add_assistant, run_assistant
from cluster.common.ray_job import job_overrides
from cluster.jobs.commands import COMMANDS as JOB_COMMANDS
from cluster.jobs.commands import add_jobs, run_jobs
from configs.load import ConfigError, load_config, to_yaml
from configs.reference import help_table

EXIT_OK, EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 0, 1, 2, 130

_TRAIN_EXAMPLES = """examples:
  python -m cluster train configs/quickstart.yaml
  python -m cluster train configs/quickstart.yaml train.steps=4 rollout.workers=2
  python -m cluster train configs/locomo.yaml environment.conversation.path=locomo10.json
  python -m cluster train configs/quickstart.yaml resume=auto
  python -m cluster train configs/quickstart.yaml train.steps=4 --print-config
"""
_EVALUATE_EXAMPLES = """examples:
  python -m cluster evaluate configs/quickstart.yaml                                     memory off and on
  python -m cluster evaluate configs/quickstart.yaml --rows truncation,tmem,hybrid --seeds 0,1,2
  python -m cluster evaluate configs/quickstart.yaml --rows truncation,tmem --sweep fast_weights.basis=svd,random --sweep write.epochs=1,5
  python -m cluster evaluate configs/locomo.yaml environment.conversation.path=locomo10.json --rows full_context,truncation,memagent,tmem
  python -m cluster evaluate configs/quickstart.yaml checkpoint=runs/quickstart-.../checkpoints/step-000020 evaluation.tasks=256
  python -m cluster evaluate --resume runs/quickstart-evaluate-...                       run what is missing
"""
_BENCH_EXAMPLES = """examples:
  python -m cluster bench                          every benchmark: hours on two cores
  python -m cluster bench writer learner           some of them
  python -m cluster bench rollout --repeats 9 --threads 1
  python -m cluster bench --quick                  only whether they run; the figures mean nothing
"""
_SCALE_EXAMPLES = """examples:
  python -m cluster scale 4                                   the newest run in runs/ gets four rollout workers
  python -m cluster scale 2 --run /shared/runs/paper-20260101-120000

New workers load the current weights before they get a task; those that go finish what they have. The run's folder must be the one that the driver
writes to (on a cluster: a shared one). rollout.schedule=[10:4,50:2] does the same by training step.
"""
_EXAMPLES = """examples:
  python -m cluster train configs/quickstart.yaml                      train on this machine, no service needed
  python -m cluster evaluate configs/quickstart.yaml                   held-out tasks, memory off and on
  python -m cluster probe configs/quickstart.yaml --cards recall:12    what a write is worth: recall, paraphrases, damage
  python -m cluster inspect runs/quickstart-...                        what an agent read, wrote into its weights, and answered
  python -m cluster pool runs/tmem-* runs/memory-off-*                 training runs over seeds, side by side
  python -m cluster scale 4                                            more or fewer rollout workers while a run goes on
  python -m cluster submit train configs/quickstart.yaml output_dir=/shared/runs     the same as a job on a Ray cluster
  python -m cluster chat runs/quickstart-...                           talk to what was trained; it learns in the conversation
  python -m cluster serve runs/quickstart-...                          the same behind an OpenAI-compatible endpoint
  python -m cluster export runs/quickstart-... exported                as a plain Hugging Face folder, or a memory as a PEFT adapter
  python -m cluster bench                                              every seam against a named baseline
  python -m cluster train --settings                                   every setting with its default and what is allowed
  python -m cluster COMMAND --help                                     more about a command
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status: 0 done, 1 the run failed, 2 the user's mistake, 130 interrupted."""
    parser = command_line()
    options, rest = parser.parse_known_args(arguments)
    settable = options.command in ("train", "evaluate", "probe")
    if unknown := [
        one
        for one in rest
        if one.startswith("-") or "=" not in one or not (settable or options.command in ("chat", "serve"))
    ]:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if rest:  # settings behind an option, which argparse does not join with those before it
        options.overrides = [*options.overrides, *rest]
    if options.command is None:
        parser.print_help()
        return EXIT_OK
    if getattr(options, "settings", False):
        from rich.console import Console

        Console().print(help_table())
        return EXIT_OK
    try:
        if settable:
            options.overrides = job_overrides(
                Path(options.config) if options.config else None, options.overrides, os.environ
            )
        if options.command in JOB_COMMANDS:
            return run_jobs(options)
        if options.command in ASSISTANT_COMMANDS:
            return run_assistant(options)
        run = {"bench": _bench, "train": _train, "evaluate": _evaluate, "scale": _scale}.get(
            options.command, _elsewhere
        )
        return run(options)
    except ConfigError as error:
        return _complain(error, EXIT_USAGE)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except (RuntimeError, ValueError) as error:
        status = _status_of(error)
        if status is None:
            raise
        return _complain(error, status)


def _train(options: argparse.Namespace) -> int:
    misplaced = next((argument for argument in options.overrides if argument.startswith("checkpoint=")), None)
    if misplaced is not None:
        raise ConfigError(f"argument {misplaced!r}: belongs to evaluate; train takes resume=FOLDER")
    config = load_config(_config_file(options), options.overrides)
    if options.print_config:
        print(to_yaml(config), end="")
        return EXIT_OK

    from cluster.common.display import Display
    from cluster.train.prepare import prepare_training
    from cluster.train.run import train

    _drive(train(*prepare_training(config), Display()))
    return EXIT_OK


def _evaluate(options: argparse.Namespace) -> int:
    from cluster.evaluation.arguments import request_of

    request = request_of(options)
    if options.print_config:
        from cluster.evaluation.plan import plan_cells

        print(to_yaml(plan_cells(request).base), end="")
        return EXIT_OK

    from cluster.common.display import Display
    from cluster.evaluation.prepare import prepare_comparison
    from cluster.evaluation.run import evaluate

    _drive(evaluate(prepare_comparison(request), Display()))
    return EXIT_OK


def _elsewhere(options: argparse.Namespace) -> int:
    """A command of a room of its own: ``run_<command>`` there."""
    room = {"probe": "probe", "inspect": "inspection", "pool": "compare"}[options.command]
    getattr(importlib.import_module(f"cluster.{room}.command"), f"run_{options.command}")(options)
    return EXIT_OK


def _scale(options: argparse.Namespace) -> int:
    from cluster.runs.wanted_workers import ask_for, newest_run

    run_dir = Path(options.run) if options.run else newest_run(Path(options.output_dir))
    ask_for(run_dir, options.workers)
    print(f"{run_dir}: asked for {options.workers} rollout worker(s); the run says when they serve")
    return EXIT_OK


def _config_file(options: argparse.Namespace) -> Path:
    if options.config is None or "=" in options.config:
        raise ConfigError(
            f"{options.command} needs a configuration file before the settings, e.g. configs/quickstart.yaml"
        )
    return Path(options.config)


def _bench(options: argparse.Namespace) -> int:
    from cluster.bench.run import BenchOptions, bench
    from cluster.common.display import Display

    chosen = BenchOptions(
        names=tuple(options.names),
        model=options.model,
        repeats=1 if options.quick else options.repeats,
        threads=options.threads,
        quick=options.quick,
        output_dir=Path(options.output_dir),
        tracking=not options.no_tracking,
    )
    bench(chosen, Display())
    return EXIT_OK


def _drive(story: Coroutine[Any, Any, None]) -> None:
    """Run to the end. Ctrl-C and a job's stop (SIGTERM) cancel the story, which then says what was saved; a second Ctrl-C ends at once."""
    try:
        asyncio.run(story)
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None


def _complain(error: Exception, status: int) -> int:
    """One line. What Ray brings from another process holds that process's traceback: its cause is the error itself."""
    cause = getattr(error, "cause", None)
    print(f"error: {' '.join(str(cause or error).split())}", file=sys.stderr)
    return status


def _status_of(error: Exception) -> int | None:
    """The exit status of an error that has a message for the user; None for a programming error, whose traceback is wanted.

    Imported only when something has been raised, so that --help and a mistyped key answer at once.
    """
    from actors.fast_weights.delta import BasisError
    from actors.protocols import EngineError, TaskError
    from actors.text.chat_template import ChatTemplateError
    from cluster.assistant.opening import AssistantError
    from cluster.bench.values import BenchError
    from cluster.common.errors import CheckpointError, ClusterError
    from cluster.inspection.record import RecordError
    from cluster.probe.values import ProbeError
    from cluster.runs.wanted_workers import ScaleError
    from configs.extensions import ExtensionError
    from configs.models import ModelError
    from learner.types import LearnerError

    mistakes = (
        TaskError
        | ModelError
        | ChatTemplateError
        | AssistantError
        | CheckpointError
        | ExtensionError
        | ProbeError
        | RecordError
        | ScaleError
    )
    if isinstance(error, mistakes):
        return EXIT_USAGE
    return (
        EXIT_FAILED
        if isinstance(error, ClusterError | BasisError | EngineError | LearnerError | BenchError)
        else None
    )


def command_line() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="python -m cluster",
        description="Train and evaluate agents that write their own weights in mid-episode.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    from cluster.compare.command import add_pool
    from cluster.evaluation.arguments import add_options
    from cluster.inspection.command import add_inspect
    from cluster.probe.command import add_probe

    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, text, examples in (
        ("train", "evaluate, train, evaluate again, and compare", _TRAIN_EXAMPLES),
        (
            "evaluate",
            "compare memories on held-out tasks: rows x benchmarks x seeds, of the base model or a checkpoint",
            _EVALUATE_EXAMPLES,
        ),
    ):
        command = commands.add_parser(
            name,
            help=text,
            description=text.capitalize() + ".",
            epilog=examples,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_argument(
            "config",
            nargs="?",
            default=None,
            metavar="CONFIG",
            help="a YAML file, e.g. configs/quickstart.yaml",
        )
        command.add_argument(
            "overrides",
            nargs="*",
            metavar="key=value",
            help="settings that differ from the file, e.g. train.steps=20",
        )
        command.add_argument(
            "--print-config", action="store_true", help="print the resolved configuration and stop"
        )
        command.add_argument("--settings", action="store_true", help="list every setting and stop")
        if name == "evaluate":
            add_options(command)
    add_probe(commands)
    add_inspect(commands)
    add_pool(commands)
    _add_scale(commands)
    add_assistant(commands)
    add_jobs(commands)
    _add_bench(commands)
    return parser


def _add_scale(commands: Any) -> None:
    text = "add or remove rollout workers of a training run while it goes on"
    command = commands.add_parser(
        "scale",
        help=text,
        description=f"{text.capitalize()}.",
        epilog=_SCALE_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("workers", type=_count, metavar="N", help="how many there should be")
    command.add_argument(
        "--run", default="", metavar="FOLDER", help="the run's folder; the one written to last when not given"
    )
    command.add_argument(
        "--output-dir", default="runs", metavar="DIR", help="where to look for it (default runs)"
    )


def _add_bench(commands: Any) -> None:
    from cluster.bench.suite import SUITE

    text = "measure every seam against a named baseline, in turns on this machine"
    listed = "\n".join(f"  {entry.name:11s} {entry.about}" for entry in SUITE)
    command = commands.add_parser(
        "bench",
        help=text,
        description=f"{text.capitalize()}. Prints tables; writes report.md, report.json and plots; logs to MLflow.\n\nbenchmarks:\n{listed}",
        epilog=_BENCH_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("names", nargs="*", metavar="NAME", help="which benchmarks; all when none is named")
    command.add_argument(
        "--model",
        default="smollm2-135m",
        metavar="MODEL",
        help="smollm2-135m (default), a folder or a hub name",
    )
    command.add_argument(
        "--repeats",
        type=_count,
        default=5,
        metavar="N",
        help="pairs of measurements of each case (default 5)",
    )
    command.add_argument(
        "--threads", type=_count, default=1, metavar="N", help="CPU threads of what is measured (default 1)"
    )
    command.add_argument(
        "--quick", action="store_true", help="smallest sizes, one repeat: only shows that it runs"
    )
    command.add_argument(
        "--output-dir", default="runs", metavar="DIR", help="where the report goes (default runs)"
    )
    command.add_argument("--no-tracking", action="store_true", help="do not log to MLflow")


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed: give a whole number, 1 or more")
    return int(text)
