"""The tracker on a real MLflow store (sqlite in a temporary folder)."""

from __future__ import annotations

from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from cluster.errors import TrackingError
from cluster.tracking import NullTracker, flatten, git_commit, start_tracking
from configs.schema import RunConfig, TrackingConfig, TrainConfig


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
    config = RunConfig(train=TrainConfig(steps=3))
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
    assert run.data.params["fast_weights.projections"] == "('gate_proj', 'up_proj', 'down_proj')"
    assert [(point.step, point.value) for point in store.get_metric_history(tracker.run_id, "reward/mean")] == [(1, 0.1), (2, 0.2)]
    assert {file.path for file in store.list_artifacts(tracker.run_id)} == {"config.yaml", "note.txt"}
    assert str(output_dir) in tracker.location
    assert list(Path.cwd().glob("mlruns")) == []  # artifacts lie in the output folder, wherever the run was started


def test_a_resumed_run_goes_on_in_the_same_run(output_dir: Path) -> None:
    first = start_tracking(RunConfig(), output_dir, "killed", output_dir / "config.yaml", "")
    first.log({"reward/mean": 0.1}, 1)
    first.finish("KILLED")
    assert client(output_dir).get_run(first.run_id).info.status == "KILLED"
    second = start_tracking(RunConfig(), output_dir, "another name", output_dir / "config.yaml", first.run_id)
    assert second.run_id == first.run_id
    assert client(output_dir).get_run(first.run_id).info.status == "RUNNING"
    second.log({"reward/mean": 0.2}, 2)
    second.finish("FINISHED")
    run = client(output_dir).get_run(first.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.metrics["reward/mean"] == 0.2


def test_an_unusable_store_is_one_clear_error(output_dir: Path) -> None:
    config = RunConfig(tracking=TrackingConfig(uri="nonsense://nowhere"))
    with pytest.raises(TrackingError, match=r"cannot use MLflow at nonsense://nowhere: .*tracking.enabled=false"):
        start_tracking(config, output_dir, "x", output_dir / "config.yaml", "")


def test_a_lost_run_id_is_one_clear_error(output_dir: Path) -> None:
    with pytest.raises(TrackingError, match="cannot use MLflow at sqlite"):
        start_tracking(RunConfig(), output_dir, "x", output_dir / "config.yaml", "0" * 32)


def test_tracking_can_be_off(output_dir: Path) -> None:
    tracker = start_tracking(RunConfig(tracking=TrackingConfig(enabled=False)), output_dir, "x", output_dir / "config.yaml", "")
    assert isinstance(tracker, NullTracker)
    tracker.log({"reward/mean": 1.0}, 1)
    tracker.finish("FINISHED")


def test_every_setting_is_a_param() -> None:
    flat = flatten(RunConfig())
    assert flat["seed"] == "0"
    assert flat["environment.recall.sessions"] == "2"
    assert not any(value.startswith("RecallConfig") for value in flat.values())


def test_no_commit_outside_a_repository(tmp_path: Path) -> None:
    assert git_commit(tmp_path) == ""
