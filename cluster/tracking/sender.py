"""The background half of tracking: takes the spool's records to the store, in order, and comes back to them until the store has answered.

    Spool.oldest --> MlflowRun.take --> answered: Spool.taken        (MLflow calls are at-least-once: what is in doubt is compared first)
         ^                 |
         '-- wait, again --'-- no answer: Spool.attempted, one warning per outage

A record that the store will never take (a name it does not allow, an artifact whose file is gone) is dropped with a warning: it must not hold up the
rest.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from cluster.tracking.outbox import Batch, Record, Spool
from cluster.tracking.registry import take_dataset, take_model

if TYPE_CHECKING:
    from mlflow.entities import Metric, Param
    from mlflow.tracking import MlflowClient

_Value = TypeVar("_Value", "Metric", "Param")
MOST_METRICS, MOST_PARAMS = 1000, 100  # in one call: MLflow's limits
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.5, 15.0
_ARTIFACT_ATTEMPTS = 3  # where the store itself answers: an artifact store or a model registry that is broken must not hold up the metrics
_log = logging.getLogger(__name__)


class MlflowRun:
    """One run in the store, by calls that may be repeated. Raises whatever MLflow and its artifact stores raise when they cannot be used."""

    def __init__(self, client: MlflowClient, run_id: str) -> None:
        self._client, self.run_id = client, run_id

    def answers(self) -> bool:
        try:
            self._client.get_run(self.run_id)
        except Exception:  # noqa: BLE001  any failure means the same here
            return False
        return True

    def began(self) -> float:
        """Seconds since 1970."""
        return float(self._client.get_run(self.run_id).info.start_time) / 1000

    def take(self, batch: Batch) -> list[str]:
        """Hold ``batch``; what the store refuses for good, in words."""
        records, kind = batch.records, batch.records[0].get("kind")
        if kind == "metrics":
            return self._metrics(records, batch.doubtful)
        if kind == "params":
            return self._params(records)
        if kind == "artifact":
            return self._artifact(Path(records[0]["path"]))
        if kind == "dataset":
            take_dataset(self._client, self.run_id, records[0]["entity"])
        elif kind == "model":
            take_model(self._client, self.run_id, records[0]["entity"])
        elif kind == "status":
            self._status(records[0])
        return []

    def _metrics(self, records: Sequence[Record], doubtful: bool) -> list[str]:
        from mlflow.entities import Metric

        points = [
            Metric(key, value, record["time"], record["step"])
            for record in records
            for key, value in record["metrics"].items()
        ]
        if doubtful:
            points = self._missing(points)
        batches = [points[start : start + MOST_METRICS] for start in range(0, len(points), MOST_METRICS)]
        return [
            text
            for some in batches
            for text in self._each(some, lambda metrics: self._client.log_batch(self.run_id, metrics=metrics))
        ]

    def _missing(self, points: Sequence[Metric]) -> list[Metric]:
        """Those that the store does not hold: MLflow appends a point that comes twice in some stores (files), and takes it once in others (SQL)."""
        held = {
            (key, point.step, point.timestamp)
            for key in {point.key for point in points}
            for point in self._client.get_metric_history(self.run_id, key)
        }
        return [point for point in points if (point.key, point.step, point.timestamp) not in held]

    def _params(self, records: Sequence[Record]) -> list[str]:
        from mlflow.entities import Param

        params = [Param(key, value) for record in records for key, value in record["params"].items()]
        batches = [params[start : start + MOST_PARAMS] for start in range(0, len(params), MOST_PARAMS)]
        return [
            text
            for some in batches
            for text in self._each(some, lambda part: self._client.log_batch(self.run_id, params=part))
        ]

    def _each(self, values: list[_Value], send: Callable[[list[_Value]], None]) -> list[str]:
        """All in one call; one by one when the store finds one of them invalid (it then took none)."""
        from mlflow.exceptions import MlflowException

        try:
            if values:
                send(values)
            return []
        except MlflowException as error:
            if error.error_code != "INVALID_PARAMETER_VALUE":
                raise
            if len(values) == 1:
                return [f"{values[0].key}: {first_line(error)}"]
        return [text for value in values for text in self._each([value], send)]

    def _artifact(self, path: Path) -> list[str]:
        if not path.exists():
            return [f"{path} is gone"]
        self._client.log_artifact(self.run_id, str(path))
        return []

    def _status(self, record: Record) -> None:
        if record["status"] == "RUNNING":
            self._client.update_run(self.run_id, status="RUNNING")
        else:
            self._client.set_terminated(self.run_id, record["status"], record["time"])


class Sender(threading.Thread):
    """Empties the spool. It is a daemon: a store that never answers cannot keep the process from ending."""

    def __init__(self, spool: Spool, run: MlflowRun, uri: str) -> None:
        super().__init__(name="mlflow-sender", daemon=True)
        self._spool, self._run, self._uri = spool, run, shown(uri)
        self._changed = threading.Condition()
        self._draining = self._stopped = False
        self._failures = 0  # attempts in a row without an answer
        self._artifact_failures = (
            0  # in a row, of an artifact, dataset or model while the store itself answers
        )
        self.problem = ""  # the last of them, empty while the store answers

    def wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def drain(self, seconds: float) -> bool:
        """Whether the store has taken everything within ``seconds``. Ends the thread either way."""
        with self._changed:
            self._draining = True
            self._changed.notify_all()  # tried at once, whatever the pause it is in
            drained = self._changed.wait_for(lambda: not (len(self._spool) and self.is_alive()), seconds)
            self._stopped = True
            self._changed.notify_all()
        return drained and len(self._spool) == 0

    def run(self) -> None:
        while True:
            with self._changed:
                if self._failures and self._draining:
                    self._changed.wait_for(lambda: self._stopped, _FIRST_WAIT_S)
                elif self._failures:
                    pause = min(_FIRST_WAIT_S * 2 ** min(self._failures, 10), _LONGEST_WAIT_S)
                    self._changed.wait_for(lambda: self._stopped or self._draining, pause)
                else:
                    self._changed.wait_for(lambda: self._stopped or len(self._spool) > 0)
                if self._stopped:
                    return
            batch = self._spool.oldest(MOST_METRICS)
            if batch is not None:
                self._send(batch)
            with self._changed:
                self._changed.notify_all()  # drain may wait for this

    def _send(self, batch: Batch) -> None:
        try:
            refused = self._run.take(batch)
        except Exception as error:  # noqa: BLE001  MLflow, a database driver, any artifact store: none may end the thread, all mean "not taken"
            self._failures += 1
            is_artifact = batch.records[0].get("kind") in ("artifact", "dataset", "model")
            self._artifact_failures += is_artifact and self._run.answers()
            if not is_artifact or self._artifact_failures < _ARTIFACT_ATTEMPTS:
                self._not_taken(batch, first_line(error))
                return
            refused = [
                f"{record.get('path') or record['entity']['name']}: {first_line(error)}"
                for record in batch.records
            ]
        self._spool.taken(batch)
        for text in refused:
            _log.warning("warning: MLflow at %s refuses %s; the run goes on without it", self._uri, text)
        if self.problem:
            _log.warning(
                "MLflow at %s answers again: what was kept in %s is being sent", self._uri, self._spool.path
            )
        self.problem, self._failures, self._artifact_failures = "", 0, 0

    def _not_taken(self, batch: Batch, problem: str) -> None:
        self._spool.attempted(batch)
        if not self.problem:
            _log.warning(
                "warning: MLflow at %s takes nothing (%s): the run goes on, its figures are kept in %s",
                self._uri,
                problem,
                self._spool.path,
            )
        self.problem = problem


def first_line(error: Exception) -> str:
    """An error of MLflow in one line of bearable length, without a password; of its HTTP client's long ones the cause."""
    line = str(error).splitlines()[0] if str(error) else type(error).__name__
    cause = re.search(r"\(Caused by \w+\((.*)\)\)$", line)
    if cause is not None:
        line = cause[1].rpartition("): ")[2].strip("\"'")
    return shown(line if len(line) <= 300 else f"{line[:300]}...")


def shown(text: str) -> str:
    """``text`` with user and password of any address in it hidden."""
    return re.sub(r"//[^/@\s]*@", "//***@", text)
