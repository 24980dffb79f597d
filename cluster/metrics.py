"""Pure functions from what a step produced to the figures that the tracker logs. The section before "/" is the chart group in MLflow."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np

from actors.types import Timings, Trajectory, TrajectoryGroup, WriteRecord
from actors.worker import WorkerReport
from cluster.stream import Batch, Ledger
from learner.types import StepReport, WarmStartReport


@dataclass(frozen=True, slots=True)
class StepSeconds:
    """Wall seconds of one loop step: waiting for groups, learner step, weights out of the learner, and all of it."""

    wait: float
    learn: float
    publish: float
    total: float


@dataclass(frozen=True, slots=True)
class StepSummary:
    """One step as the progress line shows it. ``staleness`` is the batch's mean in policy versions."""

    step: int
    version: int
    reward: float
    staleness: float
    episodes: int
    writes: int
    failed: int
    seconds: float

    @property
    def episodes_per_second(self) -> float:
        return self.episodes / self.seconds if self.seconds > 0 else 0.0

    @property
    def writes_per_second(self) -> float:
        return self.writes / self.seconds if self.seconds > 0 else 0.0


def summarize(step: int, report: StepReport, batch: Batch, seconds: StepSeconds) -> StepSummary:
    trajectories = _trajectories(batch.groups)
    return StepSummary(
        step=step,
        version=report.version,
        reward=_mean([trajectory.outcome.reward for trajectory in trajectories]),
        staleness=_mean(batch.staleness),
        episodes=len(trajectories),
        writes=sum(len(trajectory.writes) for trajectory in trajectories),
        failed=sum(len(group.failed) for group in batch.groups),
        seconds=seconds.total,
    )


def step_metrics(report: StepReport, batch: Batch, seconds: StepSeconds, ledger: Ledger) -> dict[str, float]:
    """Everything logged for one RL step. Values that do not exist in this step (no write, no forward) are left out, never 0."""
    trajectories = _trajectories(batch.groups)
    metrics = reward_metrics(batch.groups) | rollout_metrics(trajectories) | write_metrics([r for t in trajectories for r in t.writes])
    metrics |= {f"learner/{field.name}": float(getattr(report, field.name)) for field in fields(report) if field.name not in ("version", "seconds")}
    metrics |= {
        "staleness/mean": _mean(batch.staleness),
        "staleness/max": float(max(batch.staleness, default=0)),
        "staleness/dropped_groups": float(batch.dropped),
        "sync/policy_version": float(report.version),
        "sync/publish_s": seconds.publish,
        "timing_s/step": seconds.total,
        "timing_s/wait_for_groups": seconds.wait,
        "timing_s/learner": seconds.learn,
        "perf/episodes_per_s": len(trajectories) / seconds.total,
        "perf/trained_tokens_per_s": report.tokens / seconds.total,
        "perf/writes_per_s": sum(len(trajectory.writes) for trajectory in trajectories) / seconds.total,
        "rollout/tasks_issued": float(ledger.issued),
        "rollout/tasks_in_flight": float(ledger.in_flight),
        "rollout/tasks_failed": float(ledger.settled["failed"]),
        "rollout/tasks_stale": float(ledger.settled["stale"]),
    }
    metrics |= {f"rollout/failed_episodes_{boundary}": float(count) for boundary, count in ledger.failures.items()}
    return {key: value for key, value in metrics.items() if math.isfinite(value)}


def reward_metrics(groups: Sequence[TrajectoryGroup]) -> dict[str, float]:
    rewards = [[trajectory.outcome.reward for trajectory in group.trajectories] for group in groups]
    flat = [reward for group in rewards for reward in group]
    metrics = {
        "reward/mean": _mean(flat),
        "reward/std": float(np.std(flat)) if flat else math.nan,
        "reward/best_sibling": _mean([max(group) for group in rewards if group]),
        "reward/groups_without_signal": float(sum(max(group) - min(group) < 1e-9 for group in rewards if group)),
    }
    parts: dict[str, list[float]] = {}
    for trajectory in _trajectories(groups):
        for name, value in trajectory.outcome.reward_parts.items():
            parts.setdefault(name, []).append(float(value))
    return metrics | {f"reward/{name}": _mean(values) for name, values in parts.items() if f"reward/{name}" not in metrics}


def rollout_metrics(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    sampled = [sum(int(segment.action_mask.sum()) for segment in trajectory.segments) for trajectory in trajectories]
    tokens = [sum(len(segment.token_ids) for segment in trajectory.segments) for trajectory in trajectories]
    metrics = {
        "rollout/episodes": float(len(trajectories)),
        "rollout/segments_per_episode": _mean([len(trajectory.segments) for trajectory in trajectories]),
        "rollout/tokens_per_episode": _mean(tokens),
        "rollout/sampled_tokens_per_episode": _mean(sampled),
        "rollout/cut_by_max_turns": float(sum(trajectory.stop_reason == "max_turns" for trajectory in trajectories)),
    }
    for field in fields(Timings):
        metrics[f"timing_s/episode_{field.name}"] = _mean([float(getattr(trajectory.timings, field.name)) for trajectory in trajectories])
    return metrics


def write_metrics(records: Sequence[WriteRecord]) -> dict[str, float]:
    outcomes = Counter(record.outcome for record in records)
    trained = [record for record in records if record.outcome != "empty"]
    return {
        "fast_weights/writes": float(len(records)),
        "fast_weights/accepted": float(outcomes["accepted"]),
        "fast_weights/empty": float(outcomes["empty"]),
        "fast_weights/rolled_back": float(outcomes["rolled_back"]),
        "fast_weights/flashcards_per_write": _mean([len(record.flashcards) for record in records]),
        "fast_weights/rejected_flashcards_per_write": _mean([record.rejected_flashcards for record in records]),
        "fast_weights/loss_before": _mean([record.loss_before for record in trained]),
        "fast_weights/loss_after": _mean([record.loss_after for record in trained]),
        "fast_weights/seconds_per_write": _mean([record.seconds for record in trained]),
    }


def worker_metrics(reports: Sequence[WorkerReport]) -> dict[str, float]:
    """Over the workers' reports after their last refresh; engine counters are totals since the start. Empty before the first refresh."""
    if not reports:
        return {}
    engines = [report.engine for report in reports]
    alive = sum(sum(engine.seconds.values()) for engine in engines)
    return {
        "sync/drain_s": max(report.drain_s for report in reports),
        "sync/load_s": max(report.load_s for report in reports),
        "fast_weights/receipts_passed": float(sum(engine.receipts_passed for engine in engines)),
        "fast_weights/receipts_failed": float(sum(engine.receipts_failed for engine in engines)),
        "fast_weights/receipts_unseen": float(sum(engine.receipts_unseen for engine in engines)),
        "perf/engine_busy_fraction": 1 - sum(engine.seconds["idle"] for engine in engines) / alive if alive > 0 else 0.0,
    }


def warm_start_metrics(report: WarmStartReport) -> Mapping[str, float]:
    return {f"warm_start/{field.name}": float(getattr(report, field.name)) for field in fields(report) if field.name != "version"}


def _trajectories(groups: Sequence[TrajectoryGroup]) -> list[Trajectory]:
    return [trajectory for group in groups for trajectory in group.trajectories]


def _mean(values: Sequence[float] | Sequence[int]) -> float:
    return float(np.mean(values)) if len(values) else math.nan
