"""What a run needs of its surroundings is checked before Ray starts, in one line each; names are quoted."""

from __future__ import annotations

import socket
import time
from dataclasses import replace
from pathlib import Path

import pytest

from actors.episodes.group_summary import GroupSummary
from cluster.common.errors import StartupError, TrackingError
from cluster.common.folders import require_writable
from cluster.tracking.tracker import MlflowTracker, mlflow_key, open_run, require_server
from cluster.train.metrics import reward_metrics
from cluster.train.prepare import prepare_training
from configs.load import ConfigError, load_config
from configs.models import ModelError
from configs.schema import RunConfig, TrackingConfig
from tests.unit.cluster_cases import group, task_at

QUICKSTART = Path("tests/quickstart.yaml")


def _config(folder: Path, *settings: str) -> RunConfig:
    return load_config(QUICKSTART, [f"output_dir={folder / 'runs'}", "tracking.enabled=false", *settings])


def _closed_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


@pytest.mark.parametrize(
    ("setting", "kind", "said"),
    [
        (
            "engine.max_model_tokens=100000",
            ModelError,
            r"engine\.max_model_tokens=100000 is more than the window of model .*: \d+ tokens; lower it",
        ),
        (
            "rollout.workers=64 rollout.gpus_per_worker=1 model.dtype=bfloat16",
            StartupError,
            r"the run asks for .* 64 GPU, this machine has \d+ GPU",
        ),
        (
            "tracking.uri=http://127.0.0.1:{port}",
            TrackingError,
            r"MLflow at .*: Connection refused",
        ),
        (
            "output_dir={folder}/a-file/runs",
            ConfigError,
            r"output_dir=.*a-file/runs: cannot be written",
        ),
        ("output_dir=/proc/nowhere", ConfigError, r"output_dir=/proc/nowhere: cannot be written"),
    ],
)
def test_what_is_not_there_is_said_before_anything_starts(
    tmp_path: Path, model_path: Path, setting: str, kind: type[Exception], said: str
) -> None:
    (tmp_path / "a-file").write_text("")
    words = [*setting.format(port=_closed_port(), folder=tmp_path).split(), f"model.name={model_path}"]
    config = _config(tmp_path, *words, f"tracking.enabled={str('tracking' in setting).lower()}")
    began = time.process_time()
    with pytest.raises(kind, match=said) as caught:
        prepare_training(config)
    assert "\n" not in str(caught.value) and time.process_time() - began < 20
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a-file"]  # nothing is left


def test_settings_that_cannot_work_together_are_refused(tmp_path: Path) -> None:
    said = r"train\.group_timeout_s=60 is not allowed: it must be more than rollout\.episode_timeout_s=600"
    with pytest.raises(ConfigError, match=said):
        prepare_training(_config(tmp_path, "train.group_timeout_s=60"))


def test_a_folder_that_can_be_written_leaves_no_trace(tmp_path: Path) -> None:
    require_writable(tmp_path / "a%20b" / "c?d", "output_dir")
    assert [*tmp_path.iterdir()] == []
    with pytest.raises(ConfigError, match="File name too long"):
        require_writable(tmp_path / ("x" * 300), "output_dir")


def test_a_server_that_listens_passes_and_a_file_store_is_not_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        address = f"http://user:secret@127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        require_server(TrackingConfig(), tmp_path)
    with pytest.raises(TrackingError, match=r"http://\*\*\*@127\.0\.0\.1"):
        require_server(TrackingConfig(), tmp_path)
    require_server(TrackingConfig(uri="sqlite:///nowhere.db"), tmp_path)
    require_server(TrackingConfig(enabled=False), tmp_path)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("reward/f1@5", "reward/f1_at_5"),
        ("reward/100%", "reward/100_percent_"),
        ("reward/a*b", "reward/a_x2a_b"),
        ("reward/../x", "reward/_x2e__x2e_/x"),
        ("reward//x", "reward/_/x"),
        ("eval/before/f1", "eval/before/f1"),
    ],
)
def test_names_are_quoted_for_mlflow(name: str, key: str) -> None:
    from mlflow.utils.validation import _validate_metric_name

    assert mlflow_key(name) == key
    _validate_metric_name(key)


def test_a_reward_part_may_have_the_name_of_a_figure() -> None:
    played = group(task_at(0), 0, rewards=(1.0, 0.0))
    parts = {"mean": 0.25, "f1@5": 0.5}
    trajectories = tuple(
        replace(trajectory, outcome=replace(trajectory.outcome, reward_parts=parts))
        for trajectory in played.trajectories
    )
    metrics = reward_metrics([GroupSummary.of(replace(played, trajectories=trajectories))])
    assert metrics["reward/mean"] == 0.5 and metrics["reward/part_mean"] == 0.25
    assert metrics["reward/f1@5"] == 0.5


@pytest.mark.parametrize("name", ["a%20b", "what?x=1#y"])
def test_a_run_folder_may_have_any_name(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    (folder / "run").mkdir(parents=True)
    tracker = open_run(TrackingConfig(), folder, "run", {"a@b": "1"}, "")
    tracker.log({"reward/f1@5": 0.5}, 1)
    note = folder / "note.txt"
    note.write_text("kept")
    tracker.artifact(note)
    tracker.finish("FINISHED")
    assert (folder / "mlflow.db").is_file()
    assert isinstance(tracker, MlflowTracker)
    run = tracker._sender._run
    saved = run._client.get_run(run.run_id).data
    assert saved.metrics == {"reward/f1_at_5": 0.5} and saved.params == {"a_at_b": "1"}
    assert [path.read_text() for path in tmp_path.rglob("artifacts/note.txt")] == ["kept"]
