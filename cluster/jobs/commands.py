"""``submit``, ``status``, ``logs`` and ``stop``: their arguments, and what they show."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.common.ray_job import require_lasting
from cluster.jobs.values import Endpoint, Submission
from configs.load import ConfigError, load_config

if TYPE_CHECKING:
    from rich.console import Console

    from cluster.jobs.client import Jobs

COMMANDS = ("submit", "status", "logs", "stop")
_RUNNABLE = ("train", "evaluate", "probe")
_FORWARDED = ("MLFLOW_TRACKING_URI",)
_SAVED = ("saved: ", "no checkpoint was saved")  # what a run that was stopped says (cluster/train/run.py)
_CONNECTION = """
A cluster with a token (RAY_AUTH_MODE=token) wants --auth token, and the token in RAY_AUTH_TOKEN, in the file that RAY_AUTH_TOKEN_PATH names, or in
~/.ray/auth_token. Never put it on the command line."""
_SUBMIT_EXAMPLES = f"""examples:
  python -m cluster submit train configs/quickstart.yaml output_dir=/shared/runs resume=auto
  python -m cluster submit --follow --address http://head:8265 train configs/node_8gpu.yaml output_dir=/shared/runs resume=auto train.steps=400
  python -m cluster submit --name monday --env HF_HOME=/shared/hf evaluate configs/quickstart.yaml output_dir=/shared/runs --rows truncation,tmem

Options of submit stand before the command, all that follows is the command's. The working directory is sent as it is, changes included, without what
git ignores: data and models must lie where every node sees them. With resume=auto the same submission again goes on where the last one ended.
MLFLOW_TRACKING_URI is passed on where it is set here. Plainly, without this command:
  ray job submit --working-dir . -- python -m cluster train configs/quickstart.yaml output_dir=/shared/runs resume=auto
{_CONNECTION}"""
_STATUS_EXAMPLES = f"""examples:
  python -m cluster status                                all jobs of the cluster on this machine
  python -m cluster status monday --address http://head:8265
{_CONNECTION}"""
_LOGS_EXAMPLES = f"""examples:
  python -m cluster logs monday
  python -m cluster logs monday --follow                  until the job ends; Ctrl-C leaves the job running
{_CONNECTION}"""
_STOP_EXAMPLES = f"""examples:
  python -m cluster stop monday                           SIGTERM: the running step ends and is saved; submit it again to go on
  python -m cluster stop monday --timeout 1200
{_CONNECTION}"""


def add_jobs(commands: Any) -> None:
    submit = _command(commands, "submit", "run a command on a Ray cluster, as a job", _SUBMIT_EXAMPLES)
    submit.add_argument(
        "--name", default="", metavar="JOB", help="the job's name (default: Ray makes one up)"
    )
    submit.add_argument(
        "--working-dir",
        default=".",
        metavar="DIR",
        help="what is sent: a checkout of Engram (default: this folder)",
    )
    submit.add_argument(
        "--env",
        action="append",
        default=[],
        metavar="NAME[=VALUE]",
        help="an environment variable of the job; without =VALUE that of this shell",
    )
    submit.add_argument(
        "--grace",
        type=_seconds,
        default=600,
        metavar="S",
        help="from a stop to the kill, for the last checkpoint (default 600)",
    )
    submit.add_argument(
        "--follow",
        action="store_true",
        help="show the log until the job ends; the exit status is then the job's",
    )
    submit.add_argument("what", choices=_RUNNABLE, metavar="COMMAND", help=", ".join(_RUNNABLE))
    submit.add_argument(
        "arguments",
        nargs=argparse.REMAINDER,
        metavar="...",
        help="its arguments; output_dir must be absolute",
    )
    status = _command(commands, "status", "the jobs of a Ray cluster, or one of them", _STATUS_EXAMPLES)
    status.add_argument("job", nargs="?", default="", metavar="JOB", help="one job (default: all)")
    logs = _command(commands, "logs", "what a job has printed", _LOGS_EXAMPLES)
    logs.add_argument("job", metavar="JOB")
    logs.add_argument(
        "--follow", action="store_true", help="go on until the job ends; the exit status is then the job's"
    )
    stop = _command(commands, "stop", "end a job in good order, and wait for it", _STOP_EXAMPLES)
    stop.add_argument("job", metavar="JOB")
    stop.add_argument(
        "--timeout",
        type=_seconds,
        default=660,
        metavar="S",
        help="how long to wait for its end (default 660)",
    )


def run_jobs(options: argparse.Namespace) -> int:
    """The exit status: 0, or 1 when a job that was followed did not succeed. Raises ConfigError, JobsError."""
    submission = (
        _submission(options) if options.command == "submit" else None
    )  # a mistake is found before anyone is asked

    from rich.console import Console

    from cluster.jobs.client import connect
    from cluster.jobs.tables import job_table, jobs_table

    console = Console()
    jobs = connect(Endpoint(options.address, options.auth, options.deadline))
    name = getattr(options, "job", "")
    if submission is not None:
        name = jobs.submit(submission)
        console.print(
            f"submitted {name}: python -m cluster status|logs|stop {name}", highlight=False, markup=False
        )
    elif options.command == "status" and not name:
        console.print(jobs_table(jobs.all(), options.address, time.time()))
        return 0
    elif options.command == "logs" and not options.follow:
        _write(jobs.logs(name))
        return 0
    elif options.command == "stop":
        console.print(job_table(jobs.stop(name, options.timeout), time.time()))
        _write("".join(f"{line}\n" for line in jobs.logs(name).splitlines() if line.startswith(_SAVED)))
        return 0
    if getattr(options, "follow", False):
        return _follow(jobs, name, console)
    console.print(job_table(jobs.get(name), time.time()))
    return 0


def _follow(jobs: Jobs, name: str, console: Console) -> int:
    from cluster.jobs.tables import job_table

    try:
        job = asyncio.run(jobs.follow(name, _write))
    except KeyboardInterrupt:
        console.print(
            f"\njob {name} goes on without you: python -m cluster logs {name} --follow",
            highlight=False,
            markup=False,
        )
        raise
    console.print(job_table(job, time.time()))
    return 0 if job.status == "SUCCEEDED" else 1


def _submission(options: argparse.Namespace) -> Submission:
    """Checked here as far as it can be: what is wrong with the settings, and outputs that would vanish. Raises ConfigError."""
    from cluster.common.git import git_commit

    folder = Path(options.working_dir).expanduser().absolute()
    if not (folder / "cluster" / "__main__.py").is_file():
        raise ConfigError(
            f"--working-dir {options.working_dir}: is no checkout of Engram (it has no cluster/__main__.py)"
        )
    environment = dict(_variable(text) for text in options.env)
    for forwarded in _FORWARDED:
        if forwarded in os.environ:
            environment.setdefault(forwarded, os.environ[forwarded])
    words = (options.what, *options.arguments)
    _check(words, folder, environment)
    return Submission(words, folder, environment, options.name, git_commit(folder), options.grace)


def _check(words: tuple[str, ...], folder: Path, environment: Mapping[str, str]) -> None:
    """All settings of ``train``; of the other commands, which have options with "=" of their own, those that say where outputs go."""
    what, arguments = words[0], words[1:]
    config = next((word for word in arguments if "=" not in word and not word.startswith("-")), None)
    if config is None or arguments.index(config) > 0:
        if "--resume" in arguments:
            return
        raise ConfigError(
            f"{what} needs a configuration file before its settings, e.g. submit {what} configs/quickstart.yaml"
        )
    if Path(config).is_absolute():
        raise ConfigError(
            f"{config}: is not part of what is sent; give a file in the working directory by its relative path"
        )
    settings = [word for word in arguments if "=" in word and not word.startswith("-")]
    if what != "train":
        settings = [word for word in settings if word.startswith(("output_dir=", "tracking."))]
    require_lasting(load_config(folder / config, settings), environment)


def _variable(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals and name not in os.environ:
        raise ConfigError(f"--env {text}: is not set in this shell; give --env {name}=VALUE")
    return name, value if equals else os.environ[name]


def _command(commands: Any, name: str, text: str, examples: str) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(
        name,
        help=text,
        description=text[0].upper() + text[1:] + ".",
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    address = os.environ.get("RAY_API_SERVER_ADDRESS") or "http://127.0.0.1:8265"
    auth = os.environ.get("RAY_AUTH_MODE") or "disabled"
    command.add_argument(
        "--address",
        default=address,
        metavar="URL",
        help=f"the cluster's dashboard (RAY_API_SERVER_ADDRESS, else {address})",
    )
    command.add_argument(
        "--auth",
        choices=("disabled", "token"),
        default=auth,
        help=f"(RAY_AUTH_MODE, else disabled; now {auth})",
    )
    command.add_argument(
        "--deadline",
        type=_seconds,
        default=30,
        metavar="S",
        help="of each request to the cluster (default 30)",
    )
    return command


def _seconds(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed: give whole seconds, 1 or more")
    return int(text)


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
