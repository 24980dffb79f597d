"""Ray's job client with a deadline for every request, and one line for every failure.

command.py --> Jobs --> JobClient: ray.job_submission.JobSubmissionClient --HTTP--> the cluster's head
"""

from __future__ import annotations

import asyncio
import os
import shlex
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.common.errors import ClusterError

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

ENDED = ("SUCCEEDED", "FAILED", "STOPPED")
_QUIET_S = 20.0  # after so long without a line of log, look whether the job is still there
_POLL_S = 0.5
_TYPE = "SUBMISSION"  # Ray also lists drivers that nobody submitted
_TOKEN_PLACES = (
    "set RAY_AUTH_TOKEN, or put it into the file that RAY_AUTH_TOKEN_PATH names, or ~/.ray/auth_token"
)
_STOP_WAIT = "RAY_JOB_STOP_WAIT_TIME_S"  # seconds from SIGTERM to SIGKILL; Ray's job supervisor reads it


class JobsError(ClusterError):
    """The cluster cannot be reached, refuses, or does not know the job. One line."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where and how Ray's dashboard answers. ``deadline_s`` bounds every request."""

    address: str
    auth: str  # token or disabled
    deadline_s: float


@dataclass(frozen=True, slots=True)
class Submission:
    """A command of Engram for the cluster to run."""

    words: tuple[str, ...]  # ("train", "configs/quickstart.yaml", "train.steps=4")
    working_dir: Path
    environment: Mapping[str, str]
    name: str  # empty: Ray makes one up
    commit: str
    grace_s: int  # from a stop to the kill, for the last checkpoint

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
    """One job, as the cluster reports it. Times are seconds since the epoch, None while they lie ahead."""

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


class Jobs:
    """The jobs of one cluster. Every method raises JobsError."""

    def __init__(self, client: JobSubmissionClient, endpoint: Endpoint) -> None:
        self._client, self._endpoint = client, endpoint

    def submit(self, submission: Submission) -> str:
        """Upload the working directory and start the command. Returns the job's name; the job goes on."""
        with one_line(self._endpoint):
            return self._client.submit_job(
                entrypoint=submission.entrypoint,
                submission_id=submission.name or None,
                runtime_env=submission.runtime_env,
                metadata=submission.metadata,
            )

    def get(self, name: str) -> Job:
        with one_line(self._endpoint, name):
            return _job(self._client.get_job_info(name))

    def all(self) -> list[Job]:
        """All submitted jobs, the newest first."""
        with one_line(self._endpoint):
            listed = self._client.list_jobs()
        jobs = [_job(details) for details in listed if getattr(details.type, "value", details.type) == _TYPE]
        return sorted(jobs, key=lambda job: job.started or 0.0, reverse=True)

    def logs(self, name: str) -> str:
        with one_line(self._endpoint, name):
            return self._client.get_job_logs(name)

    def stop(self, name: str, deadline_s: float) -> Job:
        """Ask the job to end (on SIGTERM it saves), and wait for its end."""
        job = self.get(name)
        if job.over:
            return job
        with one_line(self._endpoint, name):
            self._client.stop_job(name)
        return self.ended(name, deadline_s)

    def ended(self, name: str, deadline_s: float) -> Job:
        """Wait until the job is over."""
        until = time.monotonic() + deadline_s
        while not (job := self.get(name)).over:
            if time.monotonic() > until:
                raise JobsError(
                    f"job {name} is still {job.status} after {deadline_s:g} s; "
                    f"look at it with: engram logs {name}"
                )
            time.sleep(_POLL_S)
        return job

    async def follow(self, name: str, write: Callable[[str], None], quiet_s: float = _QUIET_S) -> Job:
        """Hand the log to ``write`` as it grows, until the job is over.

        After ``quiet_s`` without a line, look whether the job is still running.
        """
        if self.get(name).over:
            write(self.logs(name))
            return self.get(name)
        with one_line(self._endpoint, name):
            await self._tail(name, write, quiet_s)
        return self.ended(name, self._endpoint.deadline_s)

    async def _tail(self, name: str, write: Callable[[str], None], quiet_s: float) -> None:
        pieces = self._client.tail_job_logs(name)
        waiting = asyncio.ensure_future(anext(pieces, None))
        try:
            while True:
                done, _ = await asyncio.wait({waiting}, timeout=quiet_s)
                if not done and self.get(name).over:
                    return
                if done:
                    piece = waiting.result()
                    if piece is None:
                        return
                    write(piece)
                    waiting = asyncio.ensure_future(anext(pieces, None))
        finally:
            waiting.cancel()


def connect(endpoint: Endpoint) -> Jobs:
    """Connect to a cluster. Raises JobsError where none answers or it refuses, or a token is not here."""
    if not endpoint.address.startswith(("http://", "https://")):
        raise JobsError(
            f"--address {endpoint.address} is not allowed: "
            "give the address of the cluster's dashboard, e.g. http://head-node:8265"
        )
    if endpoint.auth == "token" and not _has_token():
        raise JobsError(f"--auth token: no token is here; {_TOKEN_PLACES}")
    os.environ["RAY_AUTH_MODE"] = endpoint.auth  # Ray reads it when it is imported
    os.environ["RAY_API_SERVER_ADDRESS"] = endpoint.address  # it overrules the argument below
    with one_line(endpoint):
        return Jobs(_timed_client(endpoint), endpoint)


def _has_token() -> bool:
    """Whether one of Ray's three places has a token. Without one its client fails before it asks anybody."""
    if os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return True
    file = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    return file.is_file() and file.stat().st_size > 0


def _timed_client(where: Endpoint) -> JobSubmissionClient:
    from ray.job_submission import JobSubmissionClient

    class Timed(JobSubmissionClient):
        """Ray's requests have no timeout. All of them pass through this method."""

        def _do_request(self, method: str, endpoint: str, **rest: Any) -> Any:
            return super()._do_request(method, endpoint, timeout=where.deadline_s, **rest)

    return Timed(where.address)


@contextmanager
def one_line(endpoint: Endpoint, name: str = "") -> Iterator[None]:
    """Turn what the client raises into a JobsError that says what to do."""
    from aiohttp import ClientError
    from ray.exceptions import AuthenticationError

    where = endpoint.address
    try:
        yield
    except JobsError:
        raise
    except AuthenticationError:
        raise JobsError(
            f"the cluster at {where} refuses (auth is {endpoint.auth}): give --auth token; {_TOKEN_PLACES}"
        ) from None
    except (OSError, ClientError):  # requests' own errors are OSErrors
        raise JobsError(
            f"no Ray cluster answers at {where} within {endpoint.deadline_s:g} s: "
            "start one with `ray start --head`, or give its dashboard's address: --address http://HOST:8265"
        ) from None
    except (RuntimeError, ValueError) as error:
        if "404" in str(error) and name:
            raise JobsError(
                f"the cluster at {where} knows no job {name}: `engram status` lists its jobs"
            ) from None
        raise JobsError(f"the cluster at {where} refuses: {_last_line(error)}") from None


def _job(details: Any) -> Job:
    metadata = details.metadata or {}
    return Job(
        name=details.submission_id or details.job_id,
        status=str(getattr(details.status, "value", details.status)),
        entrypoint=details.entrypoint,
        message=details.message or "",
        started=None if details.start_time is None else details.start_time / 1000,
        ended=None if details.end_time is None else details.end_time / 1000,
        commit=metadata.get("commit", ""),
        mlflow_run=metadata.get("mlflow_run", ""),
    )


def _last_line(error: Exception) -> str:
    """The last line of a server's traceback, which Ray sends along: it says what went wrong."""
    lines = (line.strip(" \"'.") for line in str(error).replace("\\n", "\n").splitlines())
    return next((line for line in reversed([*lines]) if line), type(error).__name__)
