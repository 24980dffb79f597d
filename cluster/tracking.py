"""MLflow behind three verbs: log, artifact, finish. One run per training; workers are aggregated metrics, not nested runs.

The part of a metric name before "/" is its chart section: reward, learner, rollout, fleet, staleness, sync, fast_weights, timing_s, timeline, perf, eval,
warm_start.
Metrics are logged in the background (about 1 ms for the caller); ``finish`` waits for them, so a finished run is complete.
"""

from __future__ import annotations

import logging
import os
import subprocess
import time
import warnings
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from cluster.errors import TrackingError
from configs.schema import RunConfig, TrackingConfig

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient
    from mlflow.utils.async_logging.run_operations import RunOperations

RunStatus = Literal["FINISHED", "FAILED", "KILLED"]
_PARAMS_PER_CALL = 100  # MLflow's limit
_LONGEST_PARAM = 500


class Tracker(Protocol):
    @property
    def run_id(self) -> str:
        """Identity of the run in the store; empty for the null tracker."""
        ...

    @property
    def location(self) -> str:
        """For the user: where the figures are and how to look at them."""
        ...

    def log(self, metrics: Mapping[str, float], step: int) -> None: ...

    def artifact(self, path: Path) -> None: ...

    def finish(self, status: RunStatus) -> None: ...


class NullTracker:
    """Tracking switched off: same verbs, no store."""

    run_id = ""
    location = "tracking is off (tracking.enabled=true turns MLflow on)"

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        pass

    def artifact(self, path: Path) -> None:
        pass

    def finish(self, status: RunStatus) -> None:
        pass


class MlflowTracker:
    """One MLflow run, opened by ``start_tracking``."""

    def __init__(self, client: MlflowClient, run_id: str, uri: str) -> None:
        self._client = client
        self._uri = uri
        self._pending: list[RunOperations] = []
        self.run_id = run_id

    @property
    def location(self) -> str:
        if self._uri.startswith(("http://", "https://")):
            return f"{self._uri} (run {self.run_id})"
        return f"mlflow ui --backend-store-uri {self._uri}   (run {self.run_id})"

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """All metrics of a step in one background call. Raises TrackingError when an earlier call failed."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        batch = [Metric(key, float(value), now, step) for key, value in metrics.items()]
        operations = self._client.log_batch(self.run_id, metrics=batch, synchronous=False)
        if operations is not None:
            self._pending.append(operations)

    def artifact(self, path: Path) -> None:
        self._client.log_artifact(self.run_id, str(path))

    def finish(self, status: RunStatus) -> None:
        """Wait for what is still being written, then end the run."""
        from mlflow.exceptions import MlflowException

        try:
            for operations in self._pending:
                operations.wait()
            self._client.set_terminated(self.run_id, status)
        except MlflowException as error:
            raise TrackingError(f"MLflow at {self._uri} did not take the last metrics: {_first_line(error)}") from error
        finally:
            self._pending.clear()


def start_tracking(config: RunConfig, output_dir: Path, run_name: str, config_file: Path, resumed_run_id: str) -> Tracker:
    """Open the run of a training: params are the flattened config, the config file is an artifact. Raises TrackingError.

    With ``resumed_run_id`` the earlier run goes on (one that was killed is still marked RUNNING in the store).
    """
    tracker = open_run(config.tracking, output_dir, run_name, flatten(config), resumed_run_id)
    if not resumed_run_id and config.tracking.enabled:
        tracker.artifact(config_file)
    return tracker


def open_run(tracking: TrackingConfig, output_dir: Path, run_name: str, params: Mapping[str, str], resumed_run_id: str) -> Tracker:
    """A new run with ``params`` and the git commit as a tag, or the earlier one again. Raises TrackingError."""
    if not tracking.enabled:
        return NullTracker()
    _quiet()
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient

    local = output_dir / "mlflow.db"
    uri = tracking.uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{local}"
    try:
        client = MlflowClient(tracking_uri=uri)
        if resumed_run_id:
            client.get_run(resumed_run_id)
            client.update_run(resumed_run_id, status="RUNNING")
            return MlflowTracker(client, resumed_run_id, uri)
        artifacts = (output_dir / "mlflow-artifacts").as_uri() if uri == f"sqlite:///{local}" else None
        run = client.create_run(_experiment(client, tracking.experiment, artifacts), run_name=run_name, tags=_tags())
        _log_params(client, run.info.run_id, params)
        return MlflowTracker(client, run.info.run_id, uri)
    except MlflowException as error:
        raise TrackingError(f"cannot use MLflow at {uri}: {_first_line(error)}; tracking.enabled=false runs without it") from error


def flatten(config: object, prefix: str = "") -> dict[str, str]:
    """A nested dataclass as dotted keys: {"train.steps": "200", ...}."""
    flat: dict[str, str] = {}
    for field in fields(config):  # type: ignore[arg-type]
        value: Any = getattr(config, field.name)
        if is_dataclass(value):
            flat |= flatten(value, f"{prefix}{field.name}.")
        else:
            flat[prefix + field.name] = str(value)
    return flat


def git_commit(folder: Path) -> str:
    """The commit that ``folder`` is checked out at, "-dirty" added when files differ; empty outside a repository or without git."""
    command = ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _experiment(client: MlflowClient, name: str, artifacts: str | None) -> str:
    found = client.get_experiment_by_name(name)
    if found is not None:
        return str(found.experiment_id)
    return str(client.create_experiment(name, artifact_location=artifacts))


def _tags() -> dict[str, str]:
    commit = git_commit(Path(__file__).parent)
    return {"mlflow.source.name": "python -m cluster", "mlflow.source.type": "LOCAL", **({"mlflow.source.git.commit": commit} if commit else {})}


def _log_params(client: MlflowClient, run_id: str, params: Mapping[str, str]) -> None:
    from mlflow.entities import Param

    listed = [Param(key, value[:_LONGEST_PARAM]) for key, value in params.items()]
    for start in range(0, len(listed), _PARAMS_PER_CALL):
        client.log_batch(run_id, params=listed[start : start + _PARAMS_PER_CALL])


def _quiet() -> None:
    """MLflow announces its database migrations and a missing git: nothing a user can act on."""
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    for name in ("alembic", "mlflow", "mlflow.store.db.utils", "mlflow.tracking"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="mlflow")


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
