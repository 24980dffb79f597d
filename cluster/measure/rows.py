"""Evaluation rows: the held-out tasks played by one policy with one memory, and what is kept of them.

    tasks --> run_episodes: lanes (engine.slots per worker), one episode each
          --> TaskResult, EpisodeScore --> RowResult --> means, intervals, metrics

A training run measures its rows with ``evaluate_row``. The command evaluate keeps each task as it ends
(evaluation/run.py). An episode that failed is counted and left out of the means; a paired comparison takes
only the tasks that both rows finished. ``failed_as_zero`` says what the means would be if it counted as 0.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, get_args

import numpy as np

from actors.environments.recall_questions import UNTOLD
from actors.types import Answer, PolicyVersion, Task, Trajectory, TrajectoryGroup, WriteOutcome
from cluster.common.errors import AllFailed, CheckpointError, SaveError
from cluster.common.failures import failure_text, one_cause
from cluster.measure.card_counts import CardCounts, count_cards, total_cards
from cluster.measure.collapse import ExtractionCounts, count_extractions, total
from cluster.measure.scores import F1, REWARD, score_order
from cluster.measure.statistics import Interval, PairedDifference, mean_interval, paired_difference
from configs.files import FileError, Measured, dump_json, make_folder, read_json, write_text
from configs.memory import CARD_WRITING
from configs.schema import MemoryConfig

UNANSWERABLE = "adversarial"
"""LoCoMo's category 5 has no plain answer: means are shown with it and without it (as the paper does)."""

OUTCOMES: tuple[WriteOutcome, ...] = get_args(WriteOutcome)

_HOPELESS = 4  # episodes that fail by one cause before any finishes

MADE = "environment"
"""The part that keeps the environment's own reward where the configuration makes another one."""

Chosen = Callable[[Answer], bool]


@dataclass(frozen=True, slots=True)
class EvaluationRow:
    """What to run. A worker never gets one ``label`` twice.

    ``memory`` may differ from the memory that the policy trains with ("memory off").
    """

    label: str
    memory: MemoryConfig
    seed: int


class EpisodeSource(Protocol):
    """What an evaluation sees of a rollout worker."""

    @property
    def name(self) -> str: ...

    async def episode(self, position: int, task: Task, row: EvaluationRow) -> TrajectoryGroup:
        """Play one episode (a group of one). Raises ClusterError when the worker is lost or late."""
        ...


@dataclass(frozen=True, slots=True)
class EpisodeScore:
    """One finished episode without its tokens: what was answered and what it cost.

    ``item`` names what the task asks. It is the same under every seed: a question asked twice is one item.
    ``prompt_tokens`` and ``generated_tokens`` are sums over the segments, ``peak_context`` the tokens of the
    longest segment, ``seconds`` wall time. ``extractions``: None where the memory writes no flashcards.
    """

    task_id: str
    item: str
    reward: Measured
    reward_parts: Mapping[str, Measured]
    answers: tuple[Answer, ...]
    writes: Mapping[str, int]
    memory_events: Mapping[str, int]
    prompt_tokens: int
    generated_tokens: int
    peak_context: int
    seconds: float
    extractions: ExtractionCounts | None = None
    cards: CardCounts | None = None  # None too where the environment cannot say
    member: str = ""  # of environment.mix: the task's environment

    def mean(self, score: str, chosen: Chosen = lambda _: True) -> float:
        """Over the chosen answers that have ``score``; NaN without one. The reward is the episode's own."""
        if score == REWARD:
            return float(self.reward)
        return answers_mean(self.answers, score, chosen)[0]


@dataclass(frozen=True, slots=True)
class TaskResult:
    """One task that was played: an episode, or "boundary: message" for why there is none."""

    position: int
    policy_version: PolicyVersion
    episodes: tuple[EpisodeScore, ...]
    failed: tuple[str, ...]
    member: str = ""  # of environment.mix: the task's environment

    @staticmethod
    def of(position: int, group: TrajectoryGroup, writes_cards: bool = False) -> TaskResult:
        return TaskResult(
            position,
            group.policy_version,
            episodes=tuple(score_episode(trajectory, writes_cards) for trajectory in group.trajectories),
            failed=tuple(failure_text(failure) for failure in group.failed),
            member=group.task.member,
        )


@dataclass(frozen=True, slots=True)
class RowResult:
    """All episodes of a row. ``failed`` holds "boundary: message" per failed episode.

    ``failed_members``: of environment.mix, the environment of each of ``failed``; "" without a mix.
    """

    label: str
    policy_version: PolicyVersion
    episodes: tuple[EpisodeScore, ...]
    failed: tuple[str, ...]
    failed_members: tuple[str, ...] = ()

    @staticmethod
    def of(label: str, tasks: Iterable[TaskResult]) -> RowResult:
        ordered = sorted(tasks, key=lambda task: task.position)
        return RowResult(
            label,
            policy_version=max((task.policy_version for task in ordered), default=0),
            episodes=tuple(episode for task in ordered for episode in task.episodes),
            failed=tuple(message for task in ordered for message in task.failed),
            failed_members=tuple(task.member for task in ordered for _ in task.failed),
        )

    @property
    def members(self) -> tuple[str, ...]:
        """The environments of environment.mix; empty without it."""
        played = {episode.member for episode in self.episodes} | set(self.failed_members)
        return tuple(sorted(played - {""}))

    def of_member(self, name: str) -> RowResult:
        """The row's episodes of one environment of the mix."""
        failed = zip(self.failed, self.failed_members, strict=False)
        return replace(
            self,
            episodes=tuple(episode for episode in self.episodes if episode.member == name),
            failed=tuple(message for message, member in failed if member == name),
            failed_members=tuple(member for member in self.failed_members if member == name),
        )

    @property
    def answers(self) -> list[Answer]:
        return [answer for episode in self.episodes for answer in episode.answers]

    @property
    def score_names(self) -> tuple[str, ...]:
        """f1 and em, whether there are answers or not, then what else the environment's scorers report.

        The reward is among them where it is not F1 itself.
        """
        names = {"f1", "em", *(name for answer in self.answers for name in answer.scores)}
        return score_order(names | ({REWARD} if has_own_reward(self.episodes) else set()))

    @property
    def writes(self) -> dict[str, int]:
        """By outcome."""
        return {
            outcome: sum(episode.writes.get(outcome, 0) for episode in self.episodes) for outcome in OUTCOMES
        }

    @property
    def extractions(self) -> ExtractionCounts | None:
        return total(episode.extractions for episode in self.episodes)

    @property
    def cards(self) -> CardCounts | None:
        return total_cards(episode.cards for episode in self.episodes)

    def values(self, score: str) -> list[float]:
        """The mean of each task that has ``score``."""
        return [value for episode in self.episodes if np.isfinite(value := episode.mean(score))]

    def interval(self, score: str) -> Interval:
        """Mean over tasks (each the mean of its answers)."""
        return mean_interval(self.values(score))

    def weighed_parts(self) -> dict[str, float]:
        """Mean parts of the reward, where the configuration makes the reward; else empty."""
        made = [episode.reward_parts for episode in self.episodes if MADE in episode.reward_parts]
        names = sorted({name for parts in made for name in parts})
        return {name: float(np.mean([parts[name] for parts in made if name in parts])) for name in names}

    def per_episode(self, field: str) -> float:
        """Mean over episodes of one of reward, prompt_tokens, generated_tokens, seconds."""
        values = [float(getattr(episode, field)) for episode in self.episodes]
        return float(np.mean(values)) if values else float("nan")


def failed_as_zero(mean: float, finished: int, failed: int) -> float:
    """The mean over ``finished`` episodes if the ``failed`` ones counted as 0; NaN without an episode."""
    if finished + failed == 0:
        return float("nan")
    return mean * finished / (finished + failed) if finished else 0.0


# --- from answers to means --------------------------------------------------------------------------------


def answers_mean(answers: Sequence[Answer], score: str, chosen: Chosen) -> tuple[float, int]:
    """Mean of ``score`` over the chosen answers that have it, and their count. NaN and 0 without any."""
    values = [answer.scores[score] for answer in answers if score in answer.scores and chosen(answer)]
    return (float(np.mean(values)) if values else float("nan")), len(values)


def has_own_reward(episodes: Iterable[EpisodeScore]) -> bool:
    """Whether the reward tells something that F1 does not."""
    return any(not math.isclose(episode.reward, episode.mean(F1), abs_tol=1e-9) for episode in episodes)


def primary_score(episodes: Iterable[EpisodeScore]) -> str:
    """The score by which rows are compared: F1, or the reward where no episode has an answer.

    Of several environments (environment.mix) it is the reward where one of them has no answers.
    """
    shown = list(episodes)
    has_f1 = [bool(np.isfinite(episode.mean(F1))) for episode in shown]
    mixed = any(episode.member for episode in shown)  # then all are compared by what all have
    return REWARD if shown and not (all(has_f1) if mixed else any(has_f1)) else F1


def categories(answers: Iterable[Answer]) -> dict[str, Chosen]:
    """A choice of answers for each category; empty where there is only one category."""
    names = sorted({answer.category for answer in answers})
    return {name: _of_category(name) for name in names} if len(names) > 1 else {}


def answer_groups(answers: Iterable[Answer]) -> dict[str, Chosen]:
    """The categories, and where there are such, all answers but the unanswerable or the untold ones."""
    groups = categories(answers)
    if UNANSWERABLE in groups:
        groups[f"all but {UNANSWERABLE}"] = lambda answer: answer.category != UNANSWERABLE
    if any(name in groups for name in UNTOLD):
        groups["told"] = lambda answer: answer.category not in UNTOLD
    return groups


def told_and_untold(answers: Iterable[Answer]) -> dict[str, Chosen]:
    """All told answers, then each category of the untold ones; empty where there is no untold one."""
    groups = answer_groups(answers)
    return {name: groups[name] for name in ("told", *UNTOLD) if "told" in groups and name in groups}


def _of_category(name: str) -> Chosen:
    return lambda answer: answer.category == name


# --- playing a row ----------------------------------------------------------------------------------------


async def evaluate_row(
    row: EvaluationRow,
    tasks: Sequence[Task],
    workers: Sequence[EpisodeSource],
    lanes_per_worker: int,
    on_episode: Callable[[], None],
) -> RowResult:
    """Run every task once. Raises what a worker raises. Ends, since workers give each episode a deadline."""
    results: list[TaskResult] = []

    def keep(result: TaskResult) -> None:
        results.append(result)
        on_episode()

    await run_episodes(row, list(enumerate(tasks)), workers, lanes_per_worker, keep)
    return RowResult.of(row.label, results)


async def run_episodes(
    row: EvaluationRow,
    tasks: Sequence[tuple[int, Task]],
    workers: Sequence[EpisodeSource],
    lanes_per_worker: int,
    on_task: Callable[[TaskResult], None],
) -> None:
    """Play one episode of each (position, task) and call ``on_task`` as each finishes.

    The first worker that raises ends the other lanes; its error is raised. Raises AllFailed when the first
    episodes all fail by one line of a user's code: the next ones would too.
    """
    queue: Iterator[tuple[int, Task]] = iter(tasks)
    writes_cards = row.memory.policy in CARD_WRITING
    enough = min(len(tasks), max(_HOPELESS, lanes_per_worker * len(workers)))
    failed: list[str] = []
    finished = 0

    async def lane(worker: EpisodeSource) -> None:
        nonlocal finished
        for position, task in queue:
            result = TaskResult.of(position, await worker.episode(position, task, row), writes_cards)
            on_task(result)
            finished += len(result.episodes)
            failed.extend(result.failed)
            if not finished and len(failed) >= enough and (cause := one_cause(failed)):
                raise AllFailed(f"{row.label}: {cause}")

    try:
        async with asyncio.TaskGroup() as lanes:
            for worker in workers:
                for _ in range(lanes_per_worker):
                    lanes.create_task(lane(worker))
    except BaseExceptionGroup as failures:
        first = failures.exceptions[0]  # it cancelled the other lanes: it is the message
        raise first from None


def score_episode(trajectory: Trajectory, writes_cards: bool = False) -> EpisodeScore:
    """Keep the figures of an episode. They become plain floats: JSON does not take a user's numpy numbers."""
    outcome = trajectory.outcome
    writes: dict[str, int] = dict.fromkeys(OUTCOMES, 0)
    for record in trajectory.writes:
        writes[record.outcome] += 1
    lengths = [len(segment.token_ids) for segment in trajectory.segments]
    generated = sum(int(segment.action_mask.sum()) for segment in trajectory.segments)
    return EpisodeScore(
        task_id=trajectory.task.id,
        item=_item(trajectory.task),
        reward=float(outcome.reward),
        reward_parts=_floats(outcome.reward_parts),
        answers=tuple(replace(answer, scores=_floats(answer.scores)) for answer in outcome.answers),
        writes=writes,
        memory_events=dict(trajectory.memory_events),
        prompt_tokens=sum(lengths) - generated,
        generated_tokens=generated,
        peak_context=max(lengths, default=0),
        seconds=trajectory.timings.total,
        extractions=count_extractions(trajectory.writes) if writes_cards else None,
        cards=count_cards(trajectory.writes, outcome.answers) if writes_cards else None,
        member=trajectory.task.member,
    )


def _floats(values: Mapping[str, float]) -> dict[str, float]:
    return {name: float(value) for name, value in values.items()}


def _item(task: Task) -> str:
    text = json.dumps([task.environment, task.payload], sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()


# --- what a row says --------------------------------------------------------------------------------------


def compare(before: RowResult, after: RowResult, score: str) -> PairedDifference:
    """``after`` minus ``before`` on the tasks that both finished."""
    first = {episode.task_id: episode.mean(score) for episode in before.episodes}
    second = {episode.task_id: episode.mean(score) for episode in after.episodes}
    shared = [
        task for task in first if task in second and np.isfinite(first[task]) and np.isfinite(second[task])
    ]
    return paired_difference([first[task] for task in shared], [second[task] for task in shared])


def save_row(result: RowResult, path: Path) -> None:
    """Raises SaveError."""
    try:
        make_folder(path.parent)
        write_text(path, dump_json(result))
    except OSError as error:
        cure = "what was saved before is whole: make room there and resume the run"
        raise SaveError(f"{path}: cannot be written ({error.strerror or error}); {cure}") from error


def load_row(path: Path) -> RowResult:
    """Raises CheckpointError for a file that this version of Engram did not write."""
    try:
        return read_json(path, RowResult)
    except FileError as error:
        raise CheckpointError(f"{error}; delete it, and the row is measured again") from error
