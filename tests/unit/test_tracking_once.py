"""MLflow holds each step once, however often it was made or sent; stores that cannot be used. Real stores."""

from __future__ import annotations

import shutil
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from cluster.common.errors import TrackingError
from cluster.tracking.outbox import Point
from cluster.tracking.sender import MlflowRun
from cluster.tracking.tracker import Tracker, start_tracking
from configs.schema import RunConfig, TrackingConfig

KEYS = ("reward/mean", "learner/loss")
QUIET = RunConfig(tracking=TrackingConfig(system_metrics_s=0))
HASTY = RunConfig(tracking=TrackingConfig(system_metrics_s=0, finish_timeout_s=0.5))


@pytest.fixture(autouse=True)
def no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture(scope="module")
def output_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One store for the module: its first creation takes seconds."""
    folder = tmp_path_factory.mktemp("once")
    (folder / "config.yaml").write_text("train: {steps: 3}\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        begin(folder).finish("FINISHED")
    return folder


def begin(
    output_dir: Path, run_id: str = "", from_step: int | None = 0, config: RunConfig = QUIET
) -> Tracker:
    return start_tracking(config, output_dir, "run", output_dir / "config.yaml", run_id, from_step)


def log(tracker: Tracker, life: int, first: int, last: int) -> None:
    """Figures of which each tells its life and its step."""
    for step in range(first, last + 1):
        tracker.log(dict.fromkeys(KEYS, life * 100 + step), step)


def values(output_dir: Path, run_id: str, key: str = KEYS[0]) -> list[tuple[int, float]]:
    history = MlflowClient(f"sqlite:///{output_dir}/mlflow.db").get_metric_history(run_id, key)
    return [
        (point.step, point.value)
        for point in sorted(history, key=lambda point: (point.step, point.timestamp))
    ]


def test_steps_that_a_resumed_run_makes_again_are_there_once(
    output_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = begin(output_dir)
    first.log({"warm_start/loss": 1.0}, 50)  # these steps have numbers of their own
    log(first, 1, 1, 5)
    first.finish("KILLED")
    second = begin(output_dir, first.run_id, from_step=3)
    log(second, 2, 4, 8)
    second.finish("FINISHED")
    third = begin(output_dir, first.run_id, from_step=8)
    log(third, 3, 9, 9)
    third.finish("FINISHED")
    for key in KEYS:
        kept = [*((step, 100 + step) for step in range(1, 6)), (6, 206), (7, 207), (8, 208), (9, 309)]
        assert values(output_dir, first.run_id, key) == kept
    said = [record.getMessage() for record in caplog.records if "made again" in record.getMessage()]
    both = output_dir / "run" / "figures.jsonl"
    assert said == [f"steps 4 to 5 are made again: MLflow keeps their first figures, and {both} has both"]


def test_steps_that_a_lost_learner_makes_again_are_there_once(output_dir: Path) -> None:
    tracker = begin(output_dir)
    for life, first, last in ((1, 1, 4), (2, 3, 5), (3, 5, 7)):
        log(tracker, life, first, last)
    tracker.finish("FINISHED")
    assert [step for step, _ in values(output_dir, tracker.run_id)] == list(range(1, 8))


def test_what_waited_in_the_outbox_and_was_made_again_is_there_once(output_dir: Path) -> None:
    tracker = begin(output_dir, config=HASTY)
    log(tracker, 1, 1, 2)
    until(lambda: len(values(output_dir, tracker.run_id)) == 2)
    locked = sqlite3.connect(output_dir / "mlflow.db")
    locked.execute("BEGIN EXCLUSIVE")
    log(tracker, 1, 3, 5)
    tracker.finish("KILLED")
    locked.rollback()
    locked.close()
    again = begin(output_dir, tracker.run_id, from_step=2)
    log(again, 2, 3, 6)
    again.finish("FINISHED")
    assert [step for step, _ in values(output_dir, tracker.run_id)] == list(range(1, 7))


def test_a_report_that_was_completed_is_sent_again(output_dir: Path) -> None:
    """An evaluation logs its figures at one step; those of the resumed one are what MLflow shows."""
    first = begin(output_dir, from_step=None)
    first.log({"f1": 0.25}, 0)
    first.finish("FAILED")
    second = begin(output_dir, first.run_id, from_step=None)
    second.log({"f1": 0.5}, 0)
    second.finish("FINISHED")
    assert values(output_dir, first.run_id, "f1") == [(0, 0.25), (0, 0.5)]
    shown = MlflowClient(f"sqlite:///{output_dir}/mlflow.db").get_run(first.run_id).data.metrics
    assert shown == {"f1": 0.5}


def test_points_in_doubt_cost_the_same_in_a_run_of_any_length(
    output_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No history is read. What MLflow keeps of the last points is a line a key, and so is what we keep."""
    client, costs = MlflowClient(f"sqlite:///{output_dir}/mlflow.db"), []
    histories = MlflowClient.get_metric_history
    monkeypatch.setattr(MlflowClient, "get_metric_history", lambda *_: pytest.fail("a history was read"))
    keys = [f"learner/figure_{number}" for number in range(30)]
    for length in (100, 100_000):
        run = MlflowRun(client, client.create_run("0"), once=True)
        run.take([Point(key, 0.5, 1000 + length, length) for key in keys], in_doubt=False)
        with sqlite3.connect(output_dir / "mlflow.db") as store:  # as if each step had been sent
            columns = "(key, value, timestamp, run_uuid, step, is_nan)"
            store.executemany(
                f"INSERT INTO metrics {columns} VALUES (?, 0.5, ?, ?, ?, 0)",
                ((keys[step % 30], 1000 + step, run.run_id, step) for step in range(1, length)),
            )
        spent = []
        for turn in range(5):
            points = [
                Point(key, 0.5, 2000 + length, length + more) for key in keys for more in (turn, turn + 1)
            ]
            before = time.process_time()
            run.take(points, in_doubt=True)
            spent.append(time.process_time() - before)
        costs.append(min(spent))
        last = [point.step for point in histories(client, run.run_id, keys[1])][-6:]
        assert last == [length + more for more in range(6)]
        assert len(run._last) == 30
    assert costs[1] < 3 * costs[0] + 0.05


# --- stores that cannot be used ---------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"garbage" * 1000, b"SQLite format 3\x00" + b"x" * 9000, None])
def test_a_store_that_cannot_be_opened_is_one_line_at_the_start(
    tmp_path: Path, content: bytes | None
) -> None:
    """Garbage, and a folder in the place of the file. MLflow alone takes 100 s for the latter."""
    store, began = tmp_path / "mlflow.db", time.monotonic()
    store.mkdir() if content is None else store.write_bytes(content)
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    with pytest.raises(TrackingError) as raised:
        begin(tmp_path)
    message = str(raised.value)
    assert message.startswith(f"cannot use MLflow at sqlite:///{store}: (sqlite3.") and "\n" not in message
    assert message.endswith("set tracking.uri, or tracking.enabled=false to run without it")
    assert time.monotonic() - began < 60
    if content is not None:
        assert store.read_bytes() == content  # it is the user's


@pytest.mark.slow  # MLflow waits 20 s for the lock
def test_a_locked_store_is_one_line_at_the_start(output_dir: Path) -> None:
    locked = sqlite3.connect(output_dir / "mlflow.db")
    locked.execute("BEGIN EXCLUSIVE")
    try:
        with pytest.raises(
            TrackingError, match=r"^cannot use MLflow at .*database is locked; set tracking.uri"
        ):
            begin(output_dir)
    finally:
        locked.rollback()
        locked.close()


@pytest.mark.parametrize("fault", ["garbage", "missing"])
def test_a_store_that_breaks_in_mid_run_costs_one_warning_and_no_figure(
    output_dir: Path, tmp_path: Path, fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copy(output_dir / "mlflow.db", tmp_path)  # a new one takes seconds
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    store, saved = tmp_path / "mlflow.db", tmp_path / "saved.db"
    tracker = begin(tmp_path, config=HASTY)
    log(tracker, 1, 1, 2)
    until(lambda: len(values(tmp_path, tracker.run_id)) == 2)
    if fault == "missing":
        store.rename(saved)
    else:
        saved.write_bytes(store.read_bytes())
        store.write_bytes(b"garbage" * 1000)
    log(tracker, 1, 3, 4)
    until(lambda: "takes nothing" in caplog.text)
    log(tracker, 1, 5, 6)
    tracker.finish("FINISHED")
    assert caplog.text.count("takes nothing") == 1
    assert len(list((tmp_path / "run").glob("mlflow-*.sqlite"))) == 1
    if fault == "missing":
        saved.rename(store)
    else:  # in place: MLflow keeps its connections, as long as a process lives
        store.write_bytes(saved.read_bytes())
    again = begin(tmp_path, tracker.run_id, from_step=6)
    log(again, 2, 7, 7)
    again.finish("FINISHED")
    assert [step for step, _ in values(tmp_path, tracker.run_id)] == list(range(1, 8))
    assert list((tmp_path / "run").glob("mlflow-*.sqlite")) == []


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not true() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert true()
