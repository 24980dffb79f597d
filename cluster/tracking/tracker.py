"""MLflow behind a few verbs: log, artifact, dataset, model, finish. One run per training; workers are aggregated metrics, not nested runs.

The part of a metric name before "/" is its chart section: reward, learner, rollout, fleet, staleness, sync, fast_weights, timing_s, timeline, perf,
eval, warm_start, tracking, system.

    log, artifact, ... --0.1 ms--> spool.py: a file in the run's folder --backfill.py: a thread--> the store

So a store that goes away costs the training nothing: once a run is open, no verb raises, and only ``finish`` waits for the store, within bounds. What
the store has not taken when the run ends stays in the file, the run's status included; a run that resumes this one sends it first.
"""

from __future__ import annotations

import logging
import os
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from cluster.common.errors import TrackingError
from cluster.common.git import git_commit
from cluster.common.ray_job import current_job
from cluster.tracking.outbox import Spool
from cluster.tracking.sender import MOST_METRICS, MOST_PARAMS, MlflowRun, Sender, first_line, shown
from cluster.tracking.system_metrics import SystemMetrics
from configs.load import flatten
from configs.schema import RunConfig, TrackingConfig

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

RunStatus = Literal["FINISHED", "FAILED", "KILLED"]
_LONGEST_PARAM = 500
_STOPPED_WAIT_S = (
    5.0  # for the store at the end of a run that was told to stop: its grace time is for the checkpoint
)
_log = logging.getLogger(__name__)


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

    def dataset(self, values: Mapping[str, str]) -> None:
        """What the run reads, as ``entities.dataset_values`` names it."""
        ...

    def model(self, values: Mapping[str, str]) -> None:
        """A kept checkpoint, as ``entities.kept_models`` names it."""
        ...

    def finish(self, status: RunStatus) -> None:
        """End the run with ``status``: the last call."""
        ...


class NullTracker:
    """Tracking switched off: same verbs, no store."""

    run_id = ""
    location = "tracking is off (tracking.enabled=true turns MLflow on)"

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        pass

    def artifact(self, path: Path) -> None:
        pass

    def dataset(self, values: Mapping[str, str]) -> None:
        pass

    def model(self, values: Mapping[str, str]) -> None:
        pass

    def finish(self, status: RunStatus) -> None:
        pass


class MlflowTracker:
    """One MLflow run, opened by ``open_run``. ``wait_s`` bounds how long ``finish`` waits for the store.

    ``system_metrics_s``: between looks at this machine, 0 for none.
    """

    def __init__(
        self, run: MlflowRun, spool: Spool, uri: str, wait_s: float, system_metrics_s: float
    ) -> None:
        self.run_id = run.run_id
        self._spool, self._uri, self._wait_s = spool, shown(uri), wait_s
        self._sender = Sender(spool, run, uri)
        self._sender.start()
        self._step_in_outage = -1
        self._lost = 0
        self._system = (
            SystemMetrics(self.log, system_metrics_s, run.began()) if system_metrics_s > 0 else None
        )
        if self._system is not None:
            self._system.start()

    @property
    def location(self) -> str:
        if self._uri.startswith(("http://", "https://")):
            return f"{self._uri} (run {self.run_id})"
        return f"mlflow ui --backend-store-uri {self._uri}   (run {self.run_id})"

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """All metrics of a step. While the store is away they say so too: tracking/spooled counts the calls that it has not taken."""
        figures = {key: float(value) for key, value in metrics.items()}
        if self._sender.problem and step > self._step_in_outage:
            self._step_in_outage = step
            figures["tracking/spooled"] = float(len(self._spool))
        items, now = list(figures.items()), _now_ms()
        for start in range(0, len(items), MOST_METRICS):
            self._spool.append(
                {
                    "kind": "metrics",
                    "time": now,
                    "step": step,
                    "metrics": dict(items[start : start + MOST_METRICS]),
                }
            )
        self._sender.wake()
        if self._spool.lost and not self._lost:
            _log.warning(
                "warning: neither MLflow at %s nor the disk of %s takes the figures any more: the next ones are lost",
                self._uri,
                self._spool.path,
            )
        self._lost = self._spool.lost

    def artifact(self, path: Path) -> None:
        """A copy of ``path`` as it is when the store takes it."""
        self._spool.append({"kind": "artifact", "path": str(path.absolute())})
        self._sender.wake()

    def dataset(self, values: Mapping[str, str]) -> None:
        self._spool.append({"kind": "dataset", "entity": dict(values)})
        self._sender.wake()

    def model(self, values: Mapping[str, str]) -> None:
        self._spool.append({"kind": "model", "entity": dict(values)})
        self._sender.wake()

    def finish(self, status: RunStatus) -> None:
        """The run's status, after all that came before. Waits for the store within bounds: what it does not take is kept, and said in one line."""
        if self._system is not None:
            self._system.end()
        self._spool.append({"kind": "status", "status": status, "time": _now_ms()})
        wait = min(self._wait_s, _STOPPED_WAIT_S) if status == "KILLED" else self._wait_s
        if not self._sender.drain(wait):
            problem = self._sender.problem or "it is slow"
            message = "warning: MLflow at %s did not take the last %d calls within %g s (%s): resuming this run sends them, from %s"
            _log.warning(message, self._uri, len(self._spool), wait, problem, self._spool.path)
        self._spool.close()


def start_tracking(
    config: RunConfig, output_dir: Path, run_name: str, config_file: Path, resumed_run_id: str
) -> Tracker:
    """Open the run of a training: params are the flattened config, the config file is an artifact. Raises TrackingError.

    With ``resumed_run_id`` the earlier run goes on (one that was killed is still marked RUNNING in the store).
    """
    tracker = open_run(config.tracking, output_dir, run_name, flatten(config), resumed_run_id)
    if not resumed_run_id:
        tracker.artifact(config_file)
    return tracker


def open_run(
    tracking: TrackingConfig, output_dir: Path, run_name: str, params: Mapping[str, str], resumed_run_id: str
) -> Tracker:
    """A new run with ``params`` and the git commit as a tag, or the earlier one again. Raises TrackingError: here the store must answer.

    What the store has yet to take lies in ``output_dir / run_name``; what an earlier process left there is sent first.
    """
    if not tracking.enabled:
        return NullTracker()
    _quiet(tracking.timeout_s)
    uri = store_uri(tracking, output_dir)
    artifacts = (
        (output_dir / "mlflow-artifacts").as_uri() if uri == f"sqlite:///{output_dir / 'mlflow.db'}" else None
    )
    run = _in_store(uri, tracking.experiment, artifacts, run_name, resumed_run_id)
    path = output_dir / run_name / f"mlflow-{run.run_id}.jsonl"
    try:
        spool = Spool(path)
    except OSError as error:
        raise TrackingError(f"cannot keep {path}: {error}; tracking.enabled=false runs without it") from error
    if resumed_run_id and len(spool):
        _log.warning(
            "%s holds %d calls that MLflow at %s has not taken: they are sent now",
            path,
            len(spool),
            shown(uri),
        )
        spool.append(
            {"kind": "status", "status": "RUNNING", "time": _now_ms()}
        )  # after the end that may be among them
    elif not resumed_run_id:
        listed = [(key, value[:_LONGEST_PARAM]) for key, value in params.items()]
        for start in range(0, len(listed), MOST_PARAMS):
            spool.append({"kind": "params", "params": dict(listed[start : start + MOST_PARAMS])})
    return MlflowTracker(run, spool, uri, tracking.finish_timeout_s, tracking.system_metrics_s)


def _in_store(
    uri: str, experiment: str, artifacts: str | None, run_name: str, resumed_run_id: str
) -> MlflowRun:
    """The run, created or marked as running again. Raises TrackingError within about tracking.timeout_s a call."""
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient

    try:
        client = MlflowClient(tracking_uri=uri)
        if resumed_run_id:
            client.get_run(resumed_run_id)
            client.update_run(resumed_run_id, status="RUNNING")
            return MlflowRun(client, resumed_run_id)
        run = client.create_run(_experiment(client, experiment, artifacts), run_name=run_name, tags=_tags())
        return MlflowRun(client, run.info.run_id)
    except MlflowException as error:
        raise TrackingError(
            f"cannot use MLflow at {shown(uri)}: {first_line(error)}; set tracking.uri, or tracking.enabled=false to run without it"
        ) from error


def store_uri(tracking: TrackingConfig, output_dir: Path) -> str:
    """Where the runs of ``output_dir`` are tracked."""
    return tracking.uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{output_dir / 'mlflow.db'}"


def _experiment(client: MlflowClient, name: str, artifacts: str | None) -> str:
    found = client.get_experiment_by_name(name)
    if found is not None:
        return str(found.experiment_id)
    kind = {
        "mlflow.experimentKind": "custom_model_development"
    }  # or MLflow's UI takes it for an LLM application, because of the traces
    return str(client.create_experiment(name, artifact_location=artifacts, tags=kind))


def _tags() -> dict[str, str]:
    """In a Ray job the working directory is a copy without its repository: the commit is then what the submission says."""
    job = current_job(os.environ)
    commit = git_commit(Path(__file__).parent) or (job.commit if job is not None else "")
    tags = {
        "mlflow.source.name": "python -m cluster",
        "mlflow.source.type": "LOCAL" if job is None else "JOB",
    }
    return (
        tags
        | ({"mlflow.source.git.commit": commit} if commit else {})
        | ({"ray_job": job.submission_id} if job is not None else {})
    )


def _now_ms() -> int:
    return int(time.time() * 1000)


def _quiet(timeout_s: float) -> None:
    """MLflow announces its database migrations and a missing git, and shows a traceback for each failure of its store: backfill.py says it in a line.

    Its client waits 120 s for an answer and by itself asks seven more times, for minutes in all. Here an attempt takes ``timeout_s``, and the sender
    repeats it when it has compared what the store holds. Only defaults are changed, in this process: what the environment says holds.
    """
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    for name in ("alembic", "mlflow", "mlflow.store.db.utils", "mlflow.tracking"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", module="mlflow")
    from mlflow import environment_variables

    environment_variables.MLFLOW_HTTP_REQUEST_MAX_RETRIES.default = 0
    environment_variables.MLFLOW_HTTP_REQUEST_TIMEOUT.default = max(1, round(timeout_s))
