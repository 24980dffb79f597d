"""The report of a training run: its evaluation rows, what training changed, and the reward by step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cluster.common.failures import most_common_failures
from cluster.measure.card_counts import cards_table
from cluster.measure.collapse import HEADER as COLLAPSE_HEADER
from cluster.measure.collapse import LEGEND as COLLAPSE_LEGEND
from cluster.measure.collapse import collapse_cells, collapse_figures
from cluster.measure.report import (
    MOST_CATEGORIES,
    SIGNIFICANT,
    Curve,
    Document,
    Panel,
    Section,
    Table,
    comparison_sentence,
    decoding,
    percent,
    running_mean,
    save_document,
    save_plot,
    save_rows_plot,
)
from cluster.measure.row_metrics import kinds_table
from cluster.measure.rows import (
    RowResult,
    answer_groups,
    answers_mean,
    compare,
    failed_as_zero,
    primary_score,
)
from cluster.measure.scores import F1, REWARD, label, number_text, score_order, score_text, unit
from cluster.measure.statistics import Interval, PairedDifference, adjusted_p_values

CONTROLS = ("oracle", "other_cards")
"""Keys of the rows that replace the cards of the last policy (actors/memory/controls.py)."""

STAGES = ("memory_off", "before", "after_warm_start", "after_rl", *CONTROLS)
"""Keys of the rows that a run can have, in the order of the table."""

COMPARED = (
    ("before", "after_rl"),
    ("after_warm_start", "after_rl"),
    ("memory_off", "after_rl"),
    ("memory_off", "before"),
)
COUNTS = ("row", "tasks", "failed")
WITH_INTERVALS = (F1, "em", REWARD)  # columns with intervals; the other scores have a mean each
LEGEND = (
    "tasks: finished episodes · failed: episodes that did not finish; they are in no mean · "
    "intervals: 95 %, over tasks (Korn and Graubard's; Clopper and Pearson's for scores of 0 or 1) · "
    "p: the same test; adjusted (Holm): for all comparisons of this report · "
    "both speak of other tasks for this one run; what training does, runs of several seeds tell "
    "(engram train --seeds 0,1,2)"
)
COST_LEGEND = (
    "writes: accepted/empty/rolled back · tokens: read+generated per episode · s/ep: seconds per episode"
)
_MOST_MESSAGES = 3  # different failures shown of each row


@dataclass(frozen=True, slots=True)
class Comparison:
    """``score`` of two rows on the same tasks. ``adjusted_p``: over the report (Holm); NaN without a task."""

    before: str
    after: str
    difference: PairedDifference
    adjusted_p: float
    score: str = F1
    trained: bool = True  # steps of RL lie between the rows

    @property
    def sentence(self) -> str:
        sentence = comparison_sentence(
            self.after, self.before, self.difference, self.adjusted_p, "tasks", self.score
        )
        more = "More train.steps or more evaluation.tasks" if self.trained else "More evaluation.tasks"
        cure = f" {more} may show a difference."
        return sentence + (cure if self.adjusted_p >= SIGNIFICANT else "")


@dataclass(frozen=True, slots=True)
class TrainingReport:
    """Rows by stage with their intervals by score. ``rewards``: the mean reward of each step, in order.

    ``learner_restarts``: how often the run went back to a checkpoint because its learner was lost.
    """

    rows: Mapping[str, RowResult]
    intervals: Mapping[str, Mapping[str, Interval]]
    comparisons: tuple[Comparison, ...]
    rewards: tuple[float, ...]
    temperature: float  # of the evaluation
    learner_restarts: int = 0

    @property
    def title(self) -> str:
        return f"Held-out evaluation, {decoding(self.temperature)}"

    @property
    def score(self) -> str:
        """By which the rows are compared."""
        return primary_score(episode for row in self.rows.values() for episode in row.episodes)

    def document(self, plots: Sequence[Path] = ()) -> Document:
        notes = (*(comparison.sentence for comparison in self.comparisons), *self._failures())
        if self.learner_restarts:
            notes += (f"The learner was lost and started again from a checkpoint {self.learner_restarts} x.",)
        kinds = kinds_table({row.label: row.episodes for row in self.rows.values()})
        cards = cards_table({row.label: row.cards for row in self.rows.values()})
        shown = tuple(table for table in (kinds, cards) if table.rows)
        tables = (
            self._scores(),
            *self._by_environment(),
            *self._parts(),
            *shown,
            self._collapse(),
            self._costs(),
            *self._by_category(),
        )
        return Document(self.title, {}, (Section("", tables=tables, notes=notes, plots=tuple(plots)),))

    def data(self) -> dict[str, Any]:
        """The content of report.json. ``compare`` reads the rewards."""
        rows = [
            {
                "label": row.label,
                "policy_version": row.policy_version,
                "tasks": len(row.episodes),
                "failed": row.failed,
                "scores": self.intervals[stage],
                "writes": row.writes,
                **collapse_figures(row.answers, row.extractions),
                **(row.cards.shares if row.cards is not None else {}),
            }
            for stage, row in self.rows.items()
        ]
        comparisons = [
            {
                **asdict(comparison.difference),
                "before": comparison.before,
                "after": comparison.after,
                "score": comparison.score,
            }
            for comparison in self.comparisons
        ]
        restarts = {"learner_restarts": self.learner_restarts}
        return {"rows": rows, "comparisons": comparisons, "rewards": self.rewards, **restarts}

    def csv_lines(self) -> Iterator[dict[str, object]]:
        """A line for each row and score."""
        for stage, row in self.rows.items():
            counts = {"tasks": len(row.episodes), "failed": len(row.failed)}
            for score, interval in self.intervals[stage].items():
                figures = {"mean": interval.mean, "low": interval.low, "high": interval.high}
                where = {"row": row.label, "version": row.policy_version, **counts, "score": score}
                yield {**where, **figures, **row.writes}

    def _scores(self) -> Table:
        names = score_order({score for scores in self.intervals.values() for score in scores})
        if self.score == REWARD and not any(row.members for row in self.rows.values()):
            names = (REWARD,)  # no answer has a score
        lines = [
            (row.label, *_counts(row), *_score_cells(self.intervals[stage], names))
            for stage, row in self.rows.items()
        ]
        return Table("", (*COUNTS, *_score_titles(names)), tuple(lines), LEGEND)

    def _by_environment(self) -> Iterator[Table]:
        """With environment.mix: each row's episodes of each environment apart."""
        parts = [row.of_member(name) for row in self.rows.values() for name in row.members]
        names = score_order({score for part in parts for score in part.score_names})
        lines = []
        for row in self.rows.values():
            for member in row.members:
                part = row.of_member(member)
                scores = {score: part.interval(score) for score in part.score_names}
                lines.append((row.label, member, *_counts(part), *_score_cells(scores, names)))
        if lines:
            header = ("row", "environment", *COUNTS[1:], *_score_titles(names))
            yield Table("Scores by environment", header, tuple(lines))

    def _parts(self) -> Iterator[Table]:
        """The parts of a reward that the configuration makes, and the reward itself."""
        parts = {row.label: row.weighed_parts() for row in self.rows.values()}
        names = sorted({name for means in parts.values() for name in means})
        lines = [
            (row.label, f"{row.per_episode(REWARD):.3f}", *_numbers(parts[row.label], names))
            for row in self.rows.values()
        ]
        if names:
            yield Table("Reward and its parts", ("row", REWARD, *names), tuple(lines))

    def _collapse(self) -> Table:
        lines = [(row.label, *collapse_cells(row.answers, row.extractions)) for row in self.rows.values()]
        return Table("Answers and flashcards", ("row", *COLLAPSE_HEADER), tuple(lines), COLLAPSE_LEGEND)

    def _costs(self) -> Table:
        lines = [_cost_cells(row) for row in self.rows.values()]
        return Table("Writes and cost", ("row", "writes", "tokens", "s/ep"), tuple(lines), COST_LEGEND)

    def _by_category(self) -> Iterator[Table]:
        """For each score a line for each category, and a column for each row of the run."""
        rows = list(self.rows.values())
        groups = answer_groups(answer for row in rows for answer in row.answers)
        for score in dict.fromkeys(score for scores in self.intervals.values() for score in scores):
            if score == REWARD:
                continue
            lines = []
            for name, chosen in groups.items():
                means = [answers_mean(row.answers, score, chosen) for row in rows]
                questions = str(max(count for _, count in means))
                lines.append((name, questions, *(percent(mean) for mean, _ in means)))
            if lines:
                header = (f"{score} %", "questions", *(row.label for row in rows))
                detail = score != "f1" or len(lines) > MOST_CATEGORIES
                yield Table(f"{score} by category", header, tuple(lines), detail=detail)

    def _failures(self) -> Iterator[str]:
        for row in self.rows.values():
            for message, count in most_common_failures(row.failed, _MOST_MESSAGES):
                yield f"{row.label}: {count} episode(s) failed: {message}"
            if row.failed:
                mean = float(np.mean(values)) if (values := row.values(self.score)) else 0.0
                as_zero = failed_as_zero(mean, len(row.episodes), len(row.failed))
                would_be = (
                    f"{label(self.score)} would be {number_text(self.score, as_zero)}{unit(self.score)}"
                )
                yield f"{row.label}: with all {len(row.failed)} failed episodes counted as 0, {would_be}"


def _numbers(values: Mapping[str, float], names: Sequence[str]) -> Iterator[str]:
    yield from (f"{values[name]:.3f}" if name in values else "-" for name in names)


def _counts(row: RowResult) -> tuple[str, str]:
    return str(len(row.episodes)), str(len(row.failed))


def _score_titles(names: Sequence[str]) -> Iterator[str]:
    """Titles of the scores with intervals, then of the others."""
    yield from (f"{label(name)}{unit(name)} [95% CI]" for name in names if name in WITH_INTERVALS)
    yield from (f"{name} %" for name in names if name not in WITH_INTERVALS)


def _score_cells(scores: Mapping[str, Interval], names: Sequence[str]) -> Iterator[str]:
    for name in (name for name in names if name in WITH_INTERVALS):
        yield score_text(name, scores[name]) if name in scores and scores[name].count else "-"
    for name in (name for name in names if name not in WITH_INTERVALS):
        yield percent(scores[name].mean) if name in scores and scores[name].count else "-"


def _cost_cells(row: RowResult) -> tuple[str, ...]:
    tokens = "-"
    if row.episodes:
        tokens = f"{row.per_episode('prompt_tokens'):.0f}+{row.per_episode('generated_tokens'):.0f}"
    return (row.label, "/".join(map(str, row.writes.values())), tokens, f"{row.per_episode('seconds'):.1f}")


def training_report(
    rows: Mapping[str, RowResult],
    rewards: Sequence[float],
    temperature: float,
    learner_restarts: int = 0,
) -> TrainingReport:
    """Compute the figures once."""
    ordered = {stage: rows[stage] for stage in STAGES if stage in rows}
    stages = [pair for pair in COMPARED if set(pair) <= rows.keys()]
    pairs = [(rows[before], rows[after]) for before, after in stages]
    score = primary_score(episode for row in ordered.values() for episode in row.episodes)
    differences = [compare(before, after, score) for before, after in pairs]
    return TrainingReport(
        rows=ordered,
        intervals={
            stage: {score: row.interval(score) for score in row.score_names} for stage, row in ordered.items()
        },
        comparisons=tuple(
            Comparison(before.label, after.label, difference, p, score, trained=stage == "after_rl")
            for (before, after), (_, stage), difference, p in zip(
                pairs, stages, differences, adjusted_p_values(differences), strict=True
            )
        ),
        rewards=tuple(rewards),
        temperature=temperature,
        learner_restarts=learner_restarts,
    )


def save_report(report: TrainingReport, folder: Path) -> list[Path]:
    """Write report.md, report.csv, report.json, rows.png and, after a training step, reward.png.

    Raises OSError.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = {row.label: report.intervals[stage] for stage, row in report.rows.items()}
    plots = [save_rows_plot(rows, folder / "rows.png", report.title)] if rows else []
    if report.rewards:
        plots.append(_save_rewards(report.rewards, folder / "reward.png"))
    lines = list(report.csv_lines())
    return [*save_document(report.document(plots), folder, report.data(), lines), *plots]


def _save_rewards(rewards: Sequence[float], path: Path) -> Path:
    steps = range(1, len(rewards) + 1)
    curves = (
        Curve(steps, rewards, 0, "mean reward of the step", "dots"),
        Curve(steps, running_mean(rewards), 1, "mean of the last 10 steps"),
    )
    return save_plot([Panel("training step", "reward", curves, steps=True)], path)
