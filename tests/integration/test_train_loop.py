"""The whole circle on real parts: vLLM, DeepSpeed, Ray and MLflow train a tiny model; a checkpoint goes on.

The tiny model is random: it writes no parsable flashcard and earns no reward, so its advantages are made up.
What is tested is the circle.
"""

from __future__ import annotations

import asyncio
import io
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from mlflow.entities import Run
from mlflow.tracing.client import TracingClient
from mlflow.tracking import MlflowClient
from rich.console import Console
from transformers import AutoModelForCausalLM

from actors.types import TrajectoryGroup
from actors.worker import WorkerReport
from cluster.common.display import Display
from cluster.inspection.record import EpisodeRecord, list_records, load
from cluster.runs.checkpoint import Checkpoint, TrainState, list_checkpoints, load_checkpoint
from cluster.tracking.tracker import start_tracking
from cluster.train import run
from cluster.train.build import training_cluster
from cluster.train.prepare import RunFolder, RunSpec, Start, prepare_training
from cluster.train.scoreboard import evaluation_rows
from configs.load import load_config

SETTINGS = (
    "train.steps=2",
    "train.tasks_per_step=2",
    "train.group_size=2",
    "train.checkpoint_every=1",
    "objective.advantage=tests.integration.advantages:by_place",
    "warm_start.steps=1",
    "warm_start.tasks_per_step=2",
    "warm_start.learning_rate=1e-2",  # so high that the new weights can be told from the old ones
    "evaluation.tasks=2",
    "evaluation.bootstrap_samples=200",
    "memory.max_extract_tokens=24",
    "sampling.max_answer_tokens=8",
    "learner.trainable_layers=3",
    "engine.slots=4",
    "engine.kv_cache_gib=0.2",
    "ray.object_store_gib=0.5",
)


@dataclass(frozen=True)
class Trained:
    spec: RunSpec
    folder: RunFolder
    state: TrainState
    episode: TrajectoryGroup
    report: WorkerReport
    checkpoint: Checkpoint
    output: str


@pytest.fixture(scope="module")
def settings(tiny_model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return [*SETTINGS, f"model.name={tiny_model_path}", f"output_dir={tmp_path_factory.mktemp('runs')}"]


@pytest.fixture(scope="module")
def trained(settings: list[str]) -> Iterator[Trained]:
    """One run, with an episode played on its workers before they are ended."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        output = io.StringIO()
        config = load_config(Path("tests/quickstart.yaml"), settings)
        yield asyncio.run(train(*prepare_training(config), output))


async def train(spec: RunSpec, folder: RunFolder, start: Start, output: io.StringIO) -> Trained:
    display = Display(Console(file=output, width=160))
    tracker = start_tracking(spec.config, folder.path.parent, "test", folder.config, "")
    async with training_cluster(spec, folder, start) as cluster:
        state = await run.train_on(cluster, spec, folder, start, tracker, display)
        row = evaluation_rows(spec.config)["memory_off"]
        episode = await cluster.workers[0].episode(99, spec.eval_tasks[0], row)
        report = await cluster.workers[0].report()
    tracker.finish("FINISHED")
    checkpoint = load_checkpoint(list_checkpoints(folder.path)[-1])
    return Trained(spec, folder, state, episode, report, checkpoint, output.getvalue())


def tracked_run(trained: Trained) -> Run:
    return store(trained).get_run(trained.checkpoint.state.tracking_run_id)


def store(trained: Trained) -> MlflowClient:
    return MlflowClient(f"sqlite:///{trained.folder.path.parent}/mlflow.db")


def test_each_step_makes_a_version_that_the_worker_serves(trained: Trained) -> None:
    assert (trained.state.step, trained.state.warm_steps, trained.state.version) == (2, 1, 3)
    assert trained.report.version == 3
    # the warm start's, one after its row, the last step's; a late refresh skips the version between
    assert trained.report.refreshes in (3, 4)
    assert trained.episode.policy_version == 3


def largest_difference(trajectory_group: TrajectoryGroup, folder: Path) -> float:
    """Between the engine's log-probs of what it sampled and those of the model in ``folder``, in nats."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    differences = []
    for segment in trajectory_group.trajectories[0].segments:
        assert segment.revision == 0
        ids = torch.tensor(segment.token_ids, dtype=torch.long)[None]
        with torch.no_grad():
            logprobs = torch.log_softmax(model(ids).logits[0, :-1], dim=-1)
        ours = logprobs[torch.arange(ids.shape[1] - 1), ids[0, 1:]].numpy()
        mask = segment.action_mask[1:]
        differences.append(np.abs(ours[mask] - segment.logprobs[1:][mask]).max())
    return float(max(differences))


def test_after_the_broadcast_the_engine_has_the_learners_weights(trained: Trained) -> None:
    assert largest_difference(trained.episode, trained.checkpoint.model) <= 1e-3
    assert largest_difference(trained.episode, trained.spec.model_path) > 0.05  # no longer the base model's


def test_the_ledger_balances(trained: Trained) -> None:
    ledger = trained.checkpoint.state.ledger
    assert ledger.pending == ()
    assert ledger.settled == {"trained": 4}
    assert ledger.next_position == 4
    assert ledger.failures == {}


def test_the_tracked_run_is_complete(trained: Trained) -> None:
    tracked = tracked_run(trained)
    assert tracked.info.status == "FINISHED"
    assert tracked.data.params["warm_start.steps"] == "1"
    sections = {name.partition("/")[0] for name in tracked.data.metrics}
    of_training = {
        "Summary",
        "reward",
        "learner",
        "rollout",
        "fleet",
        "staleness",
        "sync",
        "fast_weights",
        "timing_s",
        "timeline",
        "perf",
    }
    assert sections - {"system"} == of_training | {"eval", "warm_start"}  # the system is looked at every 10 s
    assert tracked.data.metrics["sync/policy_version"] >= 3


def test_episodes_of_every_step_and_row_are_kept_and_traced(trained: Trained) -> None:
    kept = [load(path) for path in list_records(trained.folder.path)]
    assert sorted(
        (record.origin.step, record.origin.label) for record in kept if isinstance(record, EpisodeRecord)
    ) == [
        *[(0, "TMEM after warm start")] * 2,
        *[(0, "TMEM before")] * 2,
        *[(0, "memory off")] * 2,
        (1, ""),
        (2, ""),
        *[(2, "TMEM after RL")] * 2,
    ]
    for record in kept:
        assert isinstance(record, EpisodeRecord)
        first = {"": 1, "TMEM after warm start": 1, "TMEM after RL": 3}.get(record.origin.label, 0)
        # a step may learn from what the version before sampled
        assert first <= record.policy_version <= max(first, record.origin.step)
        assert any(passage.kind == "act" for segment in record.segments for passage in segment.passages)
    run, uri = tracked_run(trained), f"sqlite:///{trained.folder.path.parent}/mlflow.db"
    ours = f"metadata.`mlflow.sourceRun` = '{run.info.run_id}'"
    found = TracingClient(uri).search_traces(experiment_ids=[run.info.experiment_id], filter_string=ours)
    # the last row's two have only seconds to arrive, on a machine that may be busy
    assert len(kept) - 2 <= len(found) <= len(kept)


def test_the_user_sees_rows_progress_and_where_to_look(trained: Trained) -> None:
    for text in (
        "memory off",
        "TMEM before",
        "TMEM after warm start",
        "TMEM after RL",
        "mlflow ui --backend-store-uri sqlite:///",
        "NOT significant",
    ):
        assert text in trained.output
    assert trained.output.count("train step ") == 2  # one line a step where the output is no terminal
    report = json.loads((trained.folder.report / "report.json").read_text())
    assert [row["tasks"] for row in report["rows"]] == [2, 2, 2, 2]
    assert [row["policy_version"] for row in report["rows"]] == [0, 0, 1, 3]
    assert len(report["rewards"]) == 2


def test_a_checkpoint_goes_on_where_it_was_and_an_interrupt_says_how_to_go_on(
    trained: Trained, settings: list[str]
) -> None:
    """Resume for many more steps, and stop the process as Ctrl-C does once it has made one."""
    command = [
        sys.executable,
        "-m",
        "cluster",
        "train",
        "tests/quickstart.yaml",
        *settings,
        f"resume={trained.checkpoint.folder}",
        "train.steps=500",
    ]
    # in the background of a shell it is ignored, and a child process would ignore it too
    signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("train step 2/498"):  # the checkpoint of the step before is complete
            process.send_signal(signal.SIGINT)
            break
    rest, errors = process.communicate(timeout=300)
    output = "".join(lines) + rest
    assert process.returncode == 130, output + errors
    assert "Traceback" not in errors
    newest = load_checkpoint(list_checkpoints(trained.folder.path)[-1])
    assert f"saved: {newest.folder}" in output
    command = f"engram train {trained.folder.config} resume={newest.folder}"
    assert f"to go on: {command}" in output

    step = newest.state.step
    assert step >= 3
    assert newest.state.version == step + 1  # one warm-start step
    assert newest.state.ledger.settled == {"trained": 2 * step}
    assert newest.state.rewards[:2] == trained.state.rewards
    tracked = tracked_run(trained)
    assert tracked.info.status == "KILLED"
    history = store(trained).get_metric_history(tracked.info.run_id, "reward/mean")
    assert sorted(point.step for point in history)[:3] == [1, 2, 3]
