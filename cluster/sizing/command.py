"""The commands ``plan`` and ``doctor``: what will fit, and what a machine has, before anything starts."""

from __future__ import annotations

from typing import Annotated

import typer

from cluster.common.arguments import Config, Settings, required_config, setting_words
from cluster.common.quiet import Verbose, quiet
from configs.bounds import ConfigError

PLAN_EXAMPLES = """examples:
  engram plan quickstart                       on this machine
  engram plan one_gpu --gpus 1 --gpu-gib 24    on another: a card of 24 GiB
  engram plan paper --gpus 8 --gpu-gib 80 \\
      environment.conversation.path=locomo10.json
  engram plan one_gpu model.name=./my-model learner.microbatch_tokens=4096

It reads the model's config.json and loads no weights. The status is 1 where something does not fit.
"""
DOCTOR_EXAMPLES = """examples:
  engram doctor

The status is 1 where something would stop a run.
"""


def plan(
    config: Config = "",
    settings: Annotated[Settings, setting_words("learner.workers=2")] = None,
    gpus: Annotated[
        int | None, typer.Option(min=0, metavar="N", help="GPUs of the machine", show_default="this one's")
    ] = None,
    gpu_gib: Annotated[
        float | None, typer.Option(min=1, metavar="GIB", help="memory of each", show_default="this one's")
    ] = None,
    verbose: Verbose = False,
) -> None:
    """Say what of a training fits into memory."""
    from cluster.sizing.machine import named_machine, this_machine
    from cluster.sizing.plan import make_plan
    from configs.load import load_config
    from configs.models import model_shape

    if (gpus is None) != (gpu_gib is None):
        raise ConfigError("plan takes --gpus and --gpu-gib together; without both it looks at this machine")
    loaded = load_config(required_config("plan", config), settings or [])
    machine = this_machine() if gpus is None or gpu_gib is None else named_machine(gpus, gpu_gib)
    with quiet(verbose):
        shape = model_shape(loaded.model)
    made = make_plan(loaded, shape, machine)
    typer.echo(str(made))
    if made.shortages:
        raise typer.Exit(1)


def doctor() -> None:
    """Say what this machine has, and what would stop a run."""
    from cluster.sizing.doctor import examine

    findings = examine()
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        typer.echo(f"{finding.name:{width}s}  {finding.text}")
    problems = [finding.problem for finding in findings if finding.problem]
    typer.echo("\n".join(f"stops a run: {problem}" for problem in problems) or "nothing here stops a run")
    if problems:
        raise typer.Exit(1)
