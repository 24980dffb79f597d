"""The ``evaluate`` command, and the file in an evaluation's folder that says what was asked for."""

from __future__ import annotations

import asyncio
import os
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from cluster.common.arguments import (
    Config,
    ListSettings,
    PrintConfig,
    Settings,
    required_config,
    setting_words,
    split_names,
    split_seeds,
)
from cluster.common.quiet import Verbose, quiet
from cluster.evaluation.plan import OWN, Request, plan_cells
from configs.bounds import ConfigError
from configs.foreign import FLAG, refuse_code
from configs.shipped import shipped

REQUEST_FILE = "request.json"  # in the folder of an evaluation
_NOT_SETTINGS = ("checkpoint", "resume")  # they are written as key=value, and mean the evaluation itself
EXAMPLES = """examples:
  engram evaluate quickstart                              memory off and on
  engram evaluate quickstart --rows truncation,tmem,hybrid --seeds 0,1,2
  engram evaluate quickstart --rows tmem \\
      --sweep fast_weights.basis=svd,random --sweep write.epochs=1,5
  engram evaluate locomo environment.conversation.path=locomo10.json \\
      --rows full_context,truncation,tmem
  engram evaluate quickstart evaluation.tasks=256 \\
      checkpoint=runs/quickstart-.../checkpoints/step-000020
  engram evaluate --resume runs/quickstart-evaluate-...   what is missing
"""


def complete_row(incomplete: str) -> list[str]:
    return _complete_list(incomplete, [*shipped("rows"), OWN])


def complete_benchmark(incomplete: str) -> list[str]:
    return _complete_list(incomplete, list(shipped("benchmarks")))


def evaluate(
    config: Config = "",
    settings: Annotated[Settings, setting_words("evaluation.tasks=64")] = None,
    rows: Annotated[
        str,
        typer.Option(
            metavar="A,B",
            help=f"memories: {', '.join(shipped('rows'))}, {OWN} (the configuration's own), or YAML files",
            show_default=f"truncation,{OWN}",
            autocompletion=complete_row,
        ),
    ] = "",
    benchmarks: Annotated[
        str,
        typer.Option(
            metavar="A,B",
            help=f"{', '.join(shipped('benchmarks'))}, or YAML files",
            show_default="the configuration's own",
            autocompletion=complete_benchmark,
        ),
    ] = "",
    seeds: Annotated[
        str,
        typer.Option(
            metavar="0,1",
            help="a seed draws the tasks, and a random basis",
            show_default="the configuration's",
        ),
    ] = "",
    baseline: Annotated[
        str,
        typer.Option(
            metavar="ROW",
            help="what the other rows are compared with",
            show_default="truncation, where it is a row",
        ),
    ] = "",
    sweep: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=A,B", help="a row for each value; several --sweep are multiplied"),
    ] = None,
    resume: Annotated[
        str,
        typer.Option(
            metavar="FOLDER",
            help="go on with this evaluation, with what it was asked for; auto: the newest in runs",
        ),
    ] = "",
    allow_code: Annotated[
        bool, typer.Option(FLAG, help="with --resume alone: run the code that the folder's settings name")
    ] = False,
    verbose: Verbose = False,
    print_config: PrintConfig = False,
    list_settings: ListSettings = False,
) -> None:
    """Compare memories on held-out tasks.

    Rows x benchmarks x seeds, of the base model or of a checkpoint.
    """
    from cluster.common.ray_job import job_overrides
    from cluster.runs.from_store import local_copy
    from configs.load import to_yaml

    words = settings or []
    asked_for_more = any([config, rows, benchmarks, seeds, baseline, sweep, words])
    if resume and not asked_for_more:
        resume = str(_newest_evaluation(Path("runs"))) if resume == "auto" else resume
        request = replace(saved_request(Path(resume)), resume=resume)
        if not allow_code:
            plan = plan_cells(request)
            refuse_code(f"--resume {resume}", [plan.base, *(cell.config for cell in plan.cells)])
    else:
        path = _config_file(config)
        given = dict(word.partition("=")[::2] for word in words)
        overrides = job_overrides(path, words, os.environ)
        request = Request(
            config=path,
            overrides=tuple(word for word in overrides if word.partition("=")[0] not in _NOT_SETTINGS),
            checkpoint=local_copy(given["checkpoint"], weights=True) if "checkpoint" in given else None,
            rows=split_names("--rows", rows),
            benchmarks=split_names("--benchmarks", benchmarks),
            seeds=split_seeds("--seeds", seeds),
            baseline=baseline,
            sweep=tuple(sweep or ()),
            resume=resume or given.get("resume", ""),
        )
    if print_config:
        typer.echo(to_yaml(plan_cells(request).base), nl=False)
        return

    from cluster.common.display import Display

    display = Display()
    with quiet(verbose):
        from cluster.evaluation.prepare import prepare_comparison
        from cluster.evaluation.run import evaluate as run

        asyncio.run(run(prepare_comparison(request), display))


def save_request(request: Request, folder: Path) -> None:
    """Write what was asked for into the evaluation's folder, with absolute paths. Raises OSError."""
    from configs.files import dump_json, write_text

    checkpoint = request.checkpoint and request.checkpoint.absolute()
    lasting = replace(request, config=request.config.absolute(), checkpoint=checkpoint)
    write_text(folder / REQUEST_FILE, dump_json(lasting))


def saved_request(folder: Path) -> Request:
    """Read what the evaluation in ``folder`` was asked for. Raises ConfigError."""
    from configs.files import FileError, read_json

    try:
        return read_json(folder.expanduser() / REQUEST_FILE, Request)
    except FileNotFoundError:
        problem = f"is no folder of an evaluation (it has no {REQUEST_FILE})"
        raise ConfigError(f"--resume {folder}: {problem}") from None
    except FileError as error:
        raise ConfigError(f"{error}; give the whole command with --resume") from None


def _newest_evaluation(output_dir: Path) -> Path:
    """The folder of the evaluation in ``output_dir`` that began last. Raises ConfigError."""
    from cluster.runs.run_folders import number_of

    folders = [file.parent for file in output_dir.glob(f"*/{REQUEST_FILE}")]
    if not folders:
        cure = "give its folder; or auto beside CONFIG and the settings, with their output_dir"
        raise ConfigError(f"--resume auto: {output_dir} holds no evaluation; {cure}")
    return max(folders, key=number_of)


def _config_file(config: str) -> Path:
    try:
        return required_config("evaluate", config)
    except ConfigError as error:
        hint = "" if config and "=" not in config else " (or --resume FOLDER alone)"
        raise ConfigError(f"{error}{hint}") from None


def _complete_list(incomplete: str, names: list[str]) -> list[str]:
    """Names for the last part of "a,b,c"."""
    before, comma, last = incomplete.rpartition(",")
    return [f"{before}{comma}{name}" for name in names if name.startswith(last)]
