"""Jobs as a person reads them: a table of all, the facts of one."""

from __future__ import annotations

import time
from collections.abc import Sequence

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from cluster.jobs.values import Job

_STYLE = {"PENDING": "yellow", "RUNNING": "cyan", "SUCCEEDED": "green", "FAILED": "red", "STOPPED": "magenta"}
_SHORT = 8  # characters of a commit or a run id that tell it from others


def jobs_table(jobs: Sequence[Job], address: str, now: float) -> RenderableType:
    table = Table(title=f"Jobs at {address}", title_justify="left")
    for header in ("job", "status", "started", "took", "commit", "MLflow run", "command"):
        table.add_column(
            header,
            overflow="fold" if header in ("job", "command") else "ellipsis",
            no_wrap=header not in ("job", "command"),
        )
    for job in jobs:
        table.add_row(
            job.name,
            _status(job),
            _clock(job.started),
            _took(job, now),
            job.commit[:_SHORT],
            job.mlflow_run[:_SHORT],
            _command(job),
        )
    return table


def job_table(job: Job, now: float) -> RenderableType:
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
    return Text(job.status, style=_STYLE.get(job.status, ""))


def _command(job: Job) -> Text:
    """As text: a setting such as [10:4] is no markup."""
    return Text(job.entrypoint.removeprefix("python -m cluster "))


def _clock(seconds: float | None) -> str:
    return "" if seconds is None else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def _took(job: Job, now: float) -> str:
    """Hours, minutes and seconds, e.g. 1:02:03."""
    if job.started is None:
        return ""
    seconds = int((job.ended if job.ended is not None else now) - job.started)
    return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"
