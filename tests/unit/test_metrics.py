"""The timeline: where a step's time went, by arithmetic done by hand."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

import pytest

from actors.engine.policy import EngineStats
from actors.engine.step_loop import PHASES, Phase
from actors.episodes.group_summary import EpisodeSummary
from actors.worker import WorkerReport
from cluster.fleet.fleet import phase_seconds
from cluster.fleet.ledger import Ledger, LedgerSnapshot
from cluster.fleet.stream import Batch
from cluster.train.metrics import (
    StepSeconds,
    episode_timeline,
    learner_timeline,
    rollout_metrics,
    step_line,
    step_metrics,
    summarize,
    worker_timeline,
    write_metrics,
)
from learner.types import StepReport
from tests.unit.cluster_cases import finished_group, group, task_at, trajectory


def report(name: str, seconds: Mapping[Phase, float]) -> WorkerReport:
    stats = EngineStats(0, 0, 0, 0, 0, 0, 0.0, 0, 0, {phase: seconds.get(phase, 0.0) for phase in PHASES})
    return WorkerReport(name, 0, 0, 0, 0, 0.0, 0.0, 0.0, stats)


def by_name(*reports: WorkerReport) -> dict[str, WorkerReport]:
    return {worker.name: worker for worker in reports}


def test_the_workers_timeline_is_what_passed_between_two_reports_of_each() -> None:
    before = by_name(report("a", {"act": 5.0, "idle": 1.0}), report("b", {"act": 2.0}))
    after = by_name(
        report("a", {"act": 6.0, "idle": 1.0, "write": 2.0}), report("b", {"act": 2.0, "idle": 7.0})
    )
    timeline = worker_timeline(phase_seconds(before, after))
    assert set(timeline) == {f"timeline/worker_{phase}" for phase in PHASES}
    shares = {phase: timeline[f"timeline/worker_{phase}"] for phase in ("act", "write", "idle", "install")}
    assert shares == pytest.approx({"act": 0.1, "write": 0.2, "idle": 0.7, "install": 0.0})
    assert worker_timeline(phase_seconds(after, after)) == worker_timeline(phase_seconds({}, {})) == {}


def test_a_new_worker_and_one_that_began_anew_count_from_their_start() -> None:
    before = by_name(report("a", {"act": 50.0, "idle": 50.0}))
    after = by_name(report("a", {"act": 1.0}), report("b", {"extract": 3.0}))
    timeline = worker_timeline(phase_seconds(before, after))
    assert (timeline["timeline/worker_act"], timeline["timeline/worker_extract"]) == (0.25, 0.75)


def test_the_learners_and_the_episodes_views() -> None:
    learner = learner_timeline(StepSeconds(wait=5.0, learn=3.0, publish=1.0, total=10.0))
    shares = {"wait": 0.5, "learn": 0.3, "publish": 0.1, "other": 0.1}
    assert learner == pytest.approx({f"timeline/learner_{phase}": value for phase, value in shares.items()})
    episodes = [EpisodeSummary.of(trajectory(task_at(number), 0, 0.5)) for number in range(3)]
    timeline = episode_timeline(episodes)
    phases = ("act", "extract", "write", "install", "environment")
    assert set(timeline) == {f"timeline/episode_{phase}" for phase in phases}
    assert sum(timeline.values()) == pytest.approx(1.0)
    assert timeline["timeline/episode_act"] == pytest.approx(0.3 / 0.9)
    assert rollout_metrics(episodes)["timing_s/episode_extract"] == pytest.approx(0.2)
    assert episode_timeline([]) == {}


def test_a_figure_that_a_step_does_not_have_is_left_out() -> None:
    """No episode wrote, so there is no loss of a write."""
    groups = (finished_group(group(task_at(0), 0)),)
    values: dict[str, Any] = {field.name: 0 for field in fields(StepReport)} | {"tokens": 10}
    report, ledger = StepReport(**values), Ledger(LedgerSnapshot())
    figures = step_metrics(report, Batch((0,), groups, (0,), 0), StepSeconds(1.0, 1.0, 1.0, 4.0), ledger)
    assert figures["fast_weights/writes"] == 0.0 and "fast_weights/loss_before" not in figures
    assert all(math.isfinite(value) for value in figures.values())


def test_a_summary_has_no_tokens_and_the_same_figures_of_writes() -> None:
    """It travels to the controller with every group: preserved replies alone were more than all the rest."""
    written = trajectory(task_at(0), 0, 0.5, writes=("accepted", "rolled_back"))
    (reply,) = written.writes[0].preserved
    long = replace(reply, prompt_ids=tuple(range(1000, 2000)))
    records = tuple(replace(record, examples=(long,), preserved=(long,) * 30) for record in written.writes)
    summary = EpisodeSummary.of(replace(written, writes=records))
    assert "1001" not in repr(summary), "a token of a reply"
    assert write_metrics(summary.writes) == write_metrics(records)
    assert write_metrics(records)["fast_weights/preserved_kl"] == 0.25


def test_a_write_that_served_a_sibling_is_counted_apart() -> None:
    written = trajectory(task_at(0), 0, 0.5, writes=("accepted", "rolled_back", "empty"))
    served = replace(written, writes=tuple(replace(record, shared=True) for record in written.writes[:1]))
    batch = Batch(
        (0,), (finished_group(replace(group(task_at(0), 0), trajectories=(written, served))),), (0,), 0
    )
    values: dict[str, Any] = {field.name: 0 for field in fields(StepReport)} | {"tokens": 10}
    report, seconds = StepReport(**values), StepSeconds(1.0, 1.0, 1.0, 4.0)
    figures = step_metrics(report, batch, seconds, Ledger(LedgerSnapshot()))
    assert figures["fast_weights/writes"] == 4.0 and figures["fast_weights/shared"] == 1.0
    assert figures["perf/writes_per_s"] == 2 / 4.0  # neither the empty one nor the shared
    summary = summarize(1, report, batch, seconds)
    assert (summary.writes, summary.shared, summary.empty) == (1, 1, 1)
    assert "0.25 writes/s and 1 shared  1 without a card" in step_line(summary)
