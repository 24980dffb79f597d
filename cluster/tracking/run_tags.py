"""The tags and the description of a run in MLflow: who made it from what, its group, and where it lies."""

from __future__ import annotations

import getpass
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from cluster.common.git import git_commit
from cluster.common.ray_job import current_job

# MLflow's table of runs groups and colours by tags; it shows none of 260 params until they are chosen.
_GROUPS = {"config": "name", "environment": "environment.name", "memory": "memory.policy", "seed": "seed"}


def run_tags(params: Mapping[str, str], folder: Path) -> dict[str, str]:
    """The tags of a new run. ``folder``: its own.

    A Ray job works in a copy without its repository: its submission names the commit.
    """
    job = current_job(os.environ)
    user = ""
    with suppress(OSError, KeyError):  # a container's user may have no name
        user = getpass.getuser()
    commit = git_commit(Path(__file__).parent) or (job.commit if job is not None else "")
    tags = {
        **{tag: params.get(key, "") for tag, key in _GROUPS.items()},
        "mlflow.user": user,
        "mlflow.source.name": "engram",
        "mlflow.source.type": "LOCAL" if job is None else "JOB",
        "mlflow.source.git.commit": commit,
        "mlflow.note.content": _description(folder),
        "ray_job": "" if job is None else job.submission_id,
    }
    return {name: value for name, value in tags.items() if value}


def _description(folder: Path) -> str:
    """Markdown. A line that is indented by four blanks is code, whatever stands in it."""
    commands = (f"    engram {command} {folder}" for command in ("watch", "inspect"))
    return "\n".join(["The newest episodes while it runs, and all that are kept:\n", *commands])
