"""The commands ``submit``, ``status``, ``logs`` and ``stop``: their arguments, and what they show."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from configs.bounds import ConfigError
from configs.services import has_password

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.text import Text

    from cluster.jobs.client import Job, Jobs, Submission

_FORWARDED = ("MLFLOW_TRACKING_URI",)
_SAVED = ("saved: ", "no checkpoint was saved")  # what a stopped run prints (cluster/train/run.py)
_STYLE = {"PENDING": "yellow", "RUNNING": "cyan", "SUCCEEDED": "green", "FAILED": "red", "STOPPED": "magenta"}
_WIDE = 120  # columns of a terminal that has room for a line with all of a job
_SHORT = 8  # characters of a commit or a run id that tell it from others
_CONNECTION = """
A cluster with a token (RAY_AUTH_MODE=token) wants --auth token, and the token in RAY_AUTH_TOKEN, in the file
that RAY_AUTH_TOKEN_PATH names, or in ~/.ray/auth_token. Never put it on the command line.
"""
SUBMIT_EXAMPLES = f"""examples:
  engram submit train quickstart output_dir=/shared/runs resume=auto
  engram submit --retries 5 train quickstart output_dir=/shared/runs
  engram submit --follow --address http://head:8265 \\
      train configs/node_8gpu.yaml output_dir=/shared/runs train.steps=400
  engram submit --name monday --env HF_HOME=/shared/hf \\
      evaluate quickstart output_dir=/shared/runs --rows truncation,tmem

Options of submit stand before the command; what follows is the command's. The working directory is sent as it
is, with changes, without files that git ignores. Data and models must lie where every node sees them. With
resume=auto the same submission again goes on where the last one ended. MLFLOW_TRACKING_URI is passed on where
it is set here. Without this command, from a checkout:

  ray job submit --working-dir . -- python -m cluster train quickstart \\
      output_dir=/shared/runs resume=auto
{_CONNECTION}"""
STATUS_EXAMPLES = f"""examples:
  engram status                 all jobs of the cluster on this machine
  engram status monday --address http://head:8265
{_CONNECTION}"""
LOGS_EXAMPLES = f"""examples:
  engram logs monday
  engram logs monday --follow   until the job ends; Ctrl-C leaves it running
{_CONNECTION}"""
STOP_EXAMPLES = f"""examples:
  engram stop monday            the running step ends and is saved
  engram stop monday --timeout 1200
{_CONNECTION}"""

Address = Annotated[
    str,
    typer.Option(metavar="URL", envvar="RAY_API_SERVER_ADDRESS", help="the cluster's dashboard"),
]
Auth = Annotated[
    Literal["disabled", "token"],
    typer.Option(metavar="disabled|token", envvar="RAY_AUTH_MODE", help="how the cluster authenticates"),
]
Deadline = Annotated[int, typer.Option(min=1, metavar="S", help="of each request to the cluster, in seconds")]
JobName = Annotated[str, typer.Argument(metavar="JOB", help="a job's name, as status lists it")]
_ADDRESS = "http://127.0.0.1:8265"


def submit(
    what: Annotated[
        Literal["train", "evaluate", "probe"],
        typer.Argument(metavar="COMMAND", help="train, evaluate or probe"),
    ],
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="...", help="its arguments; output_dir must be absolute", show_default=False),
    ] = None,
    name: Annotated[
        str, typer.Option(metavar="JOB", help="the job's name", show_default="Ray makes one up")
    ] = "",
    working_dir: Annotated[
        str,
        typer.Option(metavar="DIR", help="what is sent: a checkout of Engram", show_default="this folder"),
    ] = ".",
    retries: Annotated[
        int,
        typer.Option(
            min=0, metavar="N", help="restarts of a training whose process died (train --supervise)"
        ),
    ] = 0,
    env: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[=VALUE]",
            help="an environment variable of the job; without =VALUE the value in this shell",
        ),
    ] = None,
    grace: Annotated[
        int, typer.Option(min=1, metavar="S", help="seconds from a stop to the kill, for the last checkpoint")
    ] = 600,
    follow: Annotated[
        bool,
        typer.Option("--follow", help="show the log until the job ends; the exit status is then the job's"),
    ] = False,
    address: Address = _ADDRESS,
    auth: Auth = "disabled",
    deadline: Deadline = 30,
) -> int:
    """Run a command on a Ray cluster, as a job."""
    words = [*(arguments or [])]
    if retries:
        if what != "train":
            cure = f"run the missing part of {what} again with its --resume"
            raise ConfigError(f"--retries {retries}: only train goes on by itself; {cure}")
        for option in ("--seeds", "--sweep"):
            if any(word.partition("=")[0] == option for word in words):
                raise ConfigError(f"--retries {retries}: goes with one run, without {option}")
        words.append(f"--supervise={retries}")
    submission = _submission((what, *words), working_dir, env or [], name, grace)
    jobs = _connect(address, auth, deadline)
    job = jobs.submit(submission)
    console = _console()
    console.print(f"submitted {job}: engram status|logs|stop {job}", highlight=False, markup=False)
    return _follow(jobs, job) if follow else _show(jobs.get(job))


def status(
    job: Annotated[str, typer.Argument(metavar="JOB", help="one job", show_default="all")] = "",
    address: Address = _ADDRESS,
    auth: Auth = "disabled",
    deadline: Deadline = 30,
) -> int:
    """List the jobs of a Ray cluster, or show one of them."""
    jobs = _connect(address, auth, deadline)
    if job:
        return _show(jobs.get(job))
    console = _console()
    console.print(jobs_table(jobs.all(), address, time.time(), console.width))
    return 0


def logs(
    job: JobName,
    follow: Annotated[
        bool, typer.Option("--follow", help="go on until the job ends; the exit status is then the job's")
    ] = False,
    address: Address = _ADDRESS,
    auth: Auth = "disabled",
    deadline: Deadline = 30,
) -> int:
    """Show what a job has printed."""
    jobs = _connect(address, auth, deadline)
    if follow:
        return _follow(jobs, job)
    _write(jobs.logs(job))
    return 0


def stop(
    job: JobName,
    timeout: Annotated[
        int, typer.Option(min=1, metavar="S", help="how long to wait for its end, in seconds")
    ] = 660,
    address: Address = _ADDRESS,
    auth: Auth = "disabled",
    deadline: Deadline = 30,
) -> None:
    """End a job in good order, and wait for its end."""
    jobs = _connect(address, auth, deadline)
    _show(jobs.stop(job, timeout))
    _write("".join(f"{line}\n" for line in jobs.logs(job).splitlines() if line.startswith(_SAVED)))


# --- what is submitted -------------------------------------------------------------------------------------


def _submission(
    words: tuple[str, ...], working_dir: str, env: list[str], name: str, grace_s: int
) -> Submission:
    """Check what can be checked here: the settings, and outputs that would vanish. Raises ConfigError."""
    from cluster.common.git import git_commit
    from cluster.jobs.client import Submission

    folder = Path(working_dir).expanduser().absolute()
    if not (folder / "cluster" / "__main__.py").is_file():
        raise ConfigError(
            f"--working-dir {working_dir}: is no checkout of Engram (it has no cluster/__main__.py)"
        )
    environment = dict(_variable(text) for text in env)
    for forwarded in _FORWARDED:
        value = os.environ.get(forwarded, "")
        if forwarded not in environment and has_password(value):
            problem = (
                f"{forwarded} holds a password, and a job's environment is shown to all who see the cluster"
            )
            cure = f"set it on the nodes; --env {forwarded} sends it all the same"
            raise ConfigError(f"{problem}: {cure}")
        if value:
            environment.setdefault(forwarded, value)
    _check(words, folder, environment)
    return Submission(words, folder, environment, name, git_commit(folder), grace_s)


def _check(words: tuple[str, ...], folder: Path, environment: Mapping[str, str]) -> None:
    """Load the configuration as the job will.

    All settings of ``train`` are checked. The options of the other commands have "=" of their own: of these
    commands only the settings that say where outputs go are checked.
    """
    from cluster.common.ray_job import require_lasting
    from configs.load import load_config

    what, arguments = words[0], words[1:]
    config = next((word for word in arguments if "=" not in word and not word.startswith("-")), None)
    if config is None or arguments.index(config) > 0:
        if "--resume" in arguments:
            return
        raise ConfigError(
            f"{what} needs a configuration before its settings, e.g. submit {what} configs/quickstart.yaml"
        )
    if Path(config).is_absolute():
        raise ConfigError(
            f"{config}: is not part of what is sent; "
            "give a file in the working directory by its relative path"
        )
    settings = [
        word
        for before, word in zip(("", *arguments), arguments, strict=False)
        if "=" in word and not word.startswith("-") and before != "--sweep"  # its values are no setting's
    ]
    if what != "train":
        settings = [word for word in settings if word.startswith(("output_dir=", "tracking."))]
    shipped = folder / "configs" / f"{config}.yaml"  # a name means the file of the checkout that is sent
    require_lasting(load_config(shipped if shipped.is_file() else folder / config, settings), environment)


def _variable(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals and name not in os.environ:
        raise ConfigError(f"--env {text}: is not set in this shell; give --env {name}=VALUE")
    return name, value if equals else os.environ[name]


# --- what is shown -----------------------------------------------------------------------------------------


def jobs_table(jobs: list[Job], address: str, now: float, width: int) -> RenderableType:
    """One line for each job; on a terminal of fewer than ``_WIDE`` columns some lines for each."""
    from rich.console import Group
    from rich.table import Table

    if width < _WIDE:
        return Group(f"Jobs at {address}", *(line for job in jobs for line in _job_lines(job, now)))
    table = Table(title=f"Jobs at {address}", title_justify="left")
    for header in ("job", "status", "started", "took", "commit", "MLflow run", "command"):
        folded = header in ("job", "command")
        table.add_column(header, overflow="fold" if folded else "ellipsis", no_wrap=not folded)
    for job in jobs:
        started, took = _clock(job.started), _took(job, now)
        commit, run = job.commit[:_SHORT], job.mlflow_run[:_SHORT]
        table.add_row(job.name, _status(job), started, took, commit, run, _command(job))
    return table


def _job_lines(job: Job, now: float) -> list[Text]:
    from rich.text import Text

    command = _command(job)
    command.pad_left(2)
    about = [f"started {_clock(job.started)}", f"took {_took(job, now)}"] if job.started is not None else []
    about += [f"commit {job.commit[:_SHORT]}"] if job.commit else []
    about += [f"MLflow run {job.mlflow_run[:_SHORT]}"] if job.mlflow_run else []
    lines = [Text.assemble((job.name, "bold"), " ", _status(job)), Text(f"  {', '.join(about)}"), command]
    return [line for line in lines if line.plain.strip()]


def job_table(job: Job, now: float) -> RenderableType:
    """The facts of one job."""
    from rich.table import Table

    table = Table(show_header=False, title=f"Job {job.name}", title_justify="left")
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("status", _status(job))
    table.add_row("command", _command(job))
    table.add_row("started", _clock(job.started))
    table.add_row("took", _took(job, now))
    table.add_row("commit", job.commit or "not given")
    table.add_row("MLflow run", job.mlflow_run or "none yet")
    if job.message and job.status != "RUNNING":
        table.add_row("Ray says", job.message.strip().splitlines()[0])
    return table


def _status(job: Job) -> Text:
    from rich.text import Text

    return Text(job.status, style=_STYLE.get(job.status, ""))


def _command(job: Job) -> Text:
    """The command as text: a setting such as [10:4] is no markup."""
    from rich.text import Text

    return Text(job.entrypoint.removeprefix("python -m cluster "))


def _clock(seconds: float | None) -> str:
    return "" if seconds is None else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def _took(job: Job, now: float) -> str:
    """Hours, minutes and seconds, e.g. 1:02:03."""
    if job.started is None:
        return ""
    seconds = int((job.ended if job.ended is not None else now) - job.started)
    return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"


def _show(job: Job) -> int:
    _console().print(job_table(job, time.time()))
    return 0


def _follow(jobs: Jobs, name: str) -> int:
    """Show the log until the job ends. Returns 0 if it succeeded, else 1."""
    try:
        job = asyncio.run(jobs.follow(name, _write))
    except KeyboardInterrupt:
        hint = f"\njob {name} goes on without you: engram logs {name} --follow"
        _console().print(hint, highlight=False, markup=False)
        raise
    _show(job)
    return 0 if job.status == "SUCCEEDED" else 1


def _connect(address: str, auth: str, deadline_s: int) -> Jobs:
    from cluster.jobs import client

    return client.connect(client.Endpoint(address, auth, deadline_s))


def _console() -> Console:
    from rich.console import Console

    return Console()


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
