"""``evaluate`` on real Ray and vLLM: killed in the middle, as by a power cut, then resumed.

The tiny model is random and earns no score. Tested is that no finished episode runs again, and that the
report is complete.
"""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

SETTINGS = (
    "evaluation.tasks=6",
    "evaluation.bootstrap_samples=200",
    "memory.max_extract_tokens=16",
    "sampling.max_answer_tokens=6",
    "engine.slots=1",  # one episode after the other, so that the kill falls between two
    "engine.kv_cache_gib=0.2",
    "ray.object_store_gib=0.3",
    "rollout.threads=1",
)
ROWS = ("truncation", "tmem")


@pytest.fixture
def environment() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if key != "MLFLOW_TRACKING_URI"}


def played(folder: Path) -> dict[str, list[str]]:
    """The tasks that are on disk, by cell. A line or a file that is being written does not count."""
    tasks: dict[str, list[str]] = {}
    for path in sorted((folder / "cells").glob("*.json*")):
        if path.suffix not in (".json", ".jsonl"):
            continue
        if path.suffix == ".jsonl":
            parts = [json.loads(line) for line in path.read_text().split("\n")[1:-1]]
        else:
            parts = [json.loads(path.read_text())["result"]]
        tasks[path.stem] = [episode["task_id"] for part in parts for episode in part["episodes"]]
    return tasks


def wait_for(process: subprocess.Popen[str], runs: Path, enough: int, deadline_s: float) -> Path:
    """The folder of the evaluation, once ``enough`` episodes of its second cell are on disk."""
    limit = time.monotonic() + deadline_s
    while time.monotonic() < limit:
        assert process.poll() is None, process.communicate()
        for folder in runs.glob("quickstart-evaluate-*"):
            if len(played(folder).get("recall--tmem--seed0", ())) >= enough:
                return folder
        time.sleep(0.05)
    process.kill()
    raise AssertionError(f"no episode after {deadline_s:.0f} s: {process.communicate()}")


def test_a_killed_evaluation_resumes_with_what_is_missing(
    tiny_model_path: Path, tmp_path: Path, environment: dict[str, str]
) -> None:
    runs = tmp_path / "runs"
    evaluate = [sys.executable, "-m", "cluster", "evaluate"]
    asked = [
        *evaluate,
        "tests/quickstart.yaml",
        *SETTINGS,
        f"model.name={tiny_model_path}",
        f"output_dir={runs}",
        "--rows",
        ",".join(ROWS),
    ]
    process = subprocess.Popen(
        asked, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )
    folder = wait_for(process, runs, enough=1, deadline_s=300)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)

    before = played(folder)
    assert len(before["recall--truncation--seed0"]) == 6  # that cell was finished
    assert 1 <= len(before["recall--tmem--seed0"]) < 6
    finished = folder / "cells" / "recall--truncation--seed0.json"
    content, written = finished.read_bytes(), finished.stat().st_mtime_ns
    assert not (folder / "report").exists()

    again = subprocess.run(
        [*evaluate, "--resume", str(folder)],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
        check=False,
    )
    assert again.returncode == 0, again.stdout + again.stderr
    assert "2 row(s) x 1 benchmark(s) x 1 seed(s) = 2 cells; 1 done before" in again.stdout
    left = 6 - len(before["recall--tmem--seed0"])
    assert f"recall, tmem, seed 0, {left} episodes" in again.stdout
    assert "cell 2 of" not in again.stdout
    assert (finished.read_bytes(), finished.stat().st_mtime_ns) == (content, written)
    check_report(folder, again.stdout)

    changed = [*asked, "sampling.max_answer_tokens=7", "--resume", str(folder)]
    refused = subprocess.run(
        changed, capture_output=True, text=True, timeout=100, env=environment, check=False
    )
    assert refused.returncode == 2
    assert "was measured with sampling.max_answer_tokens=6, not 7" in refused.stderr
    assert refused.stderr.count("\n") == 1


def check_report(folder: Path, output: str) -> None:
    for cell in played(folder).values():
        assert cell == [f"recall-eval-0-{position}" for position in range(6)]
    saved = json.loads((folder / "cells" / "recall--tmem--seed0.json").read_text())
    first = saved["result"]["episodes"][0]
    assert first["peak_context"] > 0
    assert first["answers"][0]["question"]
    assert set(first["writes"]) == {"accepted", "empty", "rolled_back"}
    assert saved["peak"]["resident_bytes"] > 2**26 or saved["peak"]["problem"]
    with (folder / "report" / "report.csv").open() as file:
        measures = {(line["row"], line["measure"]) for line in csv.DictReader(file)}
    wanted = (
        "f1",
        "em",
        "prompt_tokens",
        "generated_tokens",
        "seconds",
        "peak_context",
        "kv_bytes",
        "memory_bytes",
        "writes_accepted",
    )
    assert {(row, measure) for row in ROWS for measure in wanted} <= measures
    report = (folder / "report" / "report.md").read_text()
    assert "| truncation | 6 |" in report
    assert "F1 against truncation" in report
    assert "recall: tmem against truncation: F1" in output
    assert {plot.name for plot in (folder / "report").glob("*.png")} == {
        "recall-cost-tokens.png",
        "recall-cost-seconds.png",
        "recall-rows.png",
    }
    client = MlflowClient(f"sqlite:///{folder.parent}/mlflow.db")
    run = client.get_run((folder / "tracking-run").read_text())
    assert run.info.status == "FINISHED"
    assert "eval/recall/tmem/f1" in run.data.metrics
    assert {file.path for file in client.list_artifacts(run.info.run_id)} >= {
        "report.md",
        "report.csv",
        "report.json",
        "recall-cost-tokens.png",
    }
