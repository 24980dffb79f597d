"""Traces, data, models and machine metrics in a real MLflow store (sqlite), and a store that is away."""

from __future__ import annotations

import json
import math
import shutil
import time
from dataclasses import replace
from pathlib import Path

import mlflow
import pytest
from mlflow.entities import SpanStatusCode
from mlflow.tracing.client import TracingClient
from mlflow.tracking import MlflowClient

from actors.types import Answer, FailedEpisode, Flashcard, Outcome, Timings, WriteExample, WriteRecord
from cluster.inspection.record import (
    EpisodeRecord,
    Origin,
    Passage,
    SegmentRecord,
    WriteEntry,
    describe_failure,
)
from cluster.inspection.traces import EpisodeTraces, steps_of
from cluster.runs.checkpoint import kept_models
from cluster.tracking.outbox import Entity
from cluster.tracking.registry import dataset_values
from cluster.tracking.sender import MlflowRun
from cluster.tracking.system_metrics import SystemMetrics
from cluster.tracking.tracker import MlflowTracker, start_tracking, store_uri
from configs.schema import ConversationConfig, EnvironmentConfig, RunConfig, TrackingConfig

CONFIG = RunConfig(name="quick", tracking=TrackingConfig(system_metrics_s=0))


@pytest.fixture(scope="module")
def output_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("entities")
    (folder / "config.yaml").write_text("seed: 0\n")
    return folder


@pytest.fixture(scope="module")
def uri(output_dir: Path) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        return store_uri(CONFIG.tracking, output_dir)


@pytest.fixture
def tracker(output_dir: Path, uri: str, monkeypatch: pytest.MonkeyPatch) -> MlflowTracker:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    tracker = start_tracking(CONFIG, output_dir, "run", output_dir / "config.yaml", "")
    assert isinstance(tracker, MlflowTracker)
    return tracker


def write(after: int, revision: int, outcome: str, reason: str) -> WriteEntry:
    empty = outcome == "empty"
    log = WriteRecord(
        revision=revision,
        examples=() if empty else (WriteExample((1, 2), (3,)),),
        flashcards=() if empty else (Flashcard("Who moved?", "Nora"),),
        extraction=f"cards {after}",
        rejected_flashcards=1,
        prompt_tokens=2,
        answer_tokens=1,
        loss_before=math.nan if empty else 3.5,
        loss_after=math.nan if empty else 0.5,
        steps=0 if empty else 15,
        seconds=0.0 if empty else 0.2,
        outcome=outcome,  # type: ignore[arg-type]
        reason=reason,
    )
    return WriteEntry(after, log, ("what?",), "passed" if outcome == "accepted" else "none")


def context(number: int, revision: int, kind: str) -> SegmentRecord:
    said = Passage(kind, 6, 10, f"cards {number}" if kind == "extract" else "Nora")  # type: ignore[arg-type]
    return SegmentRecord(
        revision,
        tuple(range(10)),
        (Passage("system", 0, 2, "Remember."), Passage("user", 2, 6, f"session {number}"), said),
    )


EPISODE = EpisodeRecord(
    origin=Origin("quick-1", "train", "", 12, "worker-0", "smollm2-135m", "parametric", "settings-0.yaml"),
    task_id="recall-7",
    environment="recall",
    episode_id="train-44.1",
    policy_version=11,
    basis_id="b",
    segments=(
        context(0, 0, "extract"),
        context(1, 1, "extract"),
        context(2, 1, "extract"),
        context(3, 1, "act"),
    ),
    writes=(
        write(0, 1, "accepted", ""),
        write(1, 1, "rolled_back", "the loss rose"),
        write(2, 1, "empty", "no JSON array in the text"),
    ),
    memory_events={},
    outcome=Outcome(
        0.5, {"f1": 0.5}, (Answer("Who moved?", ("Nora",), "Nora", "move", {"f1": 1.0, "em": 1.0}),)
    ),
    siblings=(0.5, 0.0),
    stop_reason="done",
    timings=Timings(total=4.0, act=0.4, extract=1.2, write=1.0, install=0.4, environment=1.0),
    ended=1.8e9,
)


def test_an_episode_is_told_in_order_and_its_phases_add_up() -> None:
    steps = steps_of(EPISODE)
    assert [step.name for step in steps] == ["observe", "extract", "write"] * 3 + [
        "observe",
        "act",
        "answer",
        "reward",
    ]
    seconds = {
        name: sum(step.wait + step.seconds for step in steps if step.name == name)
        for name in ("observe", "extract", "write", "act")
    }
    assert seconds == pytest.approx({"observe": 1.0, "extract": 1.2, "write": 1.0, "act": 0.4})
    # A write is as long as its writer measured, however long it waited; an empty one takes no time.
    assert [step.seconds for step in steps if step.name == "write"] == [0.2, 0.2, 0.0]
    assert sum(inner.seconds for step in steps for inner in step.inside) == pytest.approx(0.4)


def test_a_trace_of_the_run_holds_the_episode(tracker: MlflowTracker, uri: str) -> None:
    failure = describe_failure(
        FailedEpisode("recall-8", "train-45.0", "receipt", "the engine does not act as the writer computed"),
        11,
        EPISODE.origin,
    )
    before = mlflow.get_tracking_uri()
    traces = EpisodeTraces(uri, tracker.run_id)
    traces.records.submit(EPISODE)
    traces.records.submit(failure)
    traces.close(60)
    tracker.finish("FINISHED")
    assert (traces.records.done, traces.records.lost) == (2, 0)
    assert mlflow.get_tracking_uri() == before  # no state of the process is touched
    experiment = MlflowClient(uri).get_run(tracker.run_id).info.experiment_id
    traces_held = TracingClient(uri).search_traces(
        experiment_ids=[experiment], filter_string=f"metadata.`mlflow.sourceRun` = '{tracker.run_id}'"
    )
    assert len(traces_held) == 2
    trace, failed = sorted(traces_held, key=lambda trace: str(trace.info.state))[::-1]
    assert trace.info.trace_metadata["mlflow.sourceRun"] == tracker.run_id
    spans = trace.data.spans
    context = ("observe", "extract", "write")
    answered = ("observe", "act", "answer", "reward")
    assert [span.name for span in spans] == ["recall-7", *context, "receipt", *context, *context, *answered]
    root = spans[0]
    assert root.parent_id is None and all(span.parent_id for span in spans[1:])
    assert all(
        root.start_time_ns <= span.start_time_ns <= span.end_time_ns <= root.end_time_ns for span in spans
    )
    by_name = {span.name: span for span in reversed(spans)}  # the first of each
    assert by_name["extract"].inputs == {
        "messages": [
            {"role": "system", "content": "Remember."},
            {"role": "user", "content": "session 0"},
        ]
    }
    usage = {"input_tokens": 6, "output_tokens": 4, "total_tokens": 10}
    assert by_name["extract"].get_attribute("mlflow.chat.tokenUsage") == usage
    assert by_name["extract"].outputs == {
        "choices": [{"message": {"role": "assistant", "content": "cards 0"}}],
        "flashcards": [{"question": "Who moved?", "answer": "Nora"}],
        "unused": ["what?"],
    }
    assert by_name["write"].outputs["loss_before"] == 3.5 and by_name["write"].outputs["loss_after"] == 0.5
    assert by_name["write"].get_attribute("steps") == 15
    assert by_name["receipt"].outputs == {"receipt": "passed"}
    assert by_name["receipt"].parent_id == by_name["write"].span_id
    assert by_name["answer"].inputs["gold"] == ["Nora"]
    assert by_name["reward"].outputs == {"reward": 0.5, "parts": {"f1": 0.5}, "siblings": [0.5, 0.0]}
    writes = [span for span in spans if span.name == "write"]
    assert [span.outputs["outcome"] for span in writes] == ["accepted", "rolled_back", "empty"]
    codes = [span.status.status_code for span in writes]
    assert codes == [SpanStatusCode.OK, SpanStatusCode.ERROR, SpanStatusCode.OK]
    assert writes[1].status.description == "the loss rose"
    assert writes[2].outputs["loss_after"] is None  # there is none: no NaN in the store
    info = trace.info
    assert (info.tags["mlflow.traceName"], info.tags["engram.reward"]) == ("recall-7", "0.5")
    assert info.tags["engram.writes"] == "1/1/1" and info.token_usage["output_tokens"] == 16
    assert info.trace_metadata["mlflow.trace.session"] == "recall-7, train, step 12"
    found = {each.name: each for each in info.assessments}
    assert {name: each.value for name, each in found.items()} == {
        "reward": 0.5,
        "f1": 1.0,
        "em": 1.0,
        "answer": "right",
        "expected_response": "Nora",
    }
    assert found["answer"].span_id == found["expected_response"].span_id == by_name["answer"].span_id
    assert found["reward"].source.source_id == "environment recall"
    assert [span.name for span in failed.data.spans] == ["recall-8"]
    assert failed.data.spans[0].outputs == {
        "failed": "receipt",
        "message": "the engine does not act as the writer computed",
    }


def test_a_store_that_is_away_costs_traces_which_are_counted(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    traces = EpisodeTraces("http://127.0.0.1:9", "0" * 32)
    began = time.monotonic()
    for number in range(100):
        traces.records.submit(replace(EPISODE, episode_id=f"train-44.{number}"))
    assert time.monotonic() - began < 1  # who adds never waits
    traces.close(60)
    assert (traces.records.done, traces.records.lost) == (0, 100)
    (warning,) = (line.getMessage() for line in caplog.records if "episode traces" in line.getMessage())
    assert "http://127.0.0.1:9 did not take 100 episode traces" in warning


def test_the_data_of_a_run_are_its_inputs(tracker: MlflowTracker, uri: str, tmp_path: Path) -> None:
    recall = EnvironmentConfig()
    talks = tmp_path / "talks.json"
    talks.write_text("[]")
    conversation = EnvironmentConfig(name="conversation", conversation=ConversationConfig(path=str(talks)))
    tracker.dataset(dataset_values(recall, "training"))
    tracker.dataset(dataset_values(recall, "evaluation"))
    tracker.dataset(dataset_values(conversation, "evaluation"))
    first = dataset_values(conversation, "evaluation")
    talks.write_text("[1]")
    changed = dataset_values(conversation, "evaluation")
    assert changed["digest"] != first["digest"]  # the content counts, not the name
    tracker.finish("FINISHED")
    inputs = MlflowClient(uri).get_run(tracker.run_id).inputs.dataset_inputs
    contexts = {
        (source.dataset.name, tag.value)
        for source in inputs
        for tag in source.tags
        if tag.key == "mlflow.data.context"
    }
    assert ("conversation talks.json", "evaluation") in contexts and ("recall", "training") in contexts
    (files,) = (source.dataset for source in inputs if source.dataset.source_type == "local")
    assert files.name == "conversation talks.json"
    assert json.loads(files.source) == {"uri": str(talks)}


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """Two checkpoints without their weights, the older one the better."""
    ledger = {"next_position": 4, "pending": [], "settled": {}, "failures": {}, "reissued": 0}
    for step, f1 in ((5, 0.5), (10, 0.25)):
        folder = tmp_path / "quick-1" / "checkpoints" / f"step-{step:06d}"
        (folder / "learner" / "model").mkdir(parents=True)
        (folder / "learner" / "model" / "config.json").write_text("{}")
        state = {
            "format": "engram-run-1",
            "written": 100.0 + step,
            "step": step,
            "warm_steps": 1,
            "version": step + 1,
            "rewards": [],
        }
        (folder / "state.json").write_text(json.dumps({**state, "ledger": ledger, "tracking_run_id": ""}))
        (folder / "evaluation.json").write_text(json.dumps({"f1": f1, "tasks": 8}))
    return tmp_path / "quick-1"


def test_kept_checkpoints_are_models_with_aliases_and_come_once(
    tracker: MlflowTracker, uri: str, run_dir: Path
) -> None:
    damaged = run_dir / "checkpoints" / "step-000007" / "state.json"
    damaged.parent.mkdir()
    damaged.write_text("{")
    models = kept_models(CONFIG, run_dir)
    for values in models:
        tracker.model(values)
    tracker.finish("FINISHED")
    client = MlflowClient(uri)
    again = MlflowRun(client, client.get_run(tracker.run_id)).take(
        [Entity("model", models[0])], in_doubt=True
    )
    assert again == []  # as after an outage
    run = client.get_run(tracker.run_id)
    logged = client.search_logged_models(
        [run.info.experiment_id], filter_string=f"source_run_id = '{tracker.run_id}'"
    )
    assert sorted(model.name for model in logged) == ["quick-1-step-000005", "quick-1-step-000010"]
    best = client.get_model_version_by_alias("engram-quick", "best")
    newest = client.get_model_version_by_alias("engram-quick", "newest")
    assert (best.tags["engram.step"], newest.tags["engram.step"]) == ("5", "10")
    assert best.tags["engram.folder"] == str(run_dir / "checkpoints" / "step-000005")
    assert best.run_id == tracker.run_id
    assert len(client.search_model_versions("name = 'engram-quick'")) == 2
    (model,) = (model for model in logged if model.name == "quick-1-step-000005")
    assert (
        model.status == "READY"
        and model.params["policy_version"] == "6"
        and model.tags["engram.held_out_f1"] == "0.500000"
    )
    assert kept_models(replace(CONFIG, tracking=TrackingConfig(models="off")), run_dir) == []


def test_a_model_of_a_run_with_rewards_alone_tells_its_score(
    tracker: MlflowTracker, uri: str, run_dir: Path
) -> None:
    for score in run_dir.glob("checkpoints/*/evaluation.json"):
        score.write_text(json.dumps({"reward": 0.75, "tasks": 8}))
    tracker.model(kept_models(CONFIG, run_dir)[0])
    tracker.finish("FINISHED")
    client = MlflowClient(uri)
    experiment = client.get_run(tracker.run_id).info.experiment_id
    models = client.search_logged_models([experiment])  # other tests have models in this store too
    (model,) = [each for each in models if each.source_run_id == tracker.run_id]
    assert model.tags["engram.held_out_reward"] == "0.750000"


def test_a_model_that_is_uploaded_can_be_loaded(
    tracker: MlflowTracker, uri: str, run_dir: Path, tiny_model_path: Path
) -> None:
    weights = run_dir / "checkpoints" / "step-000010" / "learner" / "model"
    shutil.rmtree(weights)
    shutil.copytree(tiny_model_path, weights)
    upload = replace(CONFIG, name="uploaded", tracking=TrackingConfig(models="upload"))
    tracker.model(kept_models(upload, run_dir)[-1])
    tracker.finish("FINISHED")
    mlflow.set_tracking_uri(uri)
    try:
        loaded = mlflow.transformers.load_model(
            "models:/engram-uploaded@newest", return_type="components", device="cpu"
        )
    finally:
        mlflow.set_tracking_uri(None)
    assert type(loaded["model"]).__name__ == "LlamaForCausalLM"
    assert loaded["tokenizer"]("Who?")["input_ids"]
    assert not list(run_dir.glob(".upload-*"))


def test_the_machines_figures_come_with_steps_that_go_on_after_a_resume() -> None:
    seen: list[tuple[dict[str, float], int]] = []
    began = time.time() - 36000
    for interval_s in (0.02, 0.05):  # of a run and of the one that resumes it
        looking = SystemMetrics(lambda figures, step: seen.append((dict(figures), step)), interval_s, began)
        looking.start()
        deadline, count = time.monotonic() + 20, len(seen)
        while len(seen) < count + 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        looking.end()
        assert not looking.is_alive()
    steps = [step for _, step in seen]
    assert len(seen) >= 4 and steps == sorted(steps) and 36000 <= steps[0] <= steps[-1] <= 36060
    assert {"system/cpu_utilization_percentage", "system/system_memory_usage_megabytes"} <= set(seen[1][0])
    assert all(math.isfinite(value) for figures, _ in seen for value in figures.values())
