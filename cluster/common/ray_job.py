"""What a run must know inside a Ray job: which cluster it joins, and that its working directory is temporary.

ray job submit --working-dir . -- python -m cluster train ...

Ray's job supervisor starts the command with RAY_JOB_CONFIG_JSON_ENV_VAR set, in a copy of the working
directory that vanishes with the job.
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
from configs.store_url import is_url

JOIN = "ray.address=auto"  # the cluster that the job runs on
_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # Ray's own name: {"runtime_env": {...}, "metadata": {...}}
_SUBMISSION = "job_submission_id"
_NOTE_S = 10
_APART = ("checkpoint=", "resume=")  # evaluate takes them, and they are no settings there
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RayJob:
    """The job of this process. ``commit`` is the submitted commit, empty where the submission names none."""

    submission_id: str
    commit: str


def current_job(environ: Mapping[str, str]) -> RayJob | None:
    """The Ray job that this process runs in, None outside of one."""
    try:
        metadata = json.loads(environ.get(_VARIABLE, ""))["metadata"]
        return RayJob(str(metadata[_SUBMISSION]), str(metadata.get("commit", "")))
    except (ValueError, TypeError, KeyError, AttributeError):
        return None


def job_overrides(config: Path, overrides: Sequence[str], environ: Mapping[str, str]) -> list[str]:
    """The settings of a command, and in a Ray job those that make it join the job's cluster.

    Raises ConfigError for outputs that would vanish with the job.
    """
    if current_job(environ) is None:
        return list(overrides)
    joined = [JOIN, *overrides]
    settings = [override for override in joined if not override.startswith(_APART)]
    require_lasting(load_config(config, settings), environ)
    for override in joined:
        if override.startswith("resume="):
            _require_lasting_resume(override.removeprefix("resume="), override)
    return joined


def require_lasting(config: RunConfig, environ: Mapping[str, str]) -> None:
    """Require that a job's outputs have absolute places. Raises ConfigError."""
    if is_url(config.output_dir):
        work_dir = config.store.work_dir
        if work_dir and not Path(work_dir).is_absolute():
            _refuse(f"store.work_dir={work_dir}", "store.work_dir=/shared/runs, a folder that all nodes see")
    elif not Path(config.output_dir).expanduser().is_absolute():
        allowed = "output_dir=/shared/runs, on storage that all nodes of the cluster see"
        _refuse(f"output_dir={config.output_dir}", allowed)
    _require_lasting_resume(config.resume, f"resume={config.resume}")
    uri, setting = config.tracking.uri, "tracking.uri"
    if not uri:
        uri, setting = environ.get("MLFLOW_TRACKING_URI", ""), "MLFLOW_TRACKING_URI"
    path = _local_path(uri) if config.tracking.uses_mlflow and uri else None
    if path is not None and not Path(path).is_absolute():
        allowed = "sqlite:////shared/mlflow.db (four slashes), or the http:// address of a server"
        _refuse(f"{setting}={uri}", allowed)


async def note_run(job: RayJob | None, run_id: str) -> None:
    """Write the MLflow run's id into the job's metadata, for ``status``, the dashboard and ``ray job list``.

    Ray must be up. It has no public call for this, so its own storage client is used. Nobody else writes
    there meanwhile: the job's supervisor writes before the command starts and after it has ended. A failure
    is only logged, and the run goes on.
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
    if resume and resume != "auto" and not is_url(resume) and not Path(resume).expanduser().is_absolute():
        _refuse(said, "resume=auto (the newest in output_dir), or the checkpoint's absolute folder")


def _local_path(uri: str) -> str | None:
    """The file or folder of an MLflow store, None for a server."""
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
