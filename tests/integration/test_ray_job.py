"""``ray job submit --working-dir . -- python -m cluster train ...`` and the job commands, on a cluster of
their own.

`ray stop` kills all that looks like Ray, and Ray listens on fixed ports. So cluster and jobs live in process,
mount and network namespaces of their own (job_story.py), which end with the test. This needs root, and a
kernel that allows it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from cluster.runs.checkpoint import Checkpoint, list_checkpoints, load_checkpoint

# a cluster and two jobs, nearly all of it start-up
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]
UNSHARE = ("unshare", "--mount", "--pid", "--fork", "--mount-proc", "--net", "--kill-child")
STORY = Path(__file__).with_name("job_story.py")
STEPS = 4


@dataclass(frozen=True)
class Story:
    said: dict[str, list[object]]
    left: str
    folder: Path

    def text(self, what: str) -> str:
        """stdout and stderr of one command."""
        return "".join(str(part) for part in self.said[what][1:])

    @property
    def run_dir(self) -> Path:
        (run_dir,) = (self.folder / "runs").glob("quickstart-*/")
        return run_dir

    @property
    def newest(self) -> Checkpoint:
        return load_checkpoint(list_checkpoints(self.run_dir)[-1])


@pytest.fixture(scope="module")
def story(tiny_model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Story:
    if shutil.which(UNSHARE[0]) is None:
        pytest.skip("needs the command unshare (util-linux) to keep a Ray cluster apart from the machine")
    allowed = subprocess.run([*UNSHARE, "true"], capture_output=True, text=True, timeout=30, check=False)
    if allowed.returncode != 0:
        needs = "needs own process, mount and network namespaces, which this machine does not allow"
        pytest.skip(f"{needs}: {allowed.stderr.strip()}")
    folder = tmp_path_factory.mktemp("job")
    # Ray's sockets lie in it, and their paths may have 107 bytes.
    temporary = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
    try:
        command = [*UNSHARE, sys.executable, str(STORY), str(folder), str(tiny_model_path)]
        environment = {**os.environ, "RAY_STORY_TEMP": temporary, "PYTHONPATH": str(STORY.parents[2])}
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=1200, check=False
        )
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    assert done.returncode == 0, f"{done.stdout}{done.stderr}\n{(folder / 'story.json').read_text()}"
    said = json.loads((folder / "story.json").read_text())
    return Story(said, said.pop("left"), folder)


def test_a_job_is_stopped_in_good_order_and_the_same_submission_goes_on(story: Story) -> None:
    assert story.said["stop"][0] == 0 and "STOPPED" in story.text("stop")
    assert f"saved: {story.run_dir}/checkpoints/step-" in story.text("stop")
    log = story.text("first_log")
    assert "saved: " in log and "Traceback" not in log and f"train step {STEPS}/{STEPS}" not in log
    assert story.said["second"][0] == 0, story.text("second")
    assert "SUCCEEDED" in story.text("second")
    assert f"train step {STEPS}/{STEPS}" not in story.text("second")  # the first job did some of the steps
    assert story.newest.state.step == STEPS and story.newest.state.ledger.settled["trained"] == 2 * STEPS


def test_outputs_and_figures_of_both_jobs_are_where_they_were_wanted(story: Story) -> None:
    assert not (story.folder / "runs" / "mlflow.db").exists()  # MLFLOW_TRACKING_URI says otherwise
    run_id = story.newest.state.tracking_run_id
    run = MlflowClient(f"sqlite:///{story.folder}/elsewhere.db").get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.data.tags["mlflow.source.git.commit"] == "0123456789" and run.data.tags["ray_job"] == "first"
    assert run.data.params["ray.address"] == "auto" and run.data.params["rollout.resource"] == "rollout"


def test_the_cluster_shows_both_jobs_with_run_and_commit(story: Story) -> None:
    run_id = story.newest.state.tracking_run_id
    assert run_id in story.text("status") and "SUCCEEDED" in story.text("status")
    table = story.text("all")
    for expected in ("first", "second", "STOPPED", "SUCCEEDED", "01234567"):
        assert expected in table
    assert table.count(run_id[:8]) == 2  # one run, gone on with


def test_a_wrong_token_and_an_unknown_job_are_one_line(story: Story) -> None:
    status, out, errors = story.said["refused"]
    assert (status, out) == (1, "") and "--auth token" in str(errors)
    assert str(errors).startswith("error: ") and str(errors).count("\n") == 1
    status, out, errors = story.said["unknown"]
    assert (status, out) == (1, "") and str(errors).count("\n") == 1 and "knows no job third" in str(errors)
