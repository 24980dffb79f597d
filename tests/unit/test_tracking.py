"""The tracker on a real MLflow store (sqlite in a temporary folder)."""

from __future__ import annotations

import logging
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from cluster.common.errors import TrackingError
from cluster.common.git import git_commit
from cluster.tracking.outbox import Entity, Outbox, Point, Record, Status
from cluster.tracking.sender import MlflowRun, Sender, first_line
from cluster.tracking.tracker import MlflowTracker, Tracker, start_tracking
from configs.load import flatten
from configs.schema import RunConfig, TrackingConfig, TrainConfig

QUIET = RunConfig(tracking=TrackingConfig(system_metrics_s=0))


@pytest.fixture(scope="module")
def output_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One store for the module: its first creation takes seconds."""
    folder = tmp_path_factory.mktemp("tracking")
    (folder / "config.yaml").write_text("train: {steps: 3}\n")
    return folder


@pytest.fixture(autouse=True)
def no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def client(output_dir: Path) -> MlflowClient:
    return MlflowClient(f"sqlite:///{output_dir}/mlflow.db")


def test_a_run_holds_config_metrics_artifacts_and_its_end(output_dir: Path) -> None:
    config = replace(QUIET, train=TrainConfig(steps=3))
    tracker = start_tracking(config, output_dir, "first", output_dir / "config.yaml", "")
    for step in (1, 2):
        tracker.log({"reward/mean": step / 10, "learner/loss": 1.0}, step)
    note = output_dir / "note.txt"
    note.write_text("n")
    tracker.artifact(note)
    tracker.finish("FINISHED")
    store = client(output_dir)
    run = store.get_run(tracker.run_id)
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "first"
    assert run.data.params["train.steps"] == "3"
    grouped = {"config": "engram", "environment": "recall", "memory": "parametric", "seed": "0"}
    assert grouped.items() <= run.data.tags.items() and run.data.tags["mlflow.user"]
    assert f"engram watch {output_dir / 'first'}" in run.data.tags["mlflow.note.content"]
    assert run.data.params["fast_weights.projections"] == "('gate_proj', 'up_proj', 'down_proj')"
    history = store.get_metric_history(tracker.run_id, "reward/mean")
    assert [(point.step, point.value) for point in history] == [(1, 0.1), (2, 0.2)]
    assert {file.path for file in store.list_artifacts(tracker.run_id)} == {"config.yaml", "note.txt"}
    assert str(output_dir) in tracker.location
    assert not Path("mlruns").exists()  # artifacts lie in the output folder, wherever the run was started


def test_a_resumed_run_goes_on_in_the_same_run(output_dir: Path) -> None:
    first = start_tracking(QUIET, output_dir, "killed", output_dir / "config.yaml", "")
    first.log({"reward/mean": 0.1}, 1)
    first.finish("KILLED")
    assert client(output_dir).get_run(first.run_id).info.status == "KILLED"
    second = start_tracking(QUIET, output_dir, "another name", output_dir / "config.yaml", first.run_id)
    assert second.run_id == first.run_id
    assert client(output_dir).get_run(first.run_id).info.status == "RUNNING"
    second.log({"reward/mean": 0.2}, 2)
    second.finish("FINISHED")
    run = client(output_dir).get_run(first.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.metrics["reward/mean"] == 0.2


def test_an_artifact_that_is_gone_holds_up_nothing_and_a_name_is_quoted(
    output_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = start_tracking(QUIET, output_dir, "refused", output_dir / "config.yaml", "")
    tracker.artifact(output_dir / "never-written.txt")
    tracker.log({"reward/mean": 0.5, "reward/50%?": 1.0}, 1)
    tracker.finish("FINISHED")
    run = client(output_dir).get_run(tracker.run_id)
    quoted = {"reward/mean": 0.5, "reward/50_percent__x3f_": 1.0}
    assert (run.info.status, run.data.metrics) == ("FINISHED", quoted)
    refused = [record.getMessage() for record in caplog.records if "refuses" in record.getMessage()]
    assert len(refused) == 1
    assert "never-written.txt is gone" in refused[0]


def test_a_locked_database_neither_stops_nor_slows_the_training(
    output_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = client(output_dir)
    tracker = start_tracking(
        RunConfig(tracking=TrackingConfig(finish_timeout_s=0.5, system_metrics_s=0)),
        output_dir,
        "locked",
        output_dir / "config.yaml",
        "",
    )
    until(lambda: len(store.list_artifacts(tracker.run_id)) > 0)
    lock = sqlite3.connect(output_dir / "mlflow.db")
    lock.execute("BEGIN EXCLUSIVE")
    try:
        before = time.monotonic()
        for step in range(1, 6):
            tracker.log({"reward/mean": step / 10}, step)
        tracker.finish("FINISHED")
        assert time.monotonic() - before < 10  # MLflow itself waits 20 s for such a lock, several times
    finally:
        lock.rollback()
        lock.close()
    assert "did not take the last 6 records within 0.5 s" in caplog.text
    again = start_tracking(QUIET, output_dir, "locked", output_dir / "config.yaml", tracker.run_id)
    again.finish("FINISHED")
    assert [point.step for point in store.get_metric_history(tracker.run_id, "reward/mean")] == [*range(1, 6)]
    assert store.get_run(tracker.run_id).info.status == "FINISHED"


KILLED_DRIVER = """
import os, signal, sys, time
from pathlib import Path
from cluster.tracking.tracker import start_tracking
from configs.schema import RunConfig
folder = Path(sys.argv[1])
tracker = start_tracking(RunConfig(), folder, "driver", folder / "config.yaml", "")
for step in range(1, 201):
    tracker.log({"reward/mean": float(step)}, step)
print(tracker.run_id, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_driver_loses_no_point(output_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    settings = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", KILLED_DRIVER, str(output_dir)]
    killed = subprocess.run(command, env=settings, capture_output=True, text=True, timeout=120, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    run_id = killed.stdout.strip()
    assert client(output_dir).get_run(run_id).info.status == "RUNNING"
    resumed = start_tracking(QUIET, output_dir, "driver", output_dir / "config.yaml", run_id)
    resumed.log({"reward/mean": 201.0}, 201)
    resumed.finish("FINISHED")
    store = client(output_dir)
    assert [point.step for point in store.get_metric_history(run_id, "reward/mean")] == list(range(1, 202))
    assert store.get_run(run_id).info.status == "FINISHED"
    assert store.get_run(run_id).data.params["seed"] == "0"
    assert "that MLflow at sqlite" in caplog.text


class CountingClient(MlflowClient):
    """The real client, and what it was asked to append."""

    def __init__(self, uri: str) -> None:
        super().__init__(uri)
        self.appended: list[int] = []

    def log_batch(  # type: ignore[no-untyped-def]
        self, run_id, metrics=(), params=(), tags=(), synchronous=None
    ):
        self.appended += [metric.step for metric in metrics]
        return super().log_batch(run_id, metrics, params, tags, synchronous)


def test_points_in_doubt_are_compared_with_the_store_and_sent_once(output_dir: Path) -> None:
    counting = CountingClient(f"sqlite:///{output_dir}/mlflow.db")
    run = MlflowRun(counting, counting.create_run("0"))
    points = [Point("loss", 0.5, 1000 + step, step) for step in range(4)]
    run.take(points[:2], in_doubt=False)
    run.take(points, in_doubt=True)
    assert counting.appended == [0, 1, 2, 3]
    times = [point.timestamp for point in counting.get_metric_history(run.run_id, "loss")]
    assert times == [1000, 1001, 1002, 1003]


class FakeRun(MlflowRun):
    """Answers as it is told to, and keeps what it was asked to take."""

    def __init__(self) -> None:
        self.run_id, self.began = "run", 0.0
        self.asked: list[tuple[int, bool]] = []  # number of records, whether in doubt
        self.taken: list[Record] = []
        self.answering = True
        self.broken: type[Record] | None = None  # the records that its artifact store does not take

    def ping(self) -> None:
        if not self.answering:
            raise ConnectionError("no answer")

    def take(self, records: Sequence[Record], in_doubt: bool) -> list[str]:
        self.asked.append((len(records), in_doubt))
        if not self.answering or isinstance(records[0], self.broken or ()):
            raise ConnectionError("no answer")
        self.taken += records
        return []


@pytest.mark.parametrize("left_over", [0, 2])
def test_only_what_was_attempted_or_left_by_another_process_is_in_doubt(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, left_over: int
) -> None:
    point = Point("loss", 0.5, 1000, 1)
    earlier = Outbox(tmp_path / "outbox.sqlite")
    earlier.append([point] * left_over)
    earlier.close()
    outbox, run = Outbox(earlier.path), FakeRun()
    sender = Sender(outbox, run, "uri")
    sender.start()
    until(lambda: len(outbox) == 0)
    assert run.asked == ([(2, True)] if left_over else [])
    run.asked.clear()
    run.answering = False
    outbox.append([point])
    until(lambda: len(run.asked) > 1)
    outbox.append([Status("KILLED", 5), point])
    run.answering = True
    assert sender.drain(20)
    assert run.asked[:2] == [(1, False), (1, True)]  # the first attempt, and the next
    assert run.asked[-2:] == [(1, False), (1, False)]
    assert caplog.text.count("warning: MLflow at uri takes nothing (no answer)") == 1
    assert caplog.text.count("answers again") == 1


def test_a_broken_artifact_store_holds_up_no_metric(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    outbox, run = Outbox(tmp_path / "outbox.sqlite"), FakeRun()
    run.broken = Entity
    sender = Sender(outbox, run, "uri")
    points = [Point("loss", 0.5, 1000, step) for step in range(2)]
    outbox.append([points[0], Entity("artifact", {"name": "note.txt"}), points[1]])
    sender.start()
    assert sender.drain(20)
    assert (run.taken, len(run.asked)) == (points, 5)
    assert "MLflow at uri refuses note.txt: no answer; the run goes on without it" in caplog.text


def test_an_artifact_waits_for_a_store_that_is_away(tmp_path: Path) -> None:
    outbox, run = Outbox(tmp_path / "outbox.sqlite"), FakeRun()
    run.answering = False
    sender = Sender(outbox, run, "uri")
    note = Entity("artifact", {"name": "note.txt"})
    outbox.append([note])
    sender.start()
    until(lambda: len(run.asked) > 4)
    run.answering = True
    assert sender.drain(20)
    assert run.taken == [note]


def test_a_run_that_was_told_to_stop_waits_for_five_seconds_at_most(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    waits = []
    monkeypatch.setattr(Sender, "drain", lambda self, seconds: waits.append(seconds))
    for status in ("KILLED", "FINISHED"):
        tracker = MlflowTracker(FakeRun(), Outbox(tmp_path / f"{status}.sqlite"), "uri", QUIET.tracking)
        tracker.finish(status)
    assert waits == [5.0, QUIET.tracking.finish_timeout_s]
    assert "did not take the last" in caplog.text


def test_the_number_of_records_that_wait_is_a_metric(tmp_path: Path) -> None:
    run = FakeRun()
    tracker = MlflowTracker(run, Outbox(tmp_path / "outbox.sqlite"), "uri", QUIET.tracking)
    tracker.log({"loss": 0.5}, 1)
    until(lambda: len(run.taken) == 1)
    run.answering = False
    for step in (2, 3):
        tracker.log({"loss": 0.5}, step)
        until(lambda: len(run.asked) > 2)
    run.answering = True
    tracker.finish("FINISHED")
    spooled = [record for record in run.taken if isinstance(record, Point) and record.key != "loss"]
    assert [(point.key, point.value, point.step) for point in spooled] == [("tracking/spooled", 1.0, 3)]


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not true() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert true()


def test_an_unreachable_server_is_one_clear_error_within_seconds(
    output_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://somebody:secret@127.0.0.1:9")
    config = RunConfig()
    before = time.monotonic()
    with pytest.raises(
        TrackingError,
        match=r"cannot use MLflow at http://\*\*\*@127.0.0.1:9: .*Connection refused; set tracking.uri",
    ) as caught:
        start_tracking(config, output_dir, "x", output_dir / "config.yaml", "")
    assert time.monotonic() - before < 20
    assert "secret" not in str(caught.value)
    assert len(str(caught.value)) < 250
    assert "MLFLOW_HTTP_REQUEST_MAX_RETRIES" not in os.environ


def test_an_error_is_one_line_of_bearable_length() -> None:
    assert first_line(RuntimeError("a\nb")) == "a"
    assert first_line(RuntimeError()) == "RuntimeError"
    assert len(first_line(RuntimeError("x" * 1000))) == 303


def test_an_unusable_store_is_one_clear_error(output_dir: Path) -> None:
    config = RunConfig(tracking=TrackingConfig(uri="nonsense://nowhere"))
    with pytest.raises(
        TrackingError, match=r"cannot use MLflow at nonsense://nowhere: .*tracking.enabled=false"
    ):
        start_tracking(config, output_dir, "x", output_dir / "config.yaml", "")


def test_a_lost_run_id_is_one_clear_error(output_dir: Path) -> None:
    with pytest.raises(TrackingError, match="cannot use MLflow at sqlite"):
        start_tracking(QUIET, output_dir, "x", output_dir / "config.yaml", "0" * 32)


def test_tracking_can_be_off(output_dir: Path) -> None:
    tracker = start_tracking(
        RunConfig(tracking=TrackingConfig(enabled=False)), output_dir, "x", output_dir / "config.yaml", ""
    )
    assert type(tracker) is Tracker
    tracker.log({"reward/mean": 1.0}, 1)
    tracker.finish("FINISHED")


def test_every_setting_is_a_param() -> None:
    flat = flatten(RunConfig())
    assert flat["seed"] == "0"
    assert flat["environment.recall.sessions"] == "2"
    assert not any(value.startswith("RecallConfig") for value in flat.values())


def test_no_commit_outside_a_repository(tmp_path: Path) -> None:
    assert git_commit(tmp_path) == ""
