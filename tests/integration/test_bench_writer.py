"""`python -m cluster bench writer --quick` as a user calls it: tables, report, JSON and an MLflow run.

The writer's B equals the PEFT loop's.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cluster.cli import EXIT_OK, main

pytestmark = pytest.mark.slow


def test_the_command_measures_reports_and_tracks(
    tiny_model_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from mlflow.tracking import MlflowClient

    options = ["--quick", "--model", str(tiny_model_path), "--output-dir", str(tmp_path)]
    assert main(["bench", "writer", *options]) == EXIT_OK
    shown = capsys.readouterr().out
    assert "1 episode" in shown and "PEFT loop" in shown and "at least 5" in shown
    folder = next(tmp_path.glob("bench-*"))
    data = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    assert data["environment"]["quick"].startswith("yes") and data["environment"]["torch"]
    figures = data["benchmarks"]["writer"]["figures"]
    assert 0 < figures["difference_1"] <= 1e-6
    assert 0 < figures["difference_1_addressed"] <= 1e-6, "the loop has the same terms"
    assert figures["rate_share_1"] > 0
    names = [case["name"] for case in data["benchmarks"]["writer"]["cases"]]
    assert {"1 episode, addressed", "1 episode, cost"} <= set(names)
    wall = data["benchmarks"]["writer"]["cases"][0]
    assert len(wall["baseline_values"]) == len(wall["candidate_values"]) == 1
    assert wall["ratios"]["median"] == pytest.approx(wall["baseline_values"][0] / wall["candidate_values"][0])
    assert "| 1 episode | PEFT loop" in (folder / "report.md").read_text(encoding="utf-8")

    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    runs = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    assert [run.info.status for run in runs] == ["FINISHED"]
    assert runs[0].data.metrics["bench/writer/1_episode"] == pytest.approx(wall["ratios"]["median"])
    assert runs[0].data.params["quick"].startswith("yes")
    artifacts = {artifact.path for artifact in client.list_artifacts(runs[0].info.run_id)}
    assert artifacts >= {"report.md", "report.json"}
