"""Deterministic mode: a run that lost its learner, was killed and stopped ends with the same weights.

The mode: one worker, one thread each, train.max_staleness=0, float32 and engine.slots=1. With more slots
timing decides which requests share an engine step, and matrix products of other sizes may round
differently: nothing promises then that runs agree to the bit. Four real runs of vLLM, DeepSpeed, Ray and
MLflow on the tiny model. It earns no reward, so a KL term against the base model gives the gradient,
through what was sampled and through every bit of the fast weights in force.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import safetensors.torch
import torch
from mlflow.tracking import MlflowClient
from transformers import AutoModelForCausalLM

from cluster.runs.checkpoint import Checkpoint, best_checkpoint, list_checkpoints, load_checkpoint
from cluster.tracking.figure_file import read_figures
from tests.chaos.harness import LEARNER, command_line, descendants

# four lives, most of them start-up, on machines that may be busy
pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]

STEPS = 4
SETTINGS = (
    f"train.steps={STEPS}",
    "train.tasks_per_step=2",
    "train.group_size=2",
    "train.max_staleness=0",
    "train.checkpoint_every=2",
    "train.keep_checkpoints=1",
    "train.evaluate_every=2",
    "train.evaluate_tasks=1",
    "objective.kl_coefficient=0.5",
    "objective.advantage=tests.integration.advantages:by_place",  # the tiny model earns no reward
    "warm_start.steps=2",
    "warm_start.tasks_per_step=2",
    "warm_start.learning_rate=1e-2",
    "evaluation.tasks=1",
    "evaluation.memory_off_row=false",
    "evaluation.bootstrap_samples=100",
    "memory.policy=raw",  # it writes whatever the model says
    "sampling.max_answer_tokens=4",
    "learner.trainable_layers=3",
    "learner.threads=1",
    "rollout.threads=1",
    "engine.slots=1",
    "engine.kv_cache_gib=0.2",
    "ray.object_store_gib=0.3",
)


class Run:
    """``python -m cluster train`` as a process group of its own."""

    def __init__(self, settings: list[str], **more: object) -> None:
        command = [
            sys.executable,
            "-m",
            "cluster",
            "train",
            "tests/quickstart.yaml",
            *settings,
            *(f"{key}={value}" for key, value in more.items()),
        ]
        environment = {key: value for key, value in os.environ.items() if key != "MLFLOW_TRACKING_URI"}
        self.process = subprocess.Popen(
            command,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.output = ""

    def until(self, line: str) -> None:
        assert self.process.stdout is not None
        for text in self.process.stdout:
            self.output += text
            if text.startswith(line):
                return
        pytest.fail(f"no line {line!r} in\n{self.output}{self.process.communicate()[1]}")

    def end(self, with_signal: signal.Signals | None = None) -> int:
        if with_signal is not None:
            if with_signal == signal.SIGKILL:
                os.killpg(self.process.pid, with_signal)
            else:
                self.process.send_signal(with_signal)
        rest, errors = self.process.communicate(timeout=900)
        self.output += rest + errors
        return self.process.returncode


@dataclass(frozen=True)
class Story:
    """The checkpoints at the end of both runs, and what the interrupted run left behind each time."""

    output_dir: Path
    whole: Checkpoint
    interrupted: Checkpoint
    killed: list[str]
    stopped: Run
    after_stop: Checkpoint
    status_after_stop: str
    resumed: Run


@pytest.fixture(scope="module")
def story(tiny_model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    output_dir = tmp_path_factory.mktemp("runs")
    settings = [*SETTINGS, f"model.name={tiny_model_path}", f"output_dir={output_dir}"]
    whole = Run(settings, name="whole")
    assert whole.end() == 0, whole.output

    killed = Run(settings, name="interrupted")
    killed.until("train step 1/4")
    (rank,) = (pid for pid in descendants([killed.process.pid]) if command_line(pid).startswith(LEARNER))
    os.kill(rank, signal.SIGKILL)
    killed.until("the learner is lost (")
    killed.until("train step 3/4")  # step 1 was made twice
    time.sleep(0.5)  # into the fourth step
    assert killed.end(signal.SIGKILL) == -signal.SIGKILL
    (folder,) = output_dir.glob("interrupted-*/")
    left = [path.name for path in list_checkpoints(folder)]

    stopped = Run(settings, name="interrupted", resume="auto")
    stopped.until("train step 1/2")
    began = time.monotonic()
    status = stopped.end(signal.SIGTERM)
    assert status == 130, stopped.output
    # The learner's step and the writing take a second; the machine may be busy.
    assert time.monotonic() - began < 60
    after_stop = newest(folder)
    client = MlflowClient(f"sqlite:///{output_dir}/mlflow.db")
    status_after_stop = client.get_run(after_stop.state.tracking_run_id).info.status

    resumed = Run(settings, name="interrupted", resume="auto")
    assert resumed.end() == 0, resumed.output
    (other,) = output_dir.glob("whole-*/")
    ends = newest(other), newest(folder)
    yield Story(output_dir, *ends, left, stopped, after_stop, status_after_stop, resumed)


def newest(run_dir: Path) -> Checkpoint:
    return load_checkpoint(list_checkpoints(run_dir)[-1])


def test_killed_and_stopped_it_ends_with_the_same_weights_to_the_bit(story: Story) -> None:
    assert story.killed == ["step-000002"]  # step 3 was lost with the process, and taken again
    assert story.whole.state.step == story.interrupted.state.step == STEPS
    assert story.interrupted.state.learner_restarts == 1 and story.whole.state.learner_restarts == 0
    for file in (
        "model/model.safetensors",
        "optimizer/master.safetensors",
        "optimizer/exp_avg.safetensors",
        "optimizer/exp_avg_sq.safetensors",
    ):
        whole = safetensors.torch.load_file(story.whole.learner / file)
        other = safetensors.torch.load_file(story.interrupted.learner / file)
        assert whole.keys() == other.keys()
        assert [name for name in whole if not whole[name].equal(other[name])] == [], file
    first, last = (
        safetensors.torch.load_file(folder / "learner/optimizer/master.safetensors")
        for folder in list_checkpoints(story.whole.run_dir)
    )
    moved = [not first[name].equal(last[name]) for name in last if name.endswith("proj.weight")]
    assert moved and all(moved)  # RL moved them: equal means something


def test_every_step_of_both_runs_saw_the_same_engine(story: Story) -> None:
    """These figures contain the engine's log-probs. A step that was made twice gave the same twice.

    Step 1 was made again for the lost learner, steps 3 and 4 for the killed driver. MLflow has each step
    once, the run's folder each time that it was made.
    """
    client = MlflowClient(f"sqlite:///{story.output_dir}/mlflow.db")
    for key in (
        "learner/engine_logprob_diff_mean",
        "learner/ratio_mean",
        "learner/kl",
        "learner/grad_norm",
        "learner/entropy",
    ):
        whole, other = (
            client.get_metric_history(end.state.tracking_run_id, key)
            for end in (story.whole, story.interrupted)
        )
        expected = {point.step: point.value for point in whole}
        assert [point.step for point in other] == [point.step for point in whole] == [1, 2, 3, 4]
        assert {point.step: point.value for point in other} == expected, key
        made = [line for line in read_figures(story.interrupted.run_dir) if key in line.figures]
        assert len(made) > 4 and {line.step for line in made} == set(expected)
        unequal = [
            (line.step, line.figures[key]) for line in made if line.figures[key] != expected[line.step]
        ]
        assert unequal == [], key
        assert len(set(expected.values())) > 1


def test_the_ledger_balances_over_all_lives(story: Story) -> None:
    for end in (story.whole, story.interrupted):
        ledger = end.state.ledger
        assert ledger.settled == {"trained": 2 * STEPS} and ledger.next_position == 2 * STEPS
        assert ledger.pending == () and ledger.failures == {}
    assert story.whole.state.rewards == story.interrupted.state.rewards
    assert "THE LEDGER DOES NOT BALANCE" not in story.resumed.output
    assert "tasks: 8 issued: 8 trained, 0 in flight" in story.resumed.output


def test_sigterm_saves_the_last_step_and_says_how_to_go_on(story: Story) -> None:
    saved = story.after_stop
    assert saved.state.step in (3, 4) and saved.state.ledger.settled["trained"] == 2 * saved.state.step
    assert f"saved: {saved.folder}" in story.stopped.output
    command = f"engram train {saved.run_dir / 'config.yaml'} resume={saved.folder}"
    assert f"to go on: {command}" in story.stopped.output
    assert "Traceback" not in story.stopped.output
    assert story.status_after_stop == "KILLED"
    run_id = story.interrupted.state.tracking_run_id
    client = MlflowClient(f"sqlite:///{story.output_dir}/mlflow.db")
    assert run_id == saved.state.tracking_run_id and client.get_run(run_id).info.status == "FINISHED"
    assert [path for path in (saved.run_dir / "checkpoints").iterdir() if path.name.startswith(".")] == []


def test_the_best_checkpoint_is_kept_and_is_a_model_for_others(story: Story) -> None:
    for end in (story.whole, story.interrupted):
        best = best_checkpoint(end.run_dir)
        assert best is not None and best.name == "step-000002"  # the first of equal scores: all are 0
        assert [path.name for path in list_checkpoints(end.run_dir)] == ["step-000002", "step-000004"]
    model = AutoModelForCausalLM.from_pretrained(story.interrupted.model, dtype=torch.float32)
    theta = safetensors.torch.load_file(story.interrupted.learner / "model" / "model.safetensors")
    assert all(parameter.equal(theta[name]) for name, parameter in model.named_parameters())
    assert len(re.findall(r"step [24]: held-out F1 \d", story.resumed.output)) == 1
