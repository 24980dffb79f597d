"""The end of a run for people: the table of evaluation rows, what the difference means, and the same as Markdown, CSV, JSON and a plot."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import rich.table
from rich.box import SIMPLE

from cluster.measure.rows import RowResult, compare
from cluster.measure.statistics import Interval, PairedDifference, adjusted_p_values

HEADER = ("row", "tasks", "F1 % [95% CI]", "EM % [95% CI]", "writes", "tokens", "s/ep")
LEGEND = (
    "writes: accepted/empty/rolled back · tokens: read+generated per episode · s/ep: seconds per episode · intervals: bootstrap over tasks · "
    "p: sign-flip test over tasks, adjusted for all comparisons of this report (Holm)"
)
MOST_CATEGORIES = 12
UNANSWERABLE = "adversarial"  # LoCoMo's category 5 has no plain answer: means are reported with and without it (method: section on LoCoMo)


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two rows on the same tasks, and what a person should conclude. ``adjusted_p``: over all of the report (Holm); NaN without a task."""

    before: str
    after: str
    score: str
    difference: PairedDifference
    adjusted_p: float

    @property
    def sentence(self) -> str:
        d = self.difference
        if d.count == 0:
            return f"{self.after} and {self.before} share no finished task: nothing can be compared."
        interval = f"[{100 * d.low:+.1f}, {100 * d.high:+.1f}]"
        figures = f"{self.score.upper()} {100 * d.mean:+.1f} points {interval}, p = {self.adjusted_p:.3f} (paired, {d.count} tasks)"
        if self.adjusted_p >= 0.05:
            verdict = "NOT significant: this run shows no difference. More train.steps or more evaluation.tasks may."
        elif d.mean > 0:
            verdict = "a significant gain."
        else:
            verdict = "a significant LOSS."
        return f"{self.after} against {self.before}: {figures}: {verdict}"


@dataclass(frozen=True, slots=True)
class Report:
    """All rows of a run with the settings of its bootstrap. ``rewards`` is the mean reward of each training step, in order."""

    rows: tuple[RowResult, ...]
    rewards: tuple[float, ...]
    samples: int
    seed: int
    temperature: float  # of the evaluation

    @property
    def title(self) -> str:
        return f"Held-out evaluation, {decoding(self.temperature)}"

    def comparisons(self, pairs: Sequence[tuple[str, str]]) -> list[Comparison]:
        """F1 of each (before, after) pair of labels of which both rows exist."""
        rows = {row.label: row for row in self.rows}
        found = [(rows[before], rows[after]) for before, after in pairs if before in rows and after in rows]
        differences = [compare(b, a, "f1", self.samples, self.seed) for b, a in found]
        adjusted = adjusted_p_values(differences)
        return [
            Comparison(b.label, a.label, "f1", d, p)
            for (b, a), d, p in zip(found, differences, adjusted, strict=True)
        ]

    def cells(self) -> list[tuple[str, ...]]:
        """One tuple per row, in the order of HEADER."""
        return [self._cells(row) for row in self.rows]

    def category_cells(self, score: str) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """Header and lines of ``score`` by category, a column for each row; no line where there is one category."""
        categories = sorted({category for row in self.rows for category in row.categories})
        lines = []
        for category in categories if len(categories) > 1 else ():
            figures = [row.category_mean(category, score) for row in self.rows]
            lines.append(_category_line(category, figures))
        if UNANSWERABLE in categories and len(categories) > 1:
            lines.append(
                _category_line(
                    f"all but {UNANSWERABLE}", [row.mean_without(UNANSWERABLE, score) for row in self.rows]
                )
            )
        return (f"{score} %", "questions", *(row.label for row in self.rows)), lines

    @property
    def score_names(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for row in self.rows for name in row.score_names))

    def _cells(self, row: RowResult) -> tuple[str, ...]:
        failed = f" ({len(row.failed)} failed)" if row.failed else ""
        tokens = "-"
        if row.episodes:
            tokens = f"{row.per_episode('prompt_tokens'):.0f}+{row.per_episode('generated_tokens'):.0f}"
        return (
            row.label,
            f"{len(row.episodes)}{failed}",
            interval_text(row.interval("f1", self.samples, self.seed)),
            interval_text(row.interval("em", self.samples, self.seed)),
            f"{row.writes('accepted')}/{row.writes('empty')}/{row.writes('rolled_back')}",
            tokens,
            f"{row.per_episode('seconds'):.1f}",
        )


def rich_table(title: str, header: Sequence[str], lines: Sequence[Sequence[str]]) -> rich.table.Table:
    table = rich.table.Table(title=title, title_justify="left", box=SIMPLE, pad_edge=False)
    for number, name in enumerate(header):
        table.add_column(
            name.replace("[", r"\["), justify="left" if number == 0 else "right", no_wrap=number == 0
        )
    for line in lines:
        table.add_row(*(cell.replace("[", r"\[") for cell in line))
    return table


def save_report(report: Report, comparisons: Sequence[Comparison], folder: Path) -> list[Path]:
    """Write report.md, report.csv, report.json and, with at least one training step, reward.png; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    written = [
        _save_markdown(report, comparisons, folder),
        _save_csv(report, folder),
        _save_json(report, comparisons, folder),
    ]
    if report.rewards:
        written.append(_save_plot(report.rewards, folder))
    return written


def _save_markdown(report: Report, comparisons: Sequence[Comparison], folder: Path) -> Path:
    lines = [f"# {report.title}", "", *markdown_table(HEADER, report.cells()), "", LEGEND, ""]
    for score in report.score_names:
        header, by_category = report.category_cells(score)
        if by_category:
            lines += [f"## {score} by category", "", *markdown_table(header, by_category), ""]
    lines += [f"- {comparison.sentence}" for comparison in comparisons]
    path = folder / "report.md"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def _save_csv(report: Report, folder: Path) -> Path:
    path = folder / "report.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(
            (
                "row",
                "version",
                "tasks",
                "failed",
                "score",
                "mean",
                "low",
                "high",
                "accepted",
                "empty",
                "rolled_back",
            )
        )
        for row in report.rows:
            for name in row.score_names:
                interval = row.interval(name, report.samples, report.seed)
                writes = (row.writes("accepted"), row.writes("empty"), row.writes("rolled_back"))
                figures = (interval.mean, interval.low, interval.high)
                writer.writerow(
                    (
                        row.label,
                        row.policy_version,
                        len(row.episodes),
                        len(row.failed),
                        name,
                        *figures,
                        *writes,
                    )
                )
    return path


def _save_json(report: Report, comparisons: Sequence[Comparison], folder: Path) -> Path:
    rows = [
        {
            "label": row.label,
            "policy_version": row.policy_version,
            "tasks": len(row.episodes),
            "failed": list(row.failed),
            "scores": {
                name: plain_json(asdict(row.interval(name, report.samples, report.seed)))
                for name in row.score_names
            },
            "writes": {outcome: row.writes(outcome) for outcome in ("accepted", "empty", "rolled_back")},
        }
        for row in report.rows
    ]
    compared = [
        {**plain_json(asdict(comparison.difference)), "before": comparison.before, "after": comparison.after}
        for comparison in comparisons
    ]
    path = folder / "report.json"
    path.write_text(
        json.dumps({"rows": rows, "comparisons": compared, "rewards": list(report.rewards)}, indent=1),
        encoding="utf-8",
    )
    return path


def _save_plot(rewards: Sequence[float], folder: Path) -> Path:
    """Reward per step with its running mean over the last ten steps."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.add_subplot()
    steps = list(range(1, len(rewards) + 1))
    running = [sum(rewards[max(0, step - 10) : step]) / min(step, 10) for step in steps]
    axes.plot(
        steps, rewards, marker="o", markersize=3, linewidth=0.8, alpha=0.5, label="mean reward of the step"
    )
    axes.plot(steps, running, linewidth=2, label="mean of the last 10 steps")
    axes.set_xlabel("training step")
    axes.set_ylabel("reward")
    axes.legend(frameon=False)
    path = folder / "reward.png"
    FigureCanvasAgg(figure)
    figure.savefig(path)
    return path


def markdown_table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    rows = [header, ["---"] * len(header), *lines]
    return ["| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |" for row in rows]


def _category_line(name: str, figures: Sequence[tuple[float, int]]) -> tuple[str, ...]:
    return (name, str(max(count for _, count in figures)), *(percent(mean) for mean, _ in figures))


def interval_text(interval: Interval) -> str:
    return (
        "-"
        if interval.count == 0
        else f"{100 * interval.mean:.1f} [{100 * interval.low:.1f}, {100 * interval.high:.1f}]"
    )


def decoding(temperature: float) -> str:
    """How an evaluation's episodes were sampled, in words."""
    return f"sampled at temperature {temperature:g}" if temperature > 0 else "greedy"


def percent(value: float) -> str:
    return f"{100 * value:.1f}" if math.isfinite(value) else "-"


def plain_json(values: dict[str, float]) -> dict[str, float | None]:
    """JSON has no NaN."""
    return {key: value if math.isfinite(value) else None for key, value in values.items()}


@dataclass(frozen=True, slots=True)
class Table:
    """Figures beside the cases, ready to show."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
