"""A row's cells on one benchmark as figures: scores with intervals, the difference to its baseline, the cost.

Seeds are pooled. Intervals are over *items*, the questions themselves. Where another seed asks the same
question again, its values are averaged first: a repeated question is no new evidence.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from actors.types import Answer
from cluster.evaluation.plan import Cell
from cluster.evaluation.store import CellResult, worst
from cluster.measure.card_counts import CardCounts, total_cards
from cluster.measure.collapse import ExtractionCounts, total
from cluster.measure.rows import Chosen, EpisodeScore, primary_score
from cluster.measure.scores import F1
from cluster.measure.statistics import (
    Interval,
    PairedDifference,
    Played,
    adjusted_p_values,
    item_means,
    mean_interval,
    paired_by_item,
)
from configs.models import ResolvedModel

Number = TypeVar("Number", int, float)


@dataclass(frozen=True, slots=True)
class Cost:
    """Tokens and seconds are means per episode, peaks the worst of all, counts and the judge's cost sums.

    ``resident_bytes`` may be unknown. ``kv_bytes`` is computed: keys and values of the longest context in the
    engine's dtype. It grows with the context, while the measured peaks hold the engine's whole reserve.
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
    def answers(self) -> list[Answer]:
        return [answer for episode in self.episodes for answer in episode.answers]

    @property
    def extractions(self) -> ExtractionCounts | None:
        return total(episode.extractions for episode in self.episodes)

    @property
    def cards(self) -> CardCounts | None:
        return total_cards(episode.cards for episode in self.episodes)

    @property
    def members(self) -> list[str]:
        """The environments of environment.mix; empty without it."""
        return sorted({member for _, cell in self.cells for member in cell.result.members})

    def of_member(self, name: str) -> RowSummary:
        """The row's episodes of one environment of the mix."""
        own = [(seed, replace(cell, result=cell.result.of_member(name))) for seed, cell in self.cells]
        return replace(self, cells=tuple(own))

    @property
    def items(self) -> int:
        return len({episode.item for episode in self.episodes})

    def values(self, score: str, chosen: Chosen = lambda _: True) -> dict[Played, float]:
        """The mean of ``score`` over the chosen answers of each episode that has any."""
        means = {
            (seed, episode.task_id, episode.item): episode.mean(score, chosen)
            for seed, cell in self.cells
            for episode in cell.result.episodes
        }
        return {played: mean for played, mean in means.items() if np.isfinite(mean)}

    def interval(self, score: str, chosen: Chosen = lambda _: True) -> Interval:
        return mean_interval(list(item_means(self.values(score, chosen)).values()))

    def reward_parts(self) -> dict[str, float]:
        """Means per episode of what the environment reports beside scores and the judge's cost."""
        scores = {name for answer in self.answers for name in answer.scores}
        values: dict[str, list[float]] = {}
        for episode in self.episodes:
            for name, value in episode.reward_parts.items():
                if name not in scores and not name.startswith("judge_"):
                    values.setdefault(name, []).append(value)
        return {name: float(np.mean(parts)) for name, parts in sorted(values.items())}

    def cost(self, model: ResolvedModel, bytes_per_value: int) -> Cost:
        episodes = self.episodes
        peak = worst([cell.peak for _, cell in self.cells])
        context = max((episode.peak_context for episode in episodes), default=0)
        values_per_token = 2 * model.num_layers * model.num_kv_heads * model.head_dim  # keys and values
        judged = _summed(episode.reward_parts for episode in episodes)
        return Cost(
            resident_bytes=peak.resident_bytes,
            device_bytes=peak.device_bytes,
            kv_bytes=values_per_token * bytes_per_value * context,
            peak_context=context,
            prompt_tokens=_average([episode.prompt_tokens for episode in episodes]),
            generated_tokens=_average([episode.generated_tokens for episode in episodes]),
            seconds=_average([episode.seconds for episode in episodes]),
            writes=_summed(episode.writes for episode in episodes),
            events=_summed(episode.memory_events for episode in episodes),
            judge={name: value for name, value in judged.items() if name.startswith("judge_")},
        )


@dataclass(frozen=True, slots=True)
class Difference:
    """``label`` minus ``baseline`` on the items that both finished. ``adjusted_p``: Holm, whole report."""

    benchmark: str
    label: str
    baseline: str
    difference: PairedDifference
    adjusted_p: float
    score: str = F1


def summarize(
    cells: Sequence[Cell], results: Mapping[str, CellResult], reasons: Mapping[str, str]
) -> tuple[RowSummary, ...]:
    """The rows in the order of the plan. ``reasons``: why a cell without a result was given up, by key."""
    grouped: dict[tuple[str, str], list[Cell]] = {}
    for cell in cells:
        grouped.setdefault((cell.benchmark, cell.variant.label), []).append(cell)
    return tuple(
        RowSummary(
            benchmark=benchmark,
            label=label,
            max_context_tokens=group[0].config.memory.max_context_tokens,
            cells=tuple((cell.config.seed, results[cell.key]) for cell in group if cell.key in results),
            missing=tuple(
                f"seed {cell.config.seed}: {reasons.get(cell.key, 'not run yet')}"
                for cell in group
                if cell.key not in results
            ),
        )
        for (benchmark, label), group in grouped.items()
    )


def compare_rows(rows: Sequence[RowSummary], baselines: Sequence[tuple[str, str]]) -> tuple[Difference, ...]:
    """Compare each row with its baseline on each benchmark, by F1, or by the reward (``primary_of``)."""
    by_name = {(row.benchmark, row.label): row for row in rows}
    pairs = [
        (row, by_name[row.benchmark, baseline])
        for row in rows
        for label, baseline in baselines
        if label == row.label and (row.benchmark, baseline) in by_name
    ]
    scores = {benchmark: primary_of(rows, benchmark) for benchmark, _ in by_name}
    differences = [
        paired_by_item(other.values(score), row.values(score))
        for row, other in pairs
        for score in (scores[row.benchmark],)
    ]
    adjusted = adjusted_p_values(differences)
    return tuple(
        Difference(row.benchmark, row.label, other.label, difference, p, scores[row.benchmark])
        for (row, other), difference, p in zip(pairs, differences, adjusted, strict=True)
    )


def primary_of(rows: Sequence[RowSummary], benchmark: str) -> str:
    """The score by which the rows of ``benchmark`` are compared."""
    return primary_score(e for row in rows if row.benchmark == benchmark for e in row.episodes)


def _average(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else float("nan")


def _summed(counts: Iterable[Mapping[str, Number]]) -> dict[str, Number]:
    total: dict[str, Number] = {}
    for count in counts:
        for name, value in count.items():
            total[name] = total[name] + value if name in total else value
    return dict(sorted(total.items()))
