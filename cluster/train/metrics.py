"""Turns what a step produced into the figures that the tracker logs, by pure functions.

The section of a figure's name before "/" is its chart group in MLflow. ``Summary``, the first there, has the
reward of a step and the held-out score of the policy. The section ``timeline`` says where a step's time went,
as fractions that sum to 1 in each of three views:

    timeline/worker_*    workers' step threads: act, extract, receipt, write, install, refresh, idle, other
    timeline/episode_*   the episodes, waiting included: act, extract, write, install, environment
    timeline/learner_*   the driver and the learner: wait (for groups), learn, publish, other
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np

from actors.episodes.group_summary import EpisodeSummary, GroupSummary
from actors.types import Timings, WriteRecord
from actors.worker import WorkerReport
from cluster.fleet.ledger import Ledger
from cluster.fleet.stream import Batch
from cluster.measure.card_counts import count_cards, total_cards
from cluster.measure.scores import SUMMARY
from learner.types import StepReport, WarmStartReport


@dataclass(frozen=True, slots=True)
class StepSeconds:
    """Wall seconds of a loop step: wait for groups, learner step, weights out of the learner, and all of it.

    The rest of ``total`` went to the refresh before.
    """

    wait: float
    learn: float
    publish: float
    total: float


@dataclass(frozen=True, slots=True)
class StepSummary:
    """A step as the progress line shows it. ``staleness`` is the batch's mean in policy versions.

    ``writes`` are the accepted ones, ``empty`` the extractions without a flashcard.
    ``without_signal``: the learner made no optimizer step, since no token had an advantage.
    """

    step: int
    version: int
    reward: float
    staleness: float
    episodes: int
    writes: int  # accepted ones, and computed: not those that a sibling's write served
    shared: int
    empty: int
    failed: int
    without_signal: bool
    seconds: float

    @property
    def episodes_per_second(self) -> float:
        return self.episodes / self.seconds if self.seconds > 0 else 0.0

    @property
    def writes_per_second(self) -> float:
        return self.writes / self.seconds if self.seconds > 0 else 0.0


def summarize(step: int, report: StepReport, batch: Batch, seconds: StepSeconds) -> StepSummary:
    groups = [group.summary for group in batch.groups]
    episodes = _episodes(groups)
    records = [record for episode in episodes for record in episode.writes]
    return StepSummary(
        step=step,
        version=report.version,
        reward=_mean([episode.outcome.reward for episode in episodes]),
        staleness=_mean(batch.staleness),
        episodes=len(episodes),
        writes=sum(record.outcome == "accepted" for record in records if not record.shared),
        shared=sum(record.shared for record in records),
        empty=sum(record.outcome == "empty" for record in records),
        failed=sum(len(group.failed) for group in groups),
        without_signal=report.optimizer_steps == 0,
        seconds=seconds.total,
    )


def step_metrics(
    report: StepReport, batch: Batch, seconds: StepSeconds, ledger: Ledger, learner_restarts: int = 0
) -> dict[str, float]:
    """All figures of an RL step. A value that it lacks (no write, no forward) is left out, never 0.

    ``learner_restarts``: of the run, up to this step.
    """
    groups = [group.summary for group in batch.groups]
    episodes = _episodes(groups)
    records = [record for episode in episodes for record in episode.writes]
    metrics = (
        reward_metrics(groups)
        | rollout_metrics(episodes)
        | write_metrics(records)
        | card_metrics(episodes)
        | mix_metrics(groups, ledger.failed_members)
    )
    metrics[f"{SUMMARY}/reward"] = metrics["reward/mean"]
    metrics |= episode_timeline(episodes) | learner_timeline(seconds)
    metrics |= {
        f"learner/{field.name}": float(getattr(report, field.name))
        for field in fields(report)
        if field.name not in ("version", "seconds")
    }
    metrics |= {
        "learner/restarts": float(learner_restarts),
        "staleness/mean": _mean(batch.staleness),
        "staleness/max": float(max(batch.staleness, default=0)),
        "staleness/dropped_groups": float(batch.dropped),
        "sync/policy_version": float(report.version),
        "sync/publish_s": seconds.publish,
        "timing_s/step": seconds.total,
        "timing_s/wait_for_groups": seconds.wait,
        "timing_s/learner": seconds.learn,
        "perf/episodes_per_s": len(episodes) / seconds.total,
        "perf/trained_tokens_per_s": report.tokens / seconds.total,
        "perf/writes_per_s": sum(map(_is_computed, records)) / seconds.total,
        "rollout/tasks_issued": float(ledger.issued),
        "rollout/tasks_in_flight": float(ledger.in_flight),
        "rollout/tasks_failed": float(ledger.settled["failed"]),
        "rollout/tasks_stale": float(ledger.settled["stale"]),
        "rollout/tasks_reissued": float(ledger.reissued),
    }
    metrics |= {
        f"rollout/failed_episodes_{boundary}": float(count) for boundary, count in ledger.failures.items()
    }
    return {key: value for key, value in metrics.items() if math.isfinite(value)}


def reward_metrics(groups: Sequence[GroupSummary]) -> dict[str, float]:
    rewards = [[episode.outcome.reward for episode in group.episodes] for group in groups]
    flat = [reward for group in rewards for reward in group]
    metrics = {
        "reward/mean": _mean(flat),
        "reward/std": float(np.std(flat)) if flat else math.nan,
        "reward/best_sibling": _mean([max(group) for group in rewards if group]),
        "reward/groups_of_equal_reward": float(sum(_of_equal_reward(group) for group in groups)),
    }
    parts: dict[str, list[float]] = {}
    for episode in _episodes(groups):
        for name, value in episode.outcome.reward_parts.items():
            parts.setdefault(name, []).append(float(value))
    # a part may be called as one of the figures above
    return metrics | {
        f"reward/part_{name}" if f"reward/{name}" in metrics else f"reward/{name}": _mean(values)
        for name, values in parts.items()
    }


def mix_metrics(groups: Sequence[GroupSummary], failed: Mapping[str, int]) -> dict[str, float]:
    """Figures of each environment of environment.mix apart; none without it.

    ``failed``: episodes of the whole run, also of groups that failed and so are in no batch.
    """
    metrics: dict[str, float] = {}
    for member in sorted({*failed, *(group.member for group in groups if group.member)}):
        own = [group for group in groups if group.member == member]
        counts = {
            "groups": float(len(own)),
            "episodes": float(len(_episodes(own))),
            "failed_episodes": float(failed.get(member, 0)),
        }
        rewards = {key.removeprefix("reward/"): value for key, value in reward_metrics(own).items()}
        # a part may be called as one of the counts
        rewards = {f"part_{name}" if name in counts else name: value for name, value in rewards.items()}
        metrics |= {f"mix/{member}_{name}": value for name, value in (rewards | counts).items()}
    return metrics


def rollout_metrics(episodes: Sequence[EpisodeSummary]) -> dict[str, float]:
    metrics = {
        "rollout/episodes": float(len(episodes)),
        "rollout/segments_per_episode": _mean([episode.segments for episode in episodes]),
        "rollout/tokens_per_episode": _mean([episode.tokens for episode in episodes]),
        "rollout/sampled_tokens_per_episode": _mean([episode.sampled_tokens for episode in episodes]),
        "rollout/cut_by_max_turns": float(sum(episode.stop_reason == "max_turns" for episode in episodes)),
    }
    for field in fields(Timings):
        metrics[f"timing_s/episode_{field.name}"] = _mean(
            [float(getattr(episode.timings, field.name)) for episode in episodes]
        )
    return metrics


def _is_computed(record: WriteRecord) -> bool:
    """Whether the writer had work with it."""
    return record.outcome != "empty" and not record.shared


def write_metrics(records: Sequence[WriteRecord]) -> dict[str, float]:
    outcomes = Counter(record.outcome for record in records)
    trained = [record for record in records if record.outcome != "empty"]
    return {
        "fast_weights/writes": float(len(records)),
        "fast_weights/accepted": float(outcomes["accepted"]),
        "fast_weights/empty": float(outcomes["empty"]),
        "fast_weights/rolled_back": float(outcomes["rolled_back"]),
        "fast_weights/shared": float(sum(record.shared for record in records)),
        "fast_weights/flashcards_per_write": _mean([len(record.flashcards) for record in records]),
        "fast_weights/rejected_flashcards_per_write": _mean(
            [record.rejected_flashcards for record in records]
        ),
        "fast_weights/repaired_flashcards_per_write": _mean(
            [record.repaired_flashcards for record in records]
        ),
        "fast_weights/loss_before": _mean(_finite(record.loss_before for record in trained)),
        "fast_weights/loss_after": _mean(_finite(record.loss_after for record in trained)),
        "fast_weights/preserved_kl": _mean([record.preserved_kl for record in trained if record.preserved]),
        "fast_weights/seconds_per_write": _mean([record.seconds for record in trained]),
    }


def card_metrics(episodes: Sequence[EpisodeSummary]) -> dict[str, float]:
    """Shares of right cards and of what became of them; empty where the environment cannot say."""
    counts = total_cards(count_cards(episode.writes, episode.outcome.answers) for episode in episodes)
    return {f"cards/{name}": share for name, share in (counts.shares if counts else {}).items()}


def worker_metrics(reports: Sequence[WorkerReport]) -> dict[str, float]:
    """Figures over the workers' reports after their last refresh; empty before the first.

    Engine counters are totals since the workers started.
    """
    if not reports:
        return {}
    engines = [report.engine for report in reports]
    alive = sum(sum(engine.seconds.values()) for engine in engines)
    idle = sum(engine.seconds["idle"] for engine in engines)
    return {
        "sync/drain_s": max(report.drain_s for report in reports),
        "sync/fetch_s": max(report.fetch_s for report in reports),
        "sync/load_s": max(report.load_s for report in reports),
        "fast_weights/receipts_passed": float(sum(engine.receipts_passed for engine in engines)),
        "fast_weights/receipts_failed": float(sum(engine.receipts_failed for engine in engines)),
        "fast_weights/receipts_unseen": float(sum(engine.receipts_unseen for engine in engines)),
        "perf/engine_busy_fraction": 1 - idle / alive if alive > 0 else 0.0,
    }


def worker_timeline(seconds: Mapping[str, float]) -> dict[str, float]:
    """Shares of the step threads' ``seconds`` by phase; empty when no time has passed."""
    return _fractions("worker", seconds)


def episode_timeline(episodes: Sequence[EpisodeSummary]) -> dict[str, float]:
    phases = [field.name for field in fields(Timings) if field.name != "total"]
    return _fractions(
        "episode", {phase: sum(getattr(episode.timings, phase) for episode in episodes) for phase in phases}
    )


def learner_timeline(seconds: StepSeconds) -> dict[str, float]:
    other = seconds.total - seconds.wait - seconds.learn - seconds.publish
    return _fractions(
        "learner", {"wait": seconds.wait, "learn": seconds.learn, "publish": seconds.publish, "other": other}
    )


def warm_start_metrics(report: WarmStartReport, taught: Mapping[str, float]) -> Mapping[str, float]:
    """Of one step; ``taught``: ``Demonstrations.figures``."""
    learned = {field.name: float(getattr(report, field.name)) for field in fields(report)}
    figures = {**learned, **taught}
    return {f"warm_start/{name}": value for name, value in figures.items() if name != "version"}


def _fractions(view: str, seconds: Mapping[str, float]) -> dict[str, float]:
    total = sum(seconds.values())
    if total <= 0:
        return {}
    return {f"timeline/{view}_{phase}": value / total for phase, value in seconds.items()}


def _episodes(groups: Sequence[GroupSummary]) -> list[EpisodeSummary]:
    return [episode for group in groups for episode in group.episodes]


def _of_equal_reward(group: GroupSummary) -> bool:
    """Whether all siblings have the same reward. With credit by question they may teach all the same."""
    rewards = [episode.outcome.reward for episode in group.episodes]
    return bool(rewards) and max(rewards) - min(rewards) < 1e-9


def _finite(values: Iterable[float]) -> list[float]:
    """The finite values: a write that diverged has no loss, and must not hide the losses of the others."""
    return [value for value in values if math.isfinite(value)]


def _mean(values: Sequence[float] | Sequence[int]) -> float:
    return float(np.mean(values)) if len(values) else math.nan


def step_line(summary: StepSummary) -> str:
    """A training step for people: "reward 0.412  staleness 0.0  1.2 episodes/s  3.6 writes/s"."""
    empty = f"  {summary.empty} without a card" if summary.empty else ""
    failed = f"  {summary.failed} failed" if summary.failed else ""
    idle = "  no signal, so no optimizer step" if summary.without_signal else ""
    shared = f" and {summary.shared} shared" if summary.shared else ""
    speed = f"{summary.episodes_per_second:.2f} episodes/s  {summary.writes_per_second:.2f} writes/s{shared}"
    return (
        f"version {summary.version}  reward {summary.reward:.3f}  staleness {summary.staleness:.1f}  "
        f"{speed}{empty}{failed}{idle}"
    )
