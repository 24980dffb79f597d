"""`make gpu-smoke` on a CPU: its stages run to their end, and a failure is a line of its own.

kernels is in test_gpu_kernels.py. rl, a whole run, is in `make proof`; its GPU's settings are loaded here.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from configs.load import load_config
from tests.gpu import smoke, stages
from tests.gpu.parts import Report, make_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("smoke")
    make_model(made)
    return made


def measured(report: Report, *names: str) -> bool:
    assert "error" not in report, report["error"]
    return all(math.isfinite(report[name]) and report[name] > 0 for name in names)


@pytest.mark.slow
def test_an_engines_stage_in_its_own_process_has_every_figure_of_the_report(folder: Path) -> None:
    report = smoke.run_stage("eager", folder, limit_s=500)
    assert measured(report, "receipts_passed", "writes_per_s", "install_ms", "refresh_s", "refresh_gb_per_s")
    assert measured(report, "decode_none_tokens_per_s", "decode_adapters_tokens_per_s", "start_s")
    assert report["receipts_passed"] + report["receipts_unseen"] == 16


@pytest.mark.slow
def test_the_writer_writes_what_stock_peft_writes(folder: Path) -> None:
    report: Report = {}
    stages.writer(folder, report)
    assert measured(report, "writes_per_s", "peft_writes_per_s", "over_peft")
    assert report["float32_from_peft"] < 1e-3 and report["loss"][1] < report["loss"][0]


@pytest.mark.slow
def test_the_learner_makes_a_step(folder: Path) -> None:
    report: Report = {}
    stages.learner(folder, report)
    assert measured(report, "step_s", "grad_norm", "planned_gib")


def test_the_machine_and_its_software_are_named(tmp_path: Path) -> None:
    report: Report = {}
    stages.environment(tmp_path, report)
    assert {"machine", "accelerator", "commit", "torch", "triton", "cuda", "problems"} <= set(report)


def test_the_settings_of_the_rl_step_on_a_gpu_are_a_run_of_one_step_on_one_gpu() -> None:
    config = load_config(stages.ROOT / "tests" / "quickstart.yaml", [*stages.STEP, *stages.SHARED_GPU])
    assert config.train.steps == 1 and config.warm_start.steps == 0
    assert config.shares_gpus and config.model.dtype == config.learner.dtype == "bfloat16"
    assert config.ray.startup_timeout_s < smoke.STAGE_S


# --- what becomes of failures -------------------------------------------------------------------------------


def _breaks(folder: Path, report: Report) -> None:
    report["start_s"] = 1.0
    raise RuntimeError("no kernel image for this device")


def test_a_stage_that_fails_keeps_the_figures_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(smoke, "STAGES", {"eager": _breaks})
    monkeypatch.setattr(smoke.os, "_exit", lambda code: None)
    smoke.run_here("eager", tmp_path, tmp_path / "eager.json")
    written = json.loads((tmp_path / "eager.json").read_text())
    assert written == {"start_s": 1.0, "error": "RuntimeError: no kernel image for this device"}


def test_a_stage_that_takes_too_long_is_ended_and_says_so(tmp_path: Path) -> None:
    report = smoke.run_stage("eager", tmp_path, limit_s=0.2)
    assert report["stage"] == "eager" and report["error"].startswith("not done within 0 s")


SLOW = """
import subprocess, sys, time
from pathlib import Path
from tests.gpu import smoke

def slow(folder, report):
    report["start_s"] = 1.0
    child = subprocess.Popen([sys.executable, "-c", IGNORES])
    (folder / "child").write_text(str(child.pid))
    time.sleep(600)

IGNORES = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
smoke.STAGES = {"slow": slow}
smoke.main(sys.argv[1:])
"""


def test_a_stage_that_is_cut_off_keeps_its_figures_and_leaves_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(smoke, "COMMAND", (sys.executable, "-c", SLOW))
    wait = subprocess.Popen.wait

    def once_it_has_begun(process: subprocess.Popen[bytes], timeout: float | None = None) -> int:
        end = time.monotonic() + 120  # its imports take what they take
        while timeout == 0.5 and not (tmp_path / "child").exists() and time.monotonic() < end:
            time.sleep(0.05)
        return wait(process, timeout)

    monkeypatch.setattr(subprocess.Popen, "wait", once_it_has_begun)
    report = smoke.run_stage("slow", tmp_path, limit_s=0.5)
    assert report["start_s"] == 1.0 and report["error"].startswith("not done within 0 s")
    child, end = int((tmp_path / "child").read_text()), time.monotonic() + 60
    while _lives(child):
        assert time.monotonic() < end, "what the stage started lives on"
        time.sleep(0.05)


def _lives(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False


def _reports(*words: str, run: Callable[..., Report], capsys: pytest.CaptureFixture[str]) -> list[Report]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(smoke, "run_stage", run)
        patch.setattr(smoke, "make_model", lambda folder: None)
        assert smoke.main(list(words)) == 1
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_stages_go_on_after_a_failure_and_all_are_lines(capsys: pytest.CaptureFixture[str]) -> None:
    def run(name: str, folder: Path, limit_s: float) -> Report:
        assert 0 < limit_s <= smoke.STAGE_S
        return {"stage": name} | ({"error": "broken"} if name == "kernels" else {})

    reports = _reports(run=run, capsys=capsys)
    assert [report["stage"] for report in reports] == list(smoke.STAGES)
    assert [report["stage"] for report in reports if "error" in report] == ["kernels"]


def test_a_stage_that_has_no_time_left_is_not_started(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(smoke, "TOTAL_S", smoke.LEAST_S - 1)
    never: Callable[..., Report] = pytest.fail
    (report,) = _reports("graphs", run=never, capsys=capsys)
    assert report["stage"] == "graphs" and report["error"].startswith("not started")


def test_a_stage_that_is_not_known_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert smoke.main(["graph"]) == 2
    assert capsys.readouterr().err.startswith("no stage graph; there are environment, kernels, writer")
