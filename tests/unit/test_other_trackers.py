"""wandb and trackio behind the tracker's verbs. Tests of a package are skipped where it is missing."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from cluster.common.errors import TrackingError
from cluster.tracking import others
from cluster.tracking.tracker import Relay, open_run, require_server
from configs.load import ConfigError, load_config
from configs.schema import TrackingConfig

# Behind .venv's own packages: trackio runs with the newer pillow that vLLM needs.
sys.path.append(str(Path(__file__).parents[2] / ".trackers"))

SECRET = "k" * 40
PARAMS = {"train.steps": "7", "name": "tmem"}
MODEL = {"aliases": "newest best", "folder": "/runs/tmem/step-000002"}
DATA = {"context": "training", "name": "recall", "digest": "d1"}


def test_mlflow_is_the_default_and_a_setting_names_others() -> None:
    assert load_config(None, []).tracking.uses_mlflow
    tracking = load_config(None, ["tracking.trackers=[wandb,trackio]"]).tracking
    assert tracking.trackers == ("wandb", "trackio") and not tracking.uses_mlflow
    with pytest.raises(ConfigError, match=r"tracking\.trackers"):
        load_config(None, ["tracking.trackers=[tensorboard]"])
    with pytest.raises(ConfigError, match=r"one or more of mlflow, wandb, trackio; tracking\.enabled=false"):
        load_config(None, ["tracking.trackers=[]"])


def test_a_missing_package_is_one_line_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(others.util, "find_spec", lambda name: None)
    for name in others.OTHERS:
        with pytest.raises(
            TrackingError, match=rf"{name} is not installed: pip install 'engram-rl\[{name}\]'"
        ):
            require_server(TrackingConfig(trackers=("mlflow", name)), tmp_path)
        require_server(TrackingConfig(enabled=False, trackers=(name,)), tmp_path)


def test_a_folder_that_wandb_made_is_not_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib.machinery import ModuleSpec

    folder = ModuleSpec("wandb", None, is_package=True)
    monkeypatch.setattr(others.util, "find_spec", lambda name: folder)
    with pytest.raises(TrackingError, match="not installed"):
        require_server(TrackingConfig(trackers=("wandb",)), tmp_path)


@pytest.fixture(autouse=True)
def _own_exit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take back what wandb puts in the place of Python's own: later tests ask who ended the program."""
    monkeypatch.setattr(sys, "exit", sys.exit)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)


class _Sink:
    """Remembers what it gets; ``breaks`` from the second step on."""

    def __init__(self, name: str, breaks: bool = False) -> None:
        self.name, self.location, self.breaks = name, f"at {name}", breaks
        self.got: list[object] = []

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        if self.breaks and step > 1:
            raise ConnectionError("no way to http://ada:secret@host/")
        self.got.append((step, dict(metrics)))

    def file(self, path: Path) -> None:
        self.got.append(path)

    def note(self, name: str, value: str) -> None:
        self.got.append((name, value))

    def end(self, failed: bool, wait_s: float) -> None:
        self.got.append((failed, wait_s))


def test_a_tracker_that_breaks_is_one_warning_and_the_others_go_on(caplog: pytest.LogCaptureFixture) -> None:
    good, bad = _Sink("good"), _Sink("bad", breaks=True)
    tracker = Relay(None, [bad, good], finish_timeout_s=30.0)
    with caplog.at_level(logging.WARNING, logger="cluster"):
        for step in (1, 2, 3):
            tracker.log({"reward/mean": 0.5}, step)
    tracker.model(MODEL)
    tracker.finish("KILLED")
    assert [message for message in caplog.messages if "takes nothing more" in message] == [
        "warning: bad takes nothing more (no way to http://***@host/): the run goes on without it"
    ]
    figures = [(step, {"reward/mean": 0.5}) for step in (1, 2, 3)]
    facts = [(f"checkpoint/{alias}", MODEL["folder"]) for alias in ("newest", "best")]
    assert good.got == [*figures, *facts, (True, 5.0)]  # a stopped run has little time
    assert bad.got == figures[:1] and tracker.location == "at bad; at good"


def _written(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())


def test_wandb_offline_keeps_figures_files_and_facts_and_no_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed: make trackers")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    monkeypatch.setattr("sys.argv", ["engram", "train", f"tracking.uri=http://ada:{SECRET}@host"])
    tracking = TrackingConfig(trackers=("wandb",), system_metrics_s=0)
    require_server(tracking, tmp_path)
    report = tmp_path / "report.md"
    report.write_text("# Gains")
    tracker = open_run(tracking, tmp_path, "tmem-1", PARAMS, "")
    tracker.log({"reward/mean": 0.625, "learner/loss": math.nan}, 1)
    tracker.artifact(report)
    tracker.dataset(DATA)
    tracker.model(MODEL)
    tracker.finish("FINISHED")
    assert tracker.run_id == "" and tracker.location.startswith(f"wandb sync {tmp_path / 'tmem-1' / 'wandb'}")
    (record,) = (tmp_path / "tmem-1").rglob("run-*.wandb")
    content = record.read_bytes()
    for text in ("reward/mean", "0.625", "train.steps", "report.md", "checkpoint/best", MODEL["folder"]):
        assert text.encode() in content, text
    assert SECRET.encode() not in _written(tmp_path)


def test_a_resumed_run_is_the_same_one_at_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed: make trackers")
    monkeypatch.setenv("WANDB_MODE", "offline")
    tracking = TrackingConfig(trackers=("wandb",), system_metrics_s=0)
    for _life in range(2):
        tracker = open_run(tracking, tmp_path, "tmem-1", PARAMS, "")
        tracker.log({"reward/mean": 0.5}, 3)  # the same step again, as after a resume
        tracker.finish("FAILED")
    names = {path.name for path in (tmp_path / "tmem-1").rglob("run-*.wandb")}
    assert names == {f"run-{(tmp_path / 'tmem-1' / 'wandb-id').read_text()}.wandb"}


def test_wandb_without_a_key_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb", reason="wandb is not installed: make trackers")
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    tracking = TrackingConfig(trackers=("wandb",))
    monkeypatch.setattr(others, "unreachable", lambda address: "Connection refused")
    with pytest.raises(TrackingError, match=r"api\.wandb\.ai: Connection refused; WANDB_MODE=offline keeps"):
        require_server(tracking, tmp_path)
    monkeypatch.setattr(others, "unreachable", lambda address: "")
    monkeypatch.setattr(wandb, "login", lambda prompt, verify: False)  # this machine may have a .netrc
    with pytest.raises(TrackingError, match="wandb has no key: set WANDB_API_KEY, or WANDB_MODE=offline"):
        require_server(tracking, tmp_path)


def test_trackio_keeps_figures_and_params(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read at its first import
    trackio = pytest.importorskip("trackio", reason="trackio is not installed: make trackers")
    tracking = TrackingConfig(trackers=("trackio",), experiment="engram-test")
    require_server(tracking, tmp_path)
    for life in range(2):
        tracker = open_run(tracking, tmp_path, "tmem-1", PARAMS, "")
        tracker.log({"reward/mean": 0.25 + life}, step=life)
        tracker.artifact(tmp_path)
        tracker.dataset(DATA)
        tracker.finish("FINISHED")
    assert capfd.readouterr().out == ""
    (run,) = trackio.Api().runs("engram-test")
    assert run.name == "tmem-1" and run.config["train.steps"] == "7"
