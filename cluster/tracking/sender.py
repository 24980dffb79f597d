"""The sender: a thread that takes the outbox's records to MLflow, in order, and tries again until it answers.

    Outbox.oldest --> MlflowRun.take --> an answer: Outbox.taken
         ^                  |
         '----- pause <-----'-- no answer: one warning an outage, and these records are in doubt

In doubt: MLflow may hold some of them, since its answer was lost, or the process died before it came.
All but points may be sent twice. Points in doubt are compared with the last one that MLflow holds of their
key: points leave in the order of logging. One call tells the last of every key, however long the run is.

A training that goes back to a checkpoint makes steps again. MLflow cannot take a value back, so a step stays
as it was logged first. The run's figures.jsonl has both.

A record that MLflow refuses for good is dropped with a warning: it must not hold up the rest.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.tracking.outbox import Entity, Outbox, Point, Record, Status
from cluster.tracking.registry import take_dataset, take_model

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

_FIRST_PAUSE_S, _LAST_PAUSE_S = 0.1, 15.0  # it doubles with each failure
_MOST_READ = 4000  # characters of an error, from its end
_LAST_PAUSE_AT_END_S = 0.5  # while the run waits for us
_STEPS_OF_THEIR_OWN = ("system/", "tracking/", "warm_start/")
_ENTITY_ATTEMPTS = 3  # while MLflow itself answers: a broken artifact store must not hold up the metrics
_log = logging.getLogger(__name__)


class MlflowRun:
    """One run in MLflow. Raises whatever MLflow, its database driver or its artifact store raises.

    ``once``: of each key, one point a step is sent. Else a later point of a step is sent too: a report that
    was completed.
    """

    def __init__(self, client: MlflowClient, run: Run, once: bool = False) -> None:
        self._client, self._once = client, once
        self.run_id = str(run.info.run_id)
        self.began = float(run.info.start_time) / 1000  # s since 1970
        self._last = _last_points(run)  # (step, time) of the last point of each key that MLflow holds

    @property
    def last_step(self) -> int:
        """The last training step of which MLflow holds a figure; 0 without one."""
        steps = (step for key, (step, _) in self._last.items() if not key.startswith(_STEPS_OF_THEIR_OWN))
        return max(steps, default=0)

    def ping(self) -> None:
        """Raise if MLflow does not answer."""
        self._client.get_run(self.run_id)

    def take(self, records: Sequence[Record], in_doubt: bool) -> list[str]:
        """Send ``records``, of points ``in_doubt`` the ones that MLflow lacks. Returns what it refuses."""
        match records[0]:
            case Point():
                points = [record for record in records if isinstance(record, Point)]
                return self._log(self._missing(points, in_doubt))
            case Entity("artifact", {"name": name}) if not Path(name).exists():
                return [f"{name} is gone"]
            case Entity("artifact", {"name": name}):
                self._client.log_artifact(self.run_id, name)
            case Entity("dataset", values):
                take_dataset(self._client, self.run_id, values)
            case Entity(_, values):
                take_model(self._client, self.run_id, values)
            case Status(status, time):
                self._client.set_terminated(self.run_id, status, time)
        return []

    def _missing(self, points: Sequence[Point], in_doubt: bool) -> list[Point]:
        """The points that MLflow is to be sent: it would keep a second one beside the first."""
        if in_doubt:
            self._last = _last_points(self._client.get_run(self.run_id))
        last, missing = dict(self._last), list[Point]()
        for point in points:
            place, held = (point.step, point.time), last.get(point.key)
            if held is None or (place[0] > held[0] if self._once else not in_doubt or place > held):
                missing.append(point)
                last[point.key] = place
        return missing

    def _log(self, points: Sequence[Point]) -> list[str]:
        """Send all in one call; one by one when MLflow finds one of them invalid (it then took none)."""
        from mlflow.entities import Metric
        from mlflow.exceptions import MlflowException

        try:
            self._client.log_batch(self.run_id, [Metric(it.key, it.value, it.time, it.step) for it in points])
        except MlflowException as error:
            if error.error_code != "INVALID_PARAMETER_VALUE":
                raise
            if len(points) == 1:
                return [f"{points[0].key}: {first_line(error)}"]
            return [refusal for point in points for refusal in self._log([point])]
        self._last |= {it.key: (it.step, it.time) for it in points}
        return []


def _last_points(run: Run) -> dict[str, tuple[int, int]]:
    """The (step, time) of the last point of each key of ``run``, as MLflow has told it."""
    return {point.key: (point.step, point.timestamp) for point in run.data.to_proto().metrics}


class Sender(threading.Thread):
    """Empties the outbox. A daemon: an MLflow that never answers cannot keep the process alive."""

    def __init__(self, outbox: Outbox, run: MlflowRun, uri: str) -> None:
        super().__init__(name="mlflow-sender", daemon=True)
        self._outbox, self._run, self._uri = outbox, run, shown(uri)
        self._in_doubt = len(outbox)  # of the oldest records. An earlier process may have sent those of now
        self._ending, self._stopped = threading.Event(), threading.Event()
        self._failures = self._entity_failures = 0  # in a row; the second: of an entity while MLflow answers
        self.problem = ""  # of the last attempt; empty while MLflow answers

    def drain(self, seconds: float) -> bool:
        """Wait at most ``seconds`` until MLflow has taken all, and end the thread. True when it has."""
        self._ending.set()
        self.join(seconds)
        self._stopped.set()
        return len(self._outbox) == 0

    def run(self) -> None:
        while not self._stopped.is_set():
            ending = self._ending.is_set()  # read before the outbox: nothing is logged after this flag
            records = self._outbox.oldest()
            if records and self._sent(records):
                continue
            if ending and not records:
                return
            longest = _LAST_PAUSE_AT_END_S if ending else _LAST_PAUSE_S
            pause = min(_FIRST_PAUSE_S * 2.0 ** min(self._failures, 10), longest)
            (self._stopped if ending else self._ending).wait(pause)

    def _sent(self, records: Sequence[Record]) -> bool:
        """Send ``records``. True when MLflow has answered, be it with a refusal."""
        try:
            refused = self._run.take(records, self._in_doubt > 0)
        except Exception as error:  # noqa: BLE001  of MLflow, a driver, an artifact store: none ends us
            self._failures += 1
            self._in_doubt = max(self._in_doubt, len(records))
            problem = first_line(error)
            if not isinstance(records[0], Entity) or not self._is_broken():
                if not self.problem:
                    _log.warning(
                        "warning: MLflow at %s takes nothing (%s): "
                        "the run goes on, its figures are kept in %s",
                        self._uri,
                        problem,
                        self._outbox.path,
                    )
                self.problem = problem
                return False
            refused = [f"{records[0].values['name']}: {problem}"]
        self._outbox.taken()
        for text in refused:
            _log.warning("warning: MLflow at %s refuses %s; the run goes on without it", self._uri, text)
        if self.problem:
            _log.warning("MLflow at %s answers again: it is sent %s", self._uri, self._outbox.path)
        self.problem, self._failures, self._entity_failures = "", 0, 0
        self._in_doubt = max(0, self._in_doubt - len(records))
        return True

    def _is_broken(self) -> bool:
        """Count a failure of an entity, only if MLflow itself answers. True after the last attempt."""
        with suppress(Exception):
            self._run.ping()
            self._entity_failures += 1
        return self._entity_failures >= _ENTITY_ATTEMPTS


def first_line(error: Exception) -> str:
    """Describe an error of MLflow in one short line without a password: an HTTP error by its cause."""
    line = str(error).splitlines()[0] if str(error) else type(error).__name__
    cause = re.search(r"\(Caused by \w+\((.*)\)\)$", line[-_MOST_READ:])
    if cause is not None:
        line = cause[1].rpartition("): ")[2].strip("\"'")
    return shown(line if len(line) <= 300 else f"{line[:300]}...")


def shown(text: str) -> str:
    """Hide user and password of any address in ``text``."""
    return re.sub(r"//[^/@\s]*@", "//***@", text)
