"""The short form of chaos: a run is struck again and again, scaled, loses its learner, and is resumed.

`make chaos` plays each fault by itself, at seeded random times (trials.py). Real parts: Ray, vLLM, the
writer, DeepSpeed, MLflow, on a tiny model.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from cluster.cli import main
from tests.chaos.harness import LEARNER, WORKER, Books, Run, check_finished, checkpoint_state, stored

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
        struck = Run(
            folder, [*settings, "train.steps=1000", "train.checkpoint_every=1", "train.learner_retries=0"]
        )
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
    run.wait_for("^train step 1/")
    assert main(["scale", "2", "--output-dir", str(run.folder / "runs")]) == 0
    run.inflict("nan_write")
    # Two steps: the group with this write is trained on before a group is lost.
    trained = run.wait_for("^train step", run.wait_for("^train step", len(run.lines)))
    run.inflict("nan_reward")
    served = run.wait_for("^worker-1 serves version")
    run.wait_for("^train step", trained)
    os.kill(run.processes(WORKER)[0], 9)
    run.inflict("engine")  # of the other worker: for a moment none is left
    for worker in ("worker-2", "worker-3"):
        run.wait_for(f"^{worker} serves version", served)
    assert main(["scale", "1", "--output-dir", str(run.folder / "runs")]) == 0
    ended = run.wait_for("has ended: 1 workers are wanted", served)
    # Two steps: then the checkpoint of the first is complete, the losses included.
    run.wait_for("^train step", run.wait_for("^train step", ended))
    run.kill(LEARNER)
    return run.end()


def test_lost_workers_are_replaced_and_the_fleet_scales_while_training(story: Story) -> None:
    """One was killed, the other's engine failed."""
    lines = story.struck.lines
    lost = [line for line in lines if " is lost (" in line]
    assert len(lost) == 2
    assert any("chaos: the engine's step fails" in line for line in lost)
    assert any("died during" in line for line in lost)
    assert "2 rollout workers are wanted, there were 1" in lines
    assert "1 rollout workers are wanted, there were 2" in lines
    assert sum(" serves version" in line for line in lines) == 3
    assert story.books.reissued >= 2
    assert story.books.recovered + story.books.restarted >= 2, "the siblings of a lost group"


def test_a_learner_that_may_not_start_again_ends_the_run_with_one_line_that_says_how_to_go_on(
    story: Story,
) -> None:
    assert story.status == 1
    assert "a rank's process died" in story.struck.one_line()
    assert any(line.startswith("to go on: engram train") for line in story.struck.lines)


def test_the_run_goes_on_to_its_end_and_every_task_is_accounted_for(story: Story) -> None:
    """check_finished adds: groups of one version each, fresh; no failed receipt; one MLflow run."""
    assert story.resumed.process.returncode == 0
    assert story.books.settled["trained"] == 2 * story.steps


def test_a_nan_reward_is_a_failed_episode_and_a_nan_write_is_rolled_back(story: Story) -> None:
    assert story.books.failed.get("environment") == 1
    figures, _, _ = stored(story.resumed.folder / "runs" / "mlflow.db")
    assert max(figures["fast_weights/rolled_back"]) >= 1
