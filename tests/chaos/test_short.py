"""The short form of chaos: a run is struck again and again, scaled, loses learner, driver and Ray.

It is resumed then.

`make chaos` plays each fault by itself, at seeded random times (trials.py). Real parts: Ray, vLLM, the
writer, DeepSpeed, MLflow, on a tiny model.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from cluster.cli import main
from tests.chaos.harness import (
    GCS,
    LEARNER,
    WORKER,
    Books,
    Run,
    check_finished,
    checkpoint_state,
    children,
    stored,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@dataclass(frozen=True)
class Story:
    struck: Run
    status: int
    resumed: Run
    steps: int
    books: Books


@pytest.fixture(scope="module")
def story(tiny_model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    folder = tmp_path_factory.mktemp("chaos")
    settings = [f"model.name={tiny_model_path}", "rollout.recover_episodes=true"]
    struck = resumed = None
    try:
        struck = Run(folder, [*settings, "train.steps=1000", "train.checkpoint_every=1", "--supervise=1"])
        status = _strike(struck)
        steps = checkpoint_state(folder)["step"] + 2
        resumed = Run(folder, [*settings, f"train.steps={steps}", "resume=auto"])
        resumed.end()
        yield Story(struck, status, resumed, steps, check_finished(resumed, steps))
    finally:
        for run in (struck, resumed):
            if run is not None:
                run.destroy()


def _strike(run: Run) -> int:
    run.wait_for("^evaluate TMEM before: 1 to do")
    run.kill(WORKER)
    run.wait_for("^train step 1/")
    assert main(["scale", "2", "--output-dir", str(run.folder / "runs")]) == 0
    run.inflict("nan_write")
    # Two steps: the group with this write is trained on before a group is lost.
    trained = run.wait_for("^train step", run.wait_for("^train step", len(run.lines)))
    run.inflict("nan_reward")
    served = run.wait_for("^worker-2 serves version")
    run.wait_for("^train step", trained)
    os.kill(run.processes(WORKER)[0], 9)
    run.inflict("engine")  # of the other worker: for a moment none is left
    for worker in ("worker-3", "worker-4"):
        run.wait_for(f"^{worker} serves version", served)
    assert main(["scale", "1", "--output-dir", str(run.folder / "runs")]) == 0
    ended = run.wait_for("has ended: 1 workers are wanted", served)
    # Two steps: then the checkpoint of the first is complete, the losses included.
    run.wait_for("^train step", run.wait_for("^train step", ended))
    run.kill(LEARNER)
    back = run.wait_for(r"^the learner is lost \(")
    # The third step: that of the restored weights, and then one whose groups were sampled under new ones.
    for _ in range(3):
        back = run.wait_for("^train step", back)
    (driver,) = children(run.process.pid)
    os.kill(driver, 9)
    again = run.wait_for("^train step", run.wait_for(r"^the training's process died \(SIGKILL\)", back))
    run.kill(GCS)
    run.wait_for("and 1 restart.* were allowed", again)
    return run.end()


def test_lost_workers_are_replaced_and_the_fleet_scales_while_training(story: Story) -> None:
    """One was killed, the other's engine failed."""
    lines = story.struck.lines
    learner = next(place for place, line in enumerate(lines) if line.startswith("the learner is lost"))
    of_workers = lines[:learner]
    lost = [line for line in of_workers if " is lost (" in line]
    assert len(lost) == 3  # the first one in the evaluation before training
    assert any("chaos: the engine's step fails" in line for line in lost)
    assert any("died during" in line for line in lost)
    assert "2 rollout workers are wanted, there were 1" in lines
    assert "1 rollout workers are wanted, there were 2" in lines
    assert sum(bool(re.match(r"worker-\d serves( version|$)", line)) for line in of_workers) == 4
    assert story.books.reissued >= 2
    assert story.books.recovered + story.books.restarted >= 2, "the siblings of a lost group"


def test_a_learner_that_is_killed_starts_again_while_the_workers_stay_up(story: Story) -> None:
    lines = story.struck.lines
    lost = next(place for place, line in enumerate(lines) if line.startswith("the learner is lost"))
    died = next(place for place, line in enumerate(lines) if line.startswith("the training's process died"))
    assert "a rank's process died" in lines[lost] and "it starts again from " in lines[lost]
    assert [
        line for line in lines[lost + 1 : died] if " is lost (" in line
    ] == []  # no worker, and no second time
    state = checkpoint_state(story.resumed.folder)
    assert state["learner_restarts"] == 1 and state["lost_versions"] >= 1
    figures, _, _ = stored(story.resumed.folder / "runs" / "mlflow.db")
    assert {0.0, 1.0} == {*figures["learner/restarts"]}


def test_a_driver_that_is_killed_is_started_again_and_a_dead_gcs_is_one_line(story: Story) -> None:
    """The second death is the last: one restart was allowed."""
    assert story.status == 1
    assert "restart 1 of 1 in 1 s" in "".join(story.struck.lines)
    assert "Ray's GCS at " in story.struck.one_line() and "died" in story.struck.one_line()
    assert any(line.startswith("to go on: engram train") for line in story.struck.lines)


def test_the_run_goes_on_to_its_end_and_every_task_is_accounted_for(story: Story) -> None:
    """check_finished adds: groups of one version each, fresh; no failed receipt; one MLflow run."""
    assert story.resumed.process.returncode == 0
    assert story.books.settled["trained"] == 2 * story.steps


def test_a_nan_reward_is_a_failed_episode_and_a_nan_write_is_rolled_back(story: Story) -> None:
    assert story.books.failed.get("environment") == 1
    figures, _, _ = stored(story.resumed.folder / "runs" / "mlflow.db")
    assert max(figures["fast_weights/rolled_back"]) >= 1
