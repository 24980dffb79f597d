"""The tracker against a real MLflow server that is killed, or stops answering, in the middle of a run."""

from __future__ import annotations

import math
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from cluster.tracking.tracker import MlflowTracker, start_tracking
from configs.schema import RunConfig, TrackingConfig

STARTS_WITHIN_S = 120.0  # of a shared machine; about 6 s of one core
KEYS = [f"learner/figure_{index}" for index in range(30)]


class Server:
    """``mlflow server`` on loopback over one sqlite file, as an own process group."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        store = [
            f"--backend-store-uri=sqlite:///{self.folder}/server.db",
            f"--artifacts-destination={self.folder}/artifacts",
        ]
        command = [sys.executable, "-m", "mlflow", "server", "--workers=1", "--host=127.0.0.1"]
        command += [f"--port={self.port}", *store]
        settings = os.environ | {
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "MLFLOW_DISABLE_TELEMETRY": "true",
        }
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                command, env=settings, stdout=log, stderr=log, cwd=self.folder, start_new_session=True
            )
        until(self.healthy, STARTS_WITHIN_S, f"the MLflow server did not start: {self.folder / 'server.log'}")

    def healthy(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, (self.folder / "server.log").read_text()
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=2) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def signal(self, number: signal.Signals) -> None:
        assert self.process is not None
        os.killpg(self.process.pid, number)
        if number == signal.SIGKILL:
            self.process.wait(timeout=30)


def until(true: Callable[[], bool], seconds: float, otherwise: str) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, otherwise
        time.sleep(0.05)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server"))
    server.start()
    yield server
    server.signal(signal.SIGKILL)


@pytest.fixture
def config(server: Server, tmp_path: Path) -> RunConfig:
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    return RunConfig(
        tracking=TrackingConfig(uri=server.uri, timeout_s=30, finish_timeout_s=90, system_metrics_s=0)
    )


def figures(step: int) -> dict[str, float]:
    return {key: step + index / 100 for index, key in enumerate(KEYS)}


def steps(client: MlflowClient, run_id: str, key: str) -> list[int]:
    return [point.step for point in client.get_metric_history(run_id, key)]


def test_a_server_killed_in_mid_run_and_started_again_holds_everything_once(
    server: Server, config: RunConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = start_tracking(config, tmp_path, "run", tmp_path / "config.yaml", "")
    began, cost = int(time.time() * 1000), []

    def log(step: int) -> None:
        before = time.thread_time()
        tracker.log(figures(step), step)
        cost.append(time.thread_time() - before)

    for step in range(1, 31):
        log(step)
        time.sleep(0.02)
        if step == 10:
            server.signal(signal.SIGKILL)  # with requests on their way
    note = tmp_path / "note.txt"
    note.write_text("written while the server was away")
    tracker.artifact(note)
    until(lambda: "takes nothing" in caplog.text, 30, "no warning of the outage")
    log(31)
    away = int(time.time() * 1000)
    server.start()
    until(lambda: "answers again" in caplog.text, 60, "the sender did not come back to the server")
    log(32)
    tracker.finish("FINISHED")

    client = MlflowClient(server.uri)
    run = client.get_run(tracker.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params["seed"] == "0"
    for key in (KEYS[0], KEYS[-1]):
        history = client.get_metric_history(tracker.run_id, key)
        assert [point.step for point in history] == list(range(1, 33))
        assert [point.value for point in history] == [figures(step)[key] for step in range(1, 33)]
        assert all(began <= point.timestamp <= away for point in history[:31])
    assert 31 in steps(client, tracker.run_id, "tracking/spooled")
    assert {file.path for file in client.list_artifacts(tracker.run_id)} == {"config.yaml", "note.txt"}
    assert list((tmp_path / "run").iterdir()) == []  # nothing is left to send
    assert caplog.text.count("takes nothing") == 1
    assert sorted(cost)[len(cost) // 2] < 0.002  # seconds of this thread a step: about 0.1 ms


def test_a_run_that_ends_while_the_server_hangs_is_completed_by_the_one_that_resumes_it(
    server: Server,
    config: RunConfig,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tracker = start_tracking(config, tmp_path, "run", tmp_path / "config.yaml", "")
    assert isinstance(tracker, MlflowTracker)
    tracker.log(figures(1), 1)
    client = MlflowClient(server.uri)
    until(lambda: len(steps(client, tracker.run_id, KEYS[0])) == 1, 30, "step 1 did not arrive")
    # Its answer must be here too: that request has the long timeout, and would outlast the end of the run.
    until(lambda: len(tracker._outbox) == 0, 30, "the answer to step 1 did not arrive")
    # The user's setting goes before tracking.timeout_s.
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    server.signal(signal.SIGSTOP)
    try:
        tracker.log(figures(2) | {"reward/mean": math.nan}, 2)
        time.sleep(0.8)  # the request is in the server's socket: it will be taken, and its answer is lost
        tracker.log(figures(3), 3)
        before = time.monotonic()
        tracker.finish("KILLED")
        assert time.monotonic() - before < 10
    finally:
        server.signal(signal.SIGCONT)
        monkeypatch.delenv("MLFLOW_HTTP_REQUEST_TIMEOUT")
    left = list((tmp_path / "run").glob("mlflow-*.sqlite"))
    assert len(left) == 1
    assert f"resuming this run sends them, from {left[0]}" in caplog.text
    assert "Read timed out" in caplog.text

    # The server first closes the connections that idled while it hung, or the next call might use one.
    until(server.healthy, 60, "the server did not go on")
    resumed = start_tracking(config, tmp_path, "run", tmp_path / "config.yaml", tracker.run_id, from_step=1)
    for step in (2, 3, 4):  # the first two are made again
        resumed.log(figures(step), step)
    until(lambda: len(steps(client, tracker.run_id, KEYS[0])) == 4, 60, "the outbox was not sent")
    assert client.get_run(tracker.run_id).info.status == "RUNNING"
    resumed.finish("FAILED")
    assert client.get_run(tracker.run_id).info.status == "FAILED"
    for key in KEYS:
        assert steps(client, tracker.run_id, key) == [1, 2, 3, 4]
    (point,) = client.get_metric_history(tracker.run_id, "reward/mean")
    assert math.isnan(point.value)
    assert list((tmp_path / "run").iterdir()) == []
