"""Twenty trainings start together in one new output folder: MLflow's store survives, each has its run."""

from __future__ import annotations

import os
from pathlib import Path

import mlflow.store.tracking.sqlalchemy_store  # noqa: F401  before the forks: once, not twenty times
import pytest
from mlflow.tracking import MlflowClient

from cluster.common.errors import InUseError
from cluster.common.folders import in_turn, require_writable
from cluster.runs.run_folders import create_run, runs_of
from cluster.tracking.tracker import open_run
from configs.schema import TrackingConfig

STARTS = 20


def start(output_dir: Path) -> None:
    require_writable(output_dir, "output_dir")
    run_dir = create_run(output_dir, "trial")
    tracker = open_run(TrackingConfig(system_metrics_s=0), output_dir, run_dir.name, {"seed": "0"}, "")
    tracker.log({"reward/mean": 0.5}, 1)
    tracker.finish("FINISHED")


def test_twenty_starts_in_a_new_folder(tmp_path: Path) -> None:
    output_dir = tmp_path / "new"
    children = []
    for _ in range(STARTS):
        child = os.fork()
        if child == 0:
            try:
                start(output_dir)
            except BaseException as error:  # a child must not go on with the tests
                print(f"{type(error).__name__}: {error}", flush=True)
                os._exit(1)
            os._exit(0)
        children.append(child)
    ends = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert ends == [0] * STARTS
    names = {run.name for run in runs_of(output_dir, "trial")}
    assert len(names) == STARTS
    client = MlflowClient(f"sqlite:///{output_dir / 'mlflow.db'}")
    (experiment,) = [each for each in client.search_experiments() if each.name == TrackingConfig().experiment]
    runs = client.search_runs([experiment.experiment_id])
    assert {run.info.run_name for run in runs} == names
    assert all(run.info.status == "FINISHED" and run.data.metrics["reward/mean"] == 0.5 for run in runs)


def test_who_holds_a_turn_for_too_long_is_said(tmp_path: Path) -> None:
    said = "another process has held it for 0.1 s"
    with in_turn(tmp_path), pytest.raises(InUseError, match=said), in_turn(tmp_path, longest_s=0.1):
        raise AssertionError("two hold the lock")
    with in_turn(tmp_path, longest_s=0.1):
        pass
