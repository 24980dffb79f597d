"""The tracker: a run's figures, files, data and models on their way to MLflow. One MLflow run per training.

With ``tracking.trackers`` wandb and trackio get them too, or instead (others.py).

    log, artifact, dataset, model --0.5 ms--> outbox: a file in the run's folder --sender: a thread--> MLflow

Every wait, and its bound:
    require_server  3 s: before anything starts
    open_run      MLflow must answer here: tracking.timeout_s for each of about six calls, then TrackingError
                  (a locked database: 5 to 40 s)
    log and such  wait for the local disk only; an MLflow that is away costs the training nothing
    finish        waits for MLflow: tracking.finish_timeout_s, 5 s at most when the run was told to stop

What MLflow has not taken by then stays in the file. The process that resumes the run sends it first.

The part of a metric's name before "/" is its chart section. MLflow sorts sections by name, capitals first: so
``Summary/reward`` and ``Summary/held_out_f1`` come first. The others: reward, cards, learner, rollout, fleet,
staleness, sync, fast_weights, timing_s, timeline, perf, eval, warm_start, curriculum, tracking, system. While
MLflow is away, "tracking/spooled" is the number of records that it has not taken.
"""

from __future__ import annotations

import logging
import os
import re
import sqlite3
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from urllib.parse import quote, urlsplit

from cluster.common.errors import TrackingError
from cluster.common.folders import in_turn
from cluster.tracking.others import Sink, open_others, require_others
from cluster.tracking.outbox import Entity, Outbox, Point, Status
from cluster.tracking.run_tags import run_tags
from cluster.tracking.sender import MlflowRun, Sender, first_line, shown
from cluster.tracking.system_metrics import SystemMetrics
from configs.hub import unreachable
from configs.load import flatten
from configs.schema import RunConfig, TrackingConfig

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

RunStatus = Literal["FINISHED", "FAILED", "KILLED"]
_LONGEST_PARAM = 500  # characters
_SIGNS = {"@": "_at_", "%": "_percent_", "#": "_number_", "&": "_and_", "+": "_plus_"}
_STOPPED_WAIT_S = 5.0  # the grace time of a run that was told to stop is for its checkpoint
_log = logging.getLogger(__name__)


class Tracker:
    """Where a run reports. Once it is open, no verb raises. This one is tracking switched off.

    run_id: the run's id in MLflow; empty without MLflow.
    location: where the user finds the figures, and how to look at them.
    """

    run_id = ""
    location = "tracking is off (tracking.enabled=true turns MLflow on)"

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Log the metrics of a step."""

    def artifact(self, path: Path) -> None:
        """Copy the file at ``path``, as it is when MLflow takes it."""

    def dataset(self, values: Mapping[str, str]) -> None:
        """Name what the run reads, by ``registry.dataset_values``."""

    def model(self, values: Mapping[str, str]) -> None:
        """Register a kept checkpoint, by ``runs.checkpoint.kept_models``."""

    def finish(self, status: RunStatus) -> None:
        """End the run with ``status``. The last call."""


class MlflowTracker(Tracker):
    """One MLflow run, opened by ``open_run``."""

    def __init__(self, run: MlflowRun, outbox: Outbox, uri: str, tracking: TrackingConfig) -> None:
        self.run_id = run.run_id
        self._outbox, self._uri, self._wait_s = outbox, shown(uri), tracking.finish_timeout_s
        is_server = self._uri.startswith(("http://", "https://"))
        how = self._uri if is_server else f"mlflow ui --backend-store-uri {self._uri}  "
        self.location = f"{how} (run {self.run_id})"
        self._sender = Sender(outbox, run, uri)
        self._sender.start()
        self._system = SystemMetrics(self._append, tracking.system_metrics_s, run.began)
        if tracking.system_metrics_s > 0:
            self._system.start()

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        spooled = {"tracking/spooled": len(self._outbox)} if self._sender.problem else {}
        self._append({**metrics, **spooled}, step)

    def _append(self, metrics: Mapping[str, float], step: int) -> None:
        now, lost = _now_ms(), self._outbox.lost
        points = [Point(mlflow_key(key), float(value), now, step) for key, value in metrics.items()]
        self._outbox.append(points)
        if self._outbox.lost > lost == 0:
            _log.warning(
                "warning: neither MLflow at %s nor the disk of %s takes figures: the next ones are lost",
                self._uri,
                self._outbox.path,
            )

    def artifact(self, path: Path) -> None:
        self._outbox.append([Entity("artifact", {"name": str(path.absolute())})])

    def dataset(self, values: Mapping[str, str]) -> None:
        self._outbox.append([Entity("dataset", values)])

    def model(self, values: Mapping[str, str]) -> None:
        self._outbox.append([Entity("model", values)])

    def finish(self, status: RunStatus) -> None:
        self._system.end()
        self._outbox.append([Status(status, _now_ms())])
        wait = _last_wait_s(self._wait_s, status)
        if not self._sender.drain(wait):
            _log.warning(
                "warning: MLflow at %s did not take the last %d records within %g s (%s): "
                "resuming this run sends them, from %s",
                self._uri,
                len(self._outbox),
                wait,
                self._sender.problem or "it is slow",
                self._outbox.path,
            )
        self._outbox.close()


class Relay(Tracker):
    """Hands each verb to ``first`` and to every sink. One that raises is left out from then on."""

    def __init__(self, first: Tracker | None, sinks: Sequence[Sink], finish_timeout_s: float) -> None:
        self._first, self._sinks, self._wait_s = first or Tracker(), list(sinks), finish_timeout_s
        self.run_id = self._first.run_id
        places = [] if first is None else [first.location]
        self.location = "; ".join([*places, *(sink.location for sink in sinks)])

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._first.log(metrics, step)
        self._each(lambda sink: sink.log(metrics, step))

    def artifact(self, path: Path) -> None:
        self._first.artifact(path)
        self._each(lambda sink: sink.file(path))

    def dataset(self, values: Mapping[str, str]) -> None:
        self._first.dataset(values)
        content = f"{values['name']} (sha256 {values['digest']})"
        self._each(lambda sink: sink.note(f"data/{values['context']}", content))

    def model(self, values: Mapping[str, str]) -> None:
        self._first.model(values)
        for alias in values["aliases"].split():
            self._each(partial(_note, f"checkpoint/{alias}", values["folder"]))

    def finish(self, status: RunStatus) -> None:
        self._first.finish(status)
        wait = _last_wait_s(self._wait_s, status)
        self._each(lambda sink: sink.end(failed=status != "FINISHED", wait_s=wait))

    def _each(self, verb: Callable[[Sink], None]) -> None:
        for sink in list(self._sinks):
            try:
                verb(sink)
            except Exception as error:  # noqa: BLE001  a client raises what it likes, and no verb may
                self._sinks.remove(sink)
                text = "warning: %s takes nothing more (%s): the run goes on without it"
                _log.warning(text, sink.name, first_line(error))


def _last_wait_s(finish_timeout_s: float, status: RunStatus) -> float:
    """How long the end of a run may wait: the grace time of one that was told to stop is short."""
    return min(finish_timeout_s, _STOPPED_WAIT_S) if status == "KILLED" else finish_timeout_s


def _note(name: str, value: str, sink: Sink) -> None:
    sink.note(name, value)


def start_tracking(
    config: RunConfig,
    output_dir: Path,
    run_name: str,
    config_file: Path,
    resumed_run_id: str,
    from_step: int | None = None,
) -> Tracker:
    """Open the run of a training: its params are the flattened config, its first artifact is the config file.

    ``resumed_run_id`` and ``from_step``: as in ``open_run``. Raises TrackingError.
    """
    tracker = open_run(config.tracking, output_dir, run_name, flatten(config), resumed_run_id, from_step)
    if tracker.run_id != resumed_run_id or not resumed_run_id:  # a new run, also where the earlier is gone
        tracker.artifact(config_file)
    return tracker


def open_run(
    tracking: TrackingConfig,
    output_dir: Path,
    run_name: str,
    params: Mapping[str, str],
    resumed_run_id: str,
    from_step: int | None = None,
) -> Tracker:
    """Open a new run with ``params``, or the earlier one again, in each tracker. Raises TrackingError.

    ``from_step``: the step that a training goes on from. It makes steps again that MLflow may hold: each is
    there once, as it was logged first. None: a later figure of a step is sent too.
    """
    if not tracking.enabled:
        return Tracker()
    sinks = open_others(tracking, output_dir / run_name, params)
    if not tracking.uses_mlflow:
        return Relay(None, sinks, tracking.finish_timeout_s)
    try:
        mlflow = _open_mlflow(tracking, output_dir, run_name, params, resumed_run_id, from_step)
        return Relay(mlflow, sinks, tracking.finish_timeout_s) if sinks else mlflow
    except TrackingError:
        Relay(None, sinks, tracking.finish_timeout_s).finish("FAILED")
        raise


def _open_mlflow(
    tracking: TrackingConfig,
    output_dir: Path,
    run_name: str,
    params: Mapping[str, str],
    resumed_run_id: str,
    from_step: int | None,
) -> MlflowTracker:
    """Open the run in MLflow, as ``open_run`` says.

    The outbox lies in ``output_dir / run_name``. What an earlier process left in it is sent first.
    """
    _quiet(tracking.timeout_s)
    own = store_uri(tracking, output_dir) == _own_store(output_dir)
    if own and resumed_run_id and not (output_dir / "mlflow.db").exists():
        _log.warning(
            "warning: the run's MLflow store is on another machine: a new MLflow run begins in %s; "
            "figures.jsonl has all of them (tracking.uri names a server that outlives machines)",
            shown(_own_store(output_dir)),
        )
        resumed_run_id = ""
    # MLflow creates the tables of a new store step by step: two at once wreck it for good.
    with in_turn(output_dir) if own else nullcontext():
        run = _in_mlflow(tracking, output_dir, run_name, params, resumed_run_id, from_step is not None)
    uri, path = store_uri(tracking, output_dir), output_dir / run_name / f"mlflow-{run.run_id}.sqlite"
    try:
        outbox = Outbox(path)
    except (OSError, sqlite3.Error) as error:
        raise TrackingError(f"cannot keep {path}: {error}; tracking.enabled=false runs without it") from error
    if resumed_run_id and len(outbox):
        _log.warning(
            "%s holds %d records that MLflow at %s has not taken: they are sent now",
            path,
            len(outbox),
            shown(uri),
        )
    if from_step is not None and (held := run.last_step) > from_step:
        _log.warning(
            "steps %d to %d are made again: MLflow keeps their first figures, and %s has both",
            from_step + 1,
            held,
            output_dir / run_name / "figures.jsonl",
        )
    return MlflowTracker(run, outbox, uri, tracking)


def _in_mlflow(
    tracking: TrackingConfig,
    output_dir: Path,
    run_name: str,
    params: Mapping[str, str],
    resumed_run_id: str,
    once: bool,
) -> MlflowRun:
    """Create the run with its params, or mark it as running again. Raises TrackingError."""
    from mlflow.entities import Param
    from mlflow.tracking import MlflowClient

    uri = store_uri(tracking, output_dir)
    try:
        client = MlflowClient(tracking_uri=uri)
        if resumed_run_id:
            client.update_run(resumed_run_id, status="RUNNING")
            return MlflowRun(client, client.get_run(resumed_run_id), once)
        # Artifacts of our own store lie beside it, wherever the run was started.
        artifacts = output_dir / "mlflow-artifacts" if uri == _own_store(output_dir) else None
        experiment = _experiment(client, tracking.experiment, artifacts)
        tags = run_tags(params, output_dir / run_name)
        run = client.create_run(experiment, run_name=run_name, tags=tags)
        logged = [Param(mlflow_key(key), text[:_LONGEST_PARAM]) for key, text in params.items()]
        client.log_batch(run.info.run_id, params=logged)
        return MlflowRun(client, run, once)
    except Exception as error:
        raise TrackingError(
            f"cannot use MLflow at {shown(uri)}: {first_line(error)}; "
            "set tracking.uri, or tracking.enabled=false to run without it"
        ) from error


def require_server(tracking: TrackingConfig, output_dir: Path) -> None:
    """Raise TrackingError when nobody listens at the address of MLflow's server, or a package is missing.

    Why here: MLflow's client takes a minute to say so.
    """
    require_others(tracking)
    uri = store_uri(tracking, output_dir)
    if not tracking.uses_mlflow or urlsplit(uri).scheme not in ("http", "https"):
        return
    if reason := unreachable(uri):
        raise TrackingError(
            f"cannot use MLflow at {shown(uri)}: {reason}; "
            "set tracking.uri, or tracking.enabled=false to run without it"
        )


def store_uri(tracking: TrackingConfig, output_dir: Path) -> str:
    """The address of the MLflow that the runs of ``output_dir`` report to."""
    return tracking.uri or os.environ.get("MLFLOW_TRACKING_URI") or _own_store(output_dir)


def mlflow_key(name: str) -> str:
    """``name`` as MLflow takes it: a user's reward part or option may be called "f1@5" or "..".

    MLflow allows letters, digits, and _-. :/ but no path that is not plain.
    """
    text = re.sub(r"[^\w\-. :/]", lambda sign: _SIGNS.get(sign[0], f"_x{ord(sign[0]):x}_"), name)
    parts = (part if part.strip(".") else "_x2e_" * len(part) or "_" for part in text.split("/"))
    return "/".join(parts)


def _own_store(output_dir: Path) -> str:
    path = str(output_dir / "mlflow.db")
    quoted = quote(path) if set(path) & set("%?#") else path  # in an address these signs have a meaning
    return f"sqlite:///{quoted}"


def _experiment(client: MlflowClient, name: str, artifacts: Path | None) -> str:
    experiment = client.get_experiment_by_name(name)
    if experiment is not None:
        return str(experiment.experiment_id)
    # Without this tag MLflow's UI takes it for an LLM application, because of the episodes' traces.
    kind = {"mlflow.experimentKind": "custom_model_development"}
    return str(client.create_experiment(name, artifacts and artifacts.as_uri(), tags=kind))


def _now_ms() -> int:
    return int(time.time() * 1000)


def _quiet(timeout_s: float) -> None:
    """Make MLflow quiet and impatient in this process. Only defaults change: the environment goes first.

    Quiet: MLflow announces its migrations and a missing git, and prints a traceback for each failure of its
    store. The sender says it in one line. Impatient: MLflow's client waits 120 s, and asks seven times more.
    Here an attempt takes ``timeout_s``, and the sender repeats it. A database that cannot be opened is tried
    ten times by MLflow, in 100 s; here twice.
    """
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    for name in ("alembic", "mlflow", "mlflow.store.db.utils", "mlflow.tracking"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", module="mlflow")
    from mlflow import environment_variables
    from mlflow.store.db import utils as db_utils

    environment_variables.MLFLOW_HTTP_REQUEST_MAX_RETRIES.default = 0
    db_utils.MAX_RETRY_COUNT = 2
    environment_variables.MLFLOW_HTTP_REQUEST_TIMEOUT.default = max(1, round(timeout_s))
