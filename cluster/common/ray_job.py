"""What a run must know when it is a Ray job: which cluster to join, and that its working directory is a copy that vanishes with it.

ray job submit --working-dir . -- python -m cluster train ...      Ray's job supervisor starts the command, with RAY_JOB_CONFIG_JSON_ENV_VAR set
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from configs.load import ConfigError, load_config
from configs.schema import RunConfig

JOIN = "ray.address=auto"  # the cluster that the job runs on
_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # Ray's own name: {"runtime_env": {...}, "metadata": {...}}
_SUBMISSION = "job_submission_id"
_NOTE_S = 10
_APART = ("checkpoint=", "resume=")  # of evaluate: they are no settings there
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RayJob:
    """This process's job. ``commit`` is what was submitted, as the submission says; empty where it says nothing."""

    submission_id: str
    commit: str


def current_job(environ: Mapping[str, str]) -> RayJob | None:
    """None outside a Ray job."""
    try:
        metadata = json.loads(environ.get(_VARIABLE, ""))["metadata"]
        return RayJob(str(metadata[_SUBMISSION]), str(metadata.get("commit", "")))
    except (ValueError, TypeError, KeyError, AttributeError):
        return None


def job_overrides(config: Path | None, overrides: Sequence[str], environ: Mapping[str, str]) -> list[str]:
    """``overrides`` for a run inside a Ray job: it joins the job's cluster, and what it writes must outlive the job. Raises ConfigError."""
    if current_job(environ) is None or config is None or "=" in str(config):
        return list(overrides)
    joined = [JOIN, *overrides]
    require_lasting(
        load_config(config, [override for override in joined if not override.startswith(_APART)]), environ
    )
    for override in joined:
        if override.startswith("resume="):
            _require_lasting_resume(override.removeprefix("resume="), override)
    return joined


def require_lasting(config: RunConfig, environ: Mapping[str, str]) -> None:
    """Outputs of a Ray job are absolute: relative ones would lie in a temporary copy of the working directory. Raises ConfigError."""
    if not Path(config.output_dir).expanduser().is_absolute():
        _refuse(
            f"output_dir={config.output_dir}",
            "output_dir=/shared/runs, on storage that all nodes of the cluster see",
        )
    _require_lasting_resume(config.resume, f"resume={config.resume}")
    uri, setting = config.tracking.uri, "tracking.uri"
    if not uri:
        uri, setting = environ.get("MLFLOW_TRACKING_URI", ""), "MLFLOW_TRACKING_URI"
    if (
        config.tracking.enabled
        and uri
        and (path := _local_path(uri)) is not None
        and not Path(path).is_absolute()
    ):
        _refuse(
            f"{setting}={uri}",
            "sqlite:////shared/mlflow.db (four slashes), or the http:// address of a server",
        )


async def note_run(job: RayJob | None, run_id: str) -> None:
    """Write the MLflow run's id into the job's metadata, where `status`, the dashboard and ``ray job list`` show it. Ray is up.

    Ray has no public call for that: its own storage client is used. Nobody else writes there while the entrypoint runs (the job's supervisor writes
    before it starts, and after it has ended). It is a comfort: where it fails, the run goes on.
    """
    if job is None or not run_id:
        return
    try:
        from ray._private.worker import global_worker
        from ray.dashboard.modules.job.common import JobInfoStorageClient

        worker: Any = global_worker
        storage: Any = JobInfoStorageClient(worker.gcs_client)
        info = await storage.get_info(job.submission_id, timeout=_NOTE_S)
        noted = replace(info, metadata={**(info.metadata or {}), "mlflow_run": run_id})
        await storage.put_info(job.submission_id, noted, timeout=_NOTE_S)
    except (ImportError, AttributeError, TypeError, RuntimeError, OSError) as error:
        _log.warning("the MLflow run %s could not be noted in job %s: %s", run_id, job.submission_id, error)


def _require_lasting_resume(resume: str, said: str) -> None:
    if resume and resume != "auto" and not Path(resume).expanduser().is_absolute():
        _refuse(said, "resume=auto (the newest in output_dir), or the checkpoint's absolute folder")


def _local_path(uri: str) -> str | None:
    """The file or folder that an MLflow store lies in; None for a server or a database server."""
    if uri.startswith("sqlite:///"):
        return uri.removeprefix("sqlite:///")
    scheme, colon, rest = uri.partition(":")
    if colon and scheme == "file":
        return rest.removeprefix("//")
    return None if colon or uri in ("databricks", "databricks-uc") else uri


def _refuse(said: str, allowed: str) -> None:
    raise ConfigError(
        f"{said} is relative, and a Ray job runs in a temporary copy of its working directory: give {allowed}"
    )
