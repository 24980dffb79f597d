"""Ray's job client with a deadline on every request, and one line for whatever fails.

commands.py --> Jobs --> JobClient: ray.job_submission.JobSubmissionClient (or a fake of these six methods) --HTTP--> the cluster's head
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from cluster.jobs.values import Endpoint, Job, JobsError, Submission

_QUIET_S = 20.0  # a log that is silent so long: is the job still there?
_POLL_S = 0.5
_TYPE = "SUBMISSION"  # Ray lists drivers that nobody submitted, too


class JobClient(Protocol):
    """The part of Ray's JobSubmissionClient that is used."""

    def submit_job(
        self,
        *,
        entrypoint: str,
        submission_id: str | None,
        runtime_env: dict[str, Any],
        metadata: dict[str, str],
    ) -> str: ...

    def get_job_info(self, job_id: str) -> Any: ...

    def list_jobs(self) -> list[Any]: ...

    def get_job_logs(self, job_id: str) -> str: ...

    def tail_job_logs(self, job_id: str) -> AsyncIterator[str]: ...

    def stop_job(self, job_id: str) -> bool: ...


class Jobs:
    """The jobs of one cluster. Every method raises JobsError."""

    def __init__(self, client: JobClient, endpoint: Endpoint) -> None:
        self._client, self._endpoint = client, endpoint

    def submit(self, submission: Submission) -> str:
        """Upload the working directory, start the command; its name. The job runs on after this."""
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
        """Those that were submitted, the newest first."""
        with one_line(self._endpoint):
            listed = [
                _job(details)
                for details in self._client.list_jobs()
                if getattr(details.type, "value", details.type) == _TYPE
            ]
        return sorted(listed, key=lambda job: job.started or 0.0, reverse=True)

    def logs(self, name: str) -> str:
        with one_line(self._endpoint, name):
            return self._client.get_job_logs(name)

    def stop(self, name: str, deadline_s: float) -> Job:
        """Ask the job to end (SIGTERM: it saves), and wait until it has."""
        job = self.get(name)
        if job.over:
            return job
        with one_line(self._endpoint, name):
            self._client.stop_job(name)
        return self.ended(name, deadline_s)

    def ended(self, name: str, deadline_s: float) -> Job:
        """The job, once it is over."""
        until = time.monotonic() + deadline_s
        while not (job := self.get(name)).over:
            if time.monotonic() > until:
                raise JobsError(
                    f"job {name} is still {job.status} after {deadline_s:g} s; look at it with: python -m cluster logs {name}"
                )
            time.sleep(_POLL_S)
        return job

    async def follow(self, name: str, write: Callable[[str], None], quiet_s: float = _QUIET_S) -> Job:
        """Hand the log to ``write`` as it grows, until the job is over. A silence of ``quiet_s`` is looked into: the job must still be there."""
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
    """Raises JobsError where no cluster answers, or where it refuses."""
    if not endpoint.address.startswith(("http://", "https://")):
        raise JobsError(
            f"--address {endpoint.address} is not allowed: give that of the cluster's dashboard, e.g. http://head-node:8265"
        )
    os.environ["RAY_AUTH_MODE"] = endpoint.auth  # read when Ray is imported
    os.environ["RAY_API_SERVER_ADDRESS"] = endpoint.address  # it overrules the argument below
    with one_line(endpoint):
        return Jobs(_timed_client(endpoint), endpoint)


def _timed_client(where: Endpoint) -> JobClient:
    from ray.job_submission import JobSubmissionClient

    class Timed(JobSubmissionClient):
        """Ray's requests have no timeout; all of them pass through this method."""

        def _do_request(self, method: str, endpoint: str, **rest: Any) -> Any:
            return super()._do_request(method, endpoint, timeout=where.deadline_s, **rest)

    client: Any = Timed(where.address)
    return client


@contextmanager
def one_line(endpoint: Endpoint, name: str = "") -> Iterator[None]:
    """Whatever the client raises as a JobsError that says what to do."""
    from aiohttp import ClientError
    from ray.exceptions import AuthenticationError

    where = endpoint.address
    try:
        yield
    except JobsError:
        raise
    except AuthenticationError:
        raise JobsError(
            f"the cluster at {where} refuses (auth is {endpoint.auth}): give --auth token, with its token in RAY_AUTH_TOKEN, "
            "in the file that RAY_AUTH_TOKEN_PATH names, or in ~/.ray/auth_token"
        ) from None
    except (OSError, ClientError):  # requests' own errors are OSErrors
        raise JobsError(
            f"no Ray cluster answers at {where} within {endpoint.deadline_s:g} s: start one with `ray start --head`, "
            "or give the address of its dashboard with --address http://HOST:8265"
        ) from None
    except (RuntimeError, ValueError) as error:
        if "404" in str(error) and name:
            raise JobsError(
                f"the cluster at {where} knows no job {name}: `python -m cluster status` lists those it knows"
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
    """Ray sends the server's traceback along; what went wrong is its last line."""
    lines = [
        line.strip(" \"'.") for line in str(error).replace("\\n", "\n").splitlines() if line.strip(" \"'.")
    ]
    return lines[-1] if lines else type(error).__name__
