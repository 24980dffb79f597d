"""A row's cells on one benchmark as figures: scores with intervals, the difference to its baseline, what it cost.

Seeds are pooled. What is resampled is the *item*, the question itself: where another seed asks the same question again, its values are averaged
first, because a repeated question is no new evidence.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from actors.types import Answer
from cluster.evaluation.plan import Cell
from cluster.evaluation.store import CellResult
from cluster.measure.rows import EpisodeScore
from cluster.measure.statistics import (
    Interval,
    PairedDifference,
    Played,
    adjusted_p_values,
    bootstrap_interval,
    paired_by_item,
)
from configs.models import ResolvedModel

Chosen = Callable[[Answer], bool]
PRIMARY = "f1"  # what rows are compared by


@dataclass(frozen=True, slots=True)
class Bootstrap:
    samples: int
    seed: int


@dataclass(frozen=True, slots=True)
class Cost:
    """Means per episode but for the peaks (the worst of all) and the counts (sums). ``resident_bytes`` and ``judge`` may be unknown or empty.

    ``kv_bytes`` is computed, not measured: keys and values of the longest context in the engine's type, which is what grows with it; the measured
    peaks hold the engine's whole reserve.
    """

    resident_bytes: int | None
    device_bytes: int
    kv_bytes: int
    peak_context: int
    prompt_tokens: float
    generated_tokens: float
    seconds: float
    writes: Mapping[str, int]
    events: Mapping[str, int]
    judge: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class RowSummary:
    """One row on one benchmark: its finished cells by seed, and why others are missing."""

    benchmark: str
    label: str
    max_context_tokens: int
    cells: tuple[tuple[int, CellResult], ...]
    missing: tuple[str, ...]

    @property
    def episodes(self) -> list[EpisodeScore]:
        return [episode for _, cell in self.cells for episode in cell.result.episodes]

    @property
    def failed(self) -> list[str]:
        return [message for _, cell in self.cells for message in cell.result.failed]

    @property
    def answers(self) -> Iterator[Answer]:
        return (answer for episode in self.episodes for answer in episode.answers)

    @property
    def items(self) -> int:
        return len({episode.item for episode in self.episodes})

    def values(self, score: str, chosen: Chosen) -> dict[str, float]:
        """Mean of ``score`` over the chosen answers of each item that has any."""
        found: dict[str, list[float]] = {}
        for episode in self.episodes:
            if (value := _mean(episode, score, chosen)) is not None:
                found.setdefault(episode.item, []).append(value)
        return {item: float(np.mean(values)) for item, values in found.items()}

    def interval(self, score: str, bootstrap: Bootstrap, chosen: Chosen = lambda _: True) -> Interval:
        return bootstrap_interval(
            list(self.values(score, chosen).values()), bootstrap.samples, bootstrap.seed
        )

    def reward_parts(self) -> dict[str, float]:
        """What the environment reports beside scores (a wrong count of answers, ...): means per episode, the judge's cost left out."""
        scores = {name for answer in self.answers for name in answer.scores}
        found: dict[str, list[float]] = {}
        for episode in self.episodes:
            for name, value in episode.reward_parts.items():
                if name not in scores and not name.startswith("judge_"):
                    found.setdefault(name, []).append(value)
        return {name: float(np.mean(values)) for name, values in sorted(found.items())}

    def cost(self, model: ResolvedModel, bytes_per_value: int) -> Cost:
        episodes, peaks = self.episodes, [cell.peak for _, cell in self.cells]
        context = max((episode.peak_context for episode in episodes), default=0)
        residents = [peak.resident_bytes for peak in peaks]
        known = [value for value in residents if value is not None]
        return Cost(
            resident_bytes=max(known) if known and len(known) == len(residents) else None,
            device_bytes=max((peak.device_bytes for peak in peaks), default=0),
            kv_bytes=2 * model.num_layers * model.num_kv_heads * model.head_dim * bytes_per_value * context,
            peak_context=context,
            prompt_tokens=_average([episode.prompt_tokens for episode in episodes]),
            generated_tokens=_average([episode.generated_tokens for episode in episodes]),
            seconds=_average([episode.seconds for episode in episodes]),
            writes=_summed(episode.writes for episode in episodes),
            events=_summed(episode.memory_events for episode in episodes),
            judge=_judge(episodes),
        )


@dataclass(frozen=True, slots=True)
class Difference:
    """``label`` minus ``baseline`` on the items that both finished; ``adjusted_p`` is Holm's over all comparisons of the report."""

    benchmark: str
    label: str
    baseline: str
    difference: PairedDifference
    adjusted_p: float


def summarize(
    cells: Sequence[Cell], found: Mapping[str, CellResult], reasons: Mapping[str, str]
) -> tuple[RowSummary, ...]:
    """The rows in the order of the plan. ``reasons`` says, by key, why a cell without a result was given up."""
    grouped: dict[tuple[str, str], list[Cell]] = {}
    for cell in cells:
        grouped.setdefault((cell.benchmark, cell.variant.label), []).append(cell)
    return tuple(
        RowSummary(
            benchmark=benchmark,
            label=label,
            max_context_tokens=group[0].config.memory.max_context_tokens,
            cells=tuple((cell.config.seed, found[cell.key]) for cell in group if cell.key in found),
            missing=tuple(
                f"seed {cell.config.seed}: {reasons.get(cell.key, 'not run yet')}"
                for cell in group
                if cell.key not in found
            ),
        )
        for (benchmark, label), group in grouped.items()
    )


def compare_rows(
    rows: Sequence[RowSummary], baselines: Sequence[tuple[str, str]], bootstrap: Bootstrap
) -> tuple[Difference, ...]:
    """Each row against its baseline on each benchmark, by F1. Pairs share seed, task and item; those of one item are averaged."""
    by_name = {(row.benchmark, row.label): row for row in rows}
    found = []
    for row in rows:
        for label, baseline in baselines:
            if label == row.label and (row.benchmark, baseline) in by_name:
                other = by_name[row.benchmark, baseline]
                difference = paired_by_item(_primary(other), _primary(row), bootstrap.samples, bootstrap.seed)
                found.append(Difference(row.benchmark, label, baseline, difference, float("nan")))
    adjusted = adjusted_p_values([one.difference for one in found])
    return tuple(replace(one, adjusted_p=p) for one, p in zip(found, adjusted, strict=True))


def _primary(row: RowSummary) -> dict[Played, float]:
    """The score of the episodes that have one."""
    found = {}
    for seed, cell in row.cells:
        for episode in cell.result.episodes:
            if (value := _mean(episode, PRIMARY, lambda _: True)) is not None:
                found[seed, episode.task_id, episode.item] = value
    return found


def _mean(episode: EpisodeScore, score: str, chosen: Chosen) -> float | None:
    values = [answer.scores[score] for answer in episode.answers if score in answer.scores and chosen(answer)]
    return float(np.mean(values)) if values else None


def _average(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else float("nan")


def _summed(counts: Iterator[Mapping[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for one in counts:
        total.update(one)
    return dict(sorted(total.items()))


def _judge(episodes: Sequence[EpisodeScore]) -> dict[str, float]:
    """The judge's cost as the environment reports it (requests, tokens, money): sums."""
    found: dict[str, float] = {}
    for episode in episodes:
        for name, value in episode.reward_parts.items():
            if name.startswith("judge_"):
                found[name] = found.get(name, 0.0) + value
    return found
