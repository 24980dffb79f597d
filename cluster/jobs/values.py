"""What the job commands speak of: a job on a Ray cluster, what is to be submitted, and how to reach the cluster."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cluster.common.errors import ClusterError

ENDED = ("SUCCEEDED", "FAILED", "STOPPED")
_STOP_WAIT = "RAY_JOB_STOP_WAIT_TIME_S"  # read by the job's supervisor: seconds from SIGTERM to SIGKILL, 3 when not set


class JobsError(ClusterError):
    """The cluster cannot be reached, refuses, or does not know the job. One line."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where Ray's dashboard answers, and how. ``deadline_s`` bounds every request."""

    address: str
    auth: str  # token or disabled
    deadline_s: float


@dataclass(frozen=True, slots=True)
class Submission:
    """A command of Engram to be run on the cluster. ``grace_s``: from the stop to the kill, for the last checkpoint. ``name`` may be empty."""

    words: tuple[str, ...]  # ("train", "configs/quickstart.yaml", "train.steps=4")
    working_dir: Path
    environment: Mapping[str, str]
    name: str
    commit: str
    grace_s: int

    @property
    def entrypoint(self) -> str:
        return shlex.join(("python", "-m", "cluster", *self.words))

    @property
    def runtime_env(self) -> dict[str, object]:
        return {
            "working_dir": str(self.working_dir),
            "env_vars": {_STOP_WAIT: str(self.grace_s), **self.environment},
        }

    @property
    def metadata(self) -> dict[str, str]:
        return {"commit": self.commit} if self.commit else {}


@dataclass(frozen=True, slots=True)
class Job:
    """One job as the cluster tells of it. Times are seconds since the epoch; None where it has not come to that yet."""

    name: str
    status: str  # PENDING, RUNNING or one of ENDED
    entrypoint: str
    message: str
    started: float | None
    ended: float | None
    commit: str
    mlflow_run: str

    @property
    def over(self) -> bool:
        return self.status in ENDED
