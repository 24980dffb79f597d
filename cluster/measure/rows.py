"""Held-out tasks over the rollout workers: one row of the final table per (policy, memory) pair.

    tasks --> run_episodes: lanes (engine.slots per worker), one episode each --> EpisodeScore --> RowResult --> summary with bootstrap intervals

``evaluate_row`` measures a training's rows; the command evaluate keeps episodes as they finish (comparison/drive.py). Both read the same values here.

An episode that failed is counted and left out of the means; a paired comparison takes only the tasks that both rows finished.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from actors.types import Answer, FailedEpisode, PolicyVersion, Task, Trajectory, TrajectoryGroup, WriteOutcome
from cluster.common.errors import CheckpointError
from cluster.measure.statistics import Interval, PairedDifference, bootstrap_interval, paired_difference
from configs.schema import MemoryConfig


@dataclass(frozen=True, slots=True)
class EvaluationRow:
    """What to run: ``memory`` may differ from the memory the policy trains with ("memory off"). A worker is never given a ``label`` twice."""

    label: str
    memory: MemoryConfig
    seed: int


class EpisodeSource(Protocol):
    """What an evaluation sees of a rollout worker."""

    @property
    def name(self) -> str: ...

    async def episode(self, position: int, task: Task, row: EvaluationRow) -> TrajectoryGroup:
        """One episode (a group of one); raises ClusterError when the worker is lost or late."""
        ...


@dataclass(frozen=True, slots=True)
class EpisodeScore:
    """One finished episode without its tokens: what was answered and what it cost.

    ``item`` names what the task asks, the same under every seed: the same question asked twice is one item, not two. ``prompt_tokens`` and
    ``generated_tokens`` are sums over the segments, ``peak_context`` the tokens of the longest; ``seconds`` is wall time.
    """

    task_id: str
    item: str
    reward: float
    reward_parts: Mapping[str, float]
    answers: tuple[Answer, ...]
    writes: Mapping[str, int]
    memory_events: Mapping[str, int]
    prompt_tokens: int
    generated_tokens: int
    peak_context: int
    seconds: float

    def mean(self, score: str) -> float:
        values = [answer.scores[score] for answer in self.answers if score in answer.scores]
        return float(np.mean(values)) if values else float("nan")


@dataclass(frozen=True, slots=True)
class RowResult:
    """All episodes of a row. ``failed`` holds "boundary: message" per failed episode."""

    label: str
    policy_version: PolicyVersion
    episodes: tuple[EpisodeScore, ...]
    failed: tuple[str, ...]

    @property
    def score_names(self) -> tuple[str, ...]:
        """f1 and em first, then what else the environment's scorers report."""
        names = {name for episode in self.episodes for answer in episode.answers for name in answer.scores}
        return ("f1", "em", *sorted(names - {"f1", "em"}))

    @property
    def categories(self) -> tuple[str, ...]:
        return tuple(sorted({answer.category for episode in self.episodes for answer in episode.answers}))

    def writes(self, outcome: WriteOutcome) -> int:
        return sum(episode.writes.get(outcome, 0) for episode in self.episodes)

    def interval(self, score: str, samples: int, seed: int) -> Interval:
        """Mean over tasks (each the mean of its answers)."""
        return bootstrap_interval(_finite([episode.mean(score) for episode in self.episodes]), samples, seed)

    def category_mean(self, category: str, score: str) -> tuple[float, int]:
        """Mean over the answers of a category, and how many there are."""
        values = [
            a.scores[score]
            for episode in self.episodes
            for a in episode.answers
            if a.category == category and score in a.scores
        ]
        return (float(np.mean(values)) if values else float("nan")), len(values)

    def mean_without(self, category: str, score: str) -> tuple[float, int]:
        """Mean over the answers of all other categories, and how many there are."""
        values = [
            a.scores[score]
            for episode in self.episodes
            for a in episode.answers
            if a.category != category and score in a.scores
        ]
        return (float(np.mean(values)) if values else float("nan")), len(values)

    def per_episode(self, field: str) -> float:
        """Mean over episodes of one of reward, prompt_tokens, generated_tokens, seconds."""
        values = [float(getattr(episode, field)) for episode in self.episodes]
        return float(np.mean(values)) if values else float("nan")


async def evaluate_row(
    row: EvaluationRow,
    tasks: Sequence[Task],
    workers: Sequence[EpisodeSource],
    lanes_per_worker: int,
    on_episode: Callable[[], None],
) -> RowResult:
    """Run every task once. Raises what a worker raises; each episode has the worker's own deadline, so this ends."""
    groups: dict[int, TrajectoryGroup] = {}

    def keep(position: int, group: TrajectoryGroup) -> None:
        groups[position] = group
        on_episode()

    await run_episodes(row, list(enumerate(tasks)), workers, lanes_per_worker, keep)
    ordered = [groups[position] for position in sorted(groups)]
    return RowResult(
        label=row.label,
        policy_version=max((group.policy_version for group in ordered), default=0),
        episodes=tuple(score_episode(trajectory) for group in ordered for trajectory in group.trajectories),
        failed=tuple(failure_text(failure) for group in ordered for failure in group.failed),
    )


async def run_episodes(
    row: EvaluationRow,
    tasks: Sequence[tuple[int, Task]],
    workers: Sequence[EpisodeSource],
    lanes_per_worker: int,
    on_group: Callable[[int, TrajectoryGroup], None],
) -> None:
    """One episode of each (position, task); ``on_group`` is called as each finishes. The first worker that raises ends the others' lanes."""
    queue: Iterator[tuple[int, Task]] = iter(tasks)

    async def lane(worker: EpisodeSource) -> None:
        for position, task in queue:
            on_group(position, await worker.episode(position, task, row))

    try:
        async with asyncio.TaskGroup() as lanes:
            for worker in workers:
                for _ in range(lanes_per_worker):
                    lanes.create_task(lane(worker))
    except BaseExceptionGroup as failures:
        raise failures.exceptions[
            0
        ] from None  # the first failure cancelled the other lanes: it is the message


def failure_text(failure: FailedEpisode) -> str:
    return f"{failure.boundary}: {failure.message}"


def score_episode(trajectory: Trajectory) -> EpisodeScore:
    """What is kept of an episode. Figures become plain floats: a custom environment's may be numpy's, which JSON does not take."""
    outcome = trajectory.outcome
    writes: dict[str, int] = {"accepted": 0, "empty": 0, "rolled_back": 0}
    for record in trajectory.writes:
        writes[record.outcome] += 1
    generated = sum(int(segment.action_mask.sum()) for segment in trajectory.segments)
    return EpisodeScore(
        task_id=trajectory.task.id,
        item=_item(trajectory.task),
        reward=float(outcome.reward),
        reward_parts=_floats(outcome.reward_parts),
        answers=tuple(replace(answer, scores=_floats(answer.scores)) for answer in outcome.answers),
        writes=writes,
        memory_events=dict(trajectory.memory_events),
        prompt_tokens=sum(len(segment.token_ids) for segment in trajectory.segments) - generated,
        generated_tokens=generated,
        peak_context=max((len(segment.token_ids) for segment in trajectory.segments), default=0),
        seconds=trajectory.timings.total,
    )


def _floats(values: Mapping[str, float]) -> dict[str, float]:
    return {name: float(value) for name, value in values.items()}


def compare(before: RowResult, after: RowResult, score: str, samples: int, seed: int) -> PairedDifference:
    """``after`` minus ``before`` on the tasks that both finished."""
    first = {episode.task_id: episode.mean(score) for episode in before.episodes}
    second = {episode.task_id: episode.mean(score) for episode in after.episodes}
    shared = [
        task for task in first if task in second and np.isfinite(first[task]) and np.isfinite(second[task])
    ]
    return paired_difference(
        [first[task] for task in shared], [second[task] for task in shared], samples, seed
    )


def row_metrics(result: RowResult, key: str) -> dict[str, float]:
    """The row's figures for the tracker: eval/<key>/f1 ..., by category where there is more than one."""
    metrics = {
        f"eval/{key}/{score}": float(np.mean(values))
        for score in result.score_names
        if (values := _score_values(result, score))
    }
    if len(result.categories) > 1:
        for category in result.categories:
            metrics[f"eval/{key}/f1_{category}"] = result.category_mean(category, "f1")[0]
    metrics |= {
        f"eval/{key}/writes_{outcome}": float(result.writes(outcome))
        for outcome in ("accepted", "empty", "rolled_back")
    }
    metrics[f"eval/{key}/failed_episodes"] = float(len(result.failed))
    if result.episodes:
        metrics |= {
            f"eval/{key}/{field}": result.per_episode(field)
            for field in ("prompt_tokens", "generated_tokens", "seconds")
        }
    return metrics


def save_row(result: RowResult, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(result), indent=1), encoding="utf-8")


def load_row(path: Path) -> RowResult:
    """Raises CheckpointError for a file that another version of Engram wrote."""
    try:
        return row_from_json(json.loads(path.read_text(encoding="utf-8")))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path}: is not a row as this version of Engram saves it ({type(error).__name__}: {error}); delete it"
        ) from error


def row_from_json(data: Mapping[str, Any]) -> RowResult:
    """What ``dataclasses.asdict`` and JSON made of a row. Raises KeyError or TypeError where it is none."""
    return RowResult(
        data["label"],
        data["policy_version"],
        tuple(map(episode_from_json, data["episodes"])),
        tuple(data["failed"]),
    )


def episode_from_json(data: Mapping[str, Any]) -> EpisodeScore:
    answers = tuple(Answer(**{**answer, "gold": tuple(answer["gold"])}) for answer in data["answers"])
    return EpisodeScore(**{**data, "answers": answers})


def _item(task: Task) -> str:
    text = json.dumps([task.environment, task.payload], sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()


def _score_values(result: RowResult, score: str) -> list[float]:
    return _finite([episode.mean(score) for episode in result.episodes])


def _finite(values: Sequence[float]) -> list[float]:
    return [value for value in values if np.isfinite(value)]
