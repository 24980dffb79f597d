"""The report of an evaluation: tables, plots and files, from the rows' summaries.

Plots: each row's scores with their intervals; the score against what it costs, a point for each row; the
score against L_max, where it was swept.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from cluster.common.failures import most_common_failures
from cluster.evaluation.plan import L_MAX, slug
from cluster.evaluation.summary import Cost, Difference, RowSummary, primary_of
from cluster.measure.card_counts import cards_table
from cluster.measure.collapse import HEADER as COLLAPSE_HEADER
from cluster.measure.collapse import LEGEND as COLLAPSE_LEGEND
from cluster.measure.collapse import collapse_cells, collapse_figures
from cluster.measure.report import (
    MOST_CATEGORIES,
    Curve,
    Document,
    Panel,
    Section,
    Table,
    comparison_sentence,
    p_text,
    percent,
    save_document,
    save_plot,
    save_rows_plot,
)
from cluster.measure.row_metrics import kinds_table
from cluster.measure.rows import OUTCOMES, answer_groups, failed_as_zero, has_own_reward
from cluster.measure.scores import F1, REWARD, label, number_text, score_order, score_text, unit
from cluster.measure.statistics import Interval

SCORES_LEGEND = (
    "tasks: finished episodes. failed: episodes that did not finish; they are in no mean. "
    "Intervals: 95 %, over different questions, seeds pooled (Korn and Graubard's; Clopper and Pearson's "
    "for scores of 0 or 1). p: the same test, paired with the baseline; below 0.05 where the interval leaves "
    "0 out. Holm p: adjusted for all {count} comparison(s) of this report."
)
COST_LEGEND = (
    "Per episode: tokens read (each context once) + generated, seconds. writes: accepted/empty/rolled back. "
    "Memory: the worst of a worker while the row ran, with all that the engine reserves; "
    "KV: computed for the longest context."
)
COST_HEADER = (
    *("row", "tokens", "s/ep", "longest context", "KV MiB", "memory MiB", "GPU MiB"),
    *("writes", "judge"),
)
_MIB = 1024 * 1024
_MOST_MESSAGES = 3  # different failures shown of each row


@dataclass(frozen=True, slots=True)
class ComparisonReport:
    """``costs`` has one entry for each of ``rows``. ``facts``: the lines above all tables."""

    facts: Mapping[str, str]
    rows: tuple[RowSummary, ...]
    costs: tuple[Cost, ...]
    differences: tuple[Difference, ...]

    @property
    def benchmarks(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(row.benchmark for row in self.rows))

    def document(self, plots: Mapping[str, Sequence[Path]] | None = None) -> Document:
        """``plots``: by benchmark."""
        sections = [
            self._section(benchmark, (plots or {}).get(benchmark, ())) for benchmark in self.benchmarks
        ]
        sections.append(Section("Comparisons", notes=tuple(map(_verdict, self.differences))))
        sections.append(Section("Problems", notes=tuple(self.problems())))
        return Document("Evaluation", self.facts, tuple(sections))

    def of(self, benchmark: str) -> list[tuple[RowSummary, Cost]]:
        pairs = zip(self.rows, self.costs, strict=True)
        return [(row, cost) for row, cost in pairs if row.benchmark == benchmark]

    def problems(self) -> list[str]:
        """Cells that were not measured, episodes that failed, peaks that are unknown."""
        problems = []
        for row in self.rows:
            problems += [f"{row.benchmark}, {row.label}: NOT MEASURED, {reason}" for reason in row.missing]
            for message, count in most_common_failures(row.failed, _MOST_MESSAGES):
                failed = f"{count} episode(s) failed and are left out"
                problems.append(f"{row.benchmark}, {row.label}: {failed}: {message}")
            if row.failed:
                score = primary_of(self.rows, row.benchmark)
                as_zero = failed_as_zero(row.interval(score).mean, len(row.episodes), len(row.failed))
                would_be = f"{label(score)} would be {number_text(score, as_zero)}{unit(score)}"
                counted = f"with all {len(row.failed)} failed episodes counted as 0, {would_be}"
                problems.append(f"{row.benchmark}, {row.label}: {counted}")
            unmeasured = next((cell.peak.problem for _, cell in row.cells if cell.peak.problem), "")
            problems += [f"{row.benchmark}, {row.label}: no peak memory: {unmeasured}"] if unmeasured else []
        return problems

    def metrics(self) -> dict[str, float]:
        """For the tracker: eval/<benchmark>/<row>/<measure>. What is unknown is left out."""
        figures = {
            f"eval/{slug(row.benchmark)}/{slug(row.label)}/{slug(name)}": value.mean
            for row, cost in zip(self.rows, self.costs, strict=True)
            for name, value in self._overall(row, cost).items()
        }
        return {key: value for key, value in figures.items() if math.isfinite(value)}

    def figures(self) -> Iterator[dict[str, object]]:
        """Every figure for JSON and CSV. ``category`` is "" for all answers. A cost has no interval."""
        for row, cost in zip(self.rows, self.costs, strict=True):
            figures = [(name, "", value) for name, value in self._overall(row, cost).items()]
            for member in row.members:
                part = row.of_member(member)
                figures += [
                    (score, f"environment {member}", part.interval(score)) for score in _scores([part])
                ]
            figures += [
                (score, group, row.interval(score, chosen))
                for group, chosen in answer_groups(row.answers).items()
                for score in _scores([row])
                if score != REWARD
            ]
            for measure, category, value in figures:
                where = {
                    "benchmark": row.benchmark,
                    "row": row.label,
                    "measure": measure,
                    "category": category,
                }
                numbers = {"value": value.mean, "low": value.low, "high": value.high, "items": value.count}
                yield {**where, **numbers}

    def _section(self, benchmark: str, plots: Sequence[Path]) -> Section:
        rows = [row for row, _ in self.of(benchmark)]
        scores = [score for score in _scores(rows) if score != REWARD]
        tables = [
            self._score_table(benchmark),
            _environment_table(rows),
            *(self._categories(rows, score) for score in scores),
        ]
        tables.append(kinds_table({row.label: row.episodes for row in rows}))
        tables.append(cards_table({row.label: row.cards for row in rows}))
        tables += [self._collapse_table(rows), self._cost_table(benchmark), self._events(benchmark)]
        shown = tuple(table for table in tables if table.rows)
        return Section(benchmark, tables=shown, plots=tuple(plots))

    def _score_table(self, benchmark: str) -> Table:
        rows = [row for row, _ in self.of(benchmark)]
        scores, parts = _scores(rows), sorted({part for row in rows for part in row.reward_parts()})
        compared = {d.label: d for d in self.differences if d.benchmark == benchmark}
        baselines = sorted({d.baseline for d in compared.values()})
        baseline = baselines[0] if len(baselines) == 1 else "its baseline"
        against = f"{label(primary_of(rows, benchmark))} against {baseline}"
        titles = (f"{label(score)}{unit(score)} [95% CI]" for score in scores)
        header = ["row", "tasks", "failed", *titles, *parts]
        header += [against, "p", "Holm p"] if compared else []
        lines = []
        for row in rows:
            line = [row.label, _tasks(row), str(len(row.failed))]
            line += [score_text(score, row.interval(score)) for score in scores]
            line += [
                f"{row.reward_parts()[part]:.3f}" if part in row.reward_parts() else "-" for part in parts
            ]
            lines.append((*line, *(_change(compared.get(row.label)) if compared else ())))
        count = sum(d.difference.count > 0 for d in self.differences)
        return Table("Scores", tuple(header), tuple(lines), SCORES_LEGEND.format(count=count))

    def _categories(self, rows: Sequence[RowSummary], score: str) -> Table:
        """A column for each category; without rows where there is one category."""
        groups = answer_groups(answer for row in rows for answer in row.answers)
        columns = {name: [row.interval(score, chosen) for row in rows] for name, chosen in groups.items()}
        counts = {name: max(interval.count for interval in column) for name, column in columns.items()}
        lines = [
            (row.label, *(percent(column[place].mean) for column in columns.values()))
            for place, row in enumerate(rows)
            if columns
        ]
        return Table(
            f"{label(score)} % by category (tasks)",
            ("row", *(f"{name} ({count})" for name, count in counts.items())),
            tuple(lines),
            detail=score != F1 or len(columns) > MOST_CATEGORIES,
        )

    def _collapse_table(self, rows: Sequence[RowSummary]) -> Table:
        lines = [(row.label, *collapse_cells(row.answers, row.extractions)) for row in rows]
        return Table("Answers and flashcards", ("row", *COLLAPSE_HEADER), tuple(lines), COLLAPSE_LEGEND)

    def _cost_table(self, benchmark: str) -> Table:
        lines = [_cost_cells(row, cost) for row, cost in self.of(benchmark)]
        return Table("Cost", COST_HEADER, tuple(lines), COST_LEGEND)

    def _events(self, benchmark: str) -> Table:
        """What each memory did, and where the model did not keep to a form."""
        lines = [
            (row.label, ", ".join(f"{name} {count}" for name, count in cost.events.items()))
            for row, cost in self.of(benchmark)
            if cost.events
        ]
        return Table("What the memories did", ("row", "events, summed over the episodes"), tuple(lines))

    def _overall(self, row: RowSummary, cost: Cost) -> dict[str, Interval]:
        scores = {score: row.interval(score) for score in _scores([row])}
        plain = {**row.reward_parts(), **_flat(cost), "failed_episodes": float(len(row.failed))}
        plain |= collapse_figures(row.answers, row.extractions)
        plain |= row.cards.shares if row.cards is not None else {}
        count = len(row.episodes)
        return scores | {name: Interval(value, math.nan, math.nan, count) for name, value in plain.items()}


def _environment_table(rows: Sequence[RowSummary]) -> Table:
    """With environment.mix: each row's episodes of each environment apart."""
    parts = [(row.label, member, row.of_member(member)) for row in rows for member in row.members]
    scores = _scores([part for _, _, part in parts])
    lines = []
    for name, member, part in parts:
        shown = (score_text(score, part.interval(score)) for score in scores)
        lines.append((name, member, _tasks(part), str(len(part.failed)), *shown))
    titles = (f"{label(score)}{unit(score)} [95% CI]" for score in scores)
    return Table("Scores by environment", ("row", "environment", "tasks", "failed", *titles), tuple(lines))


def save_comparison(report: ComparisonReport, folder: Path) -> list[Path]:
    """Write report.md, report.csv, report.json and the plots; return their paths. Raises OSError."""
    folder.mkdir(exist_ok=True)
    plots = {benchmark: save_plots(report.of(benchmark), folder) for benchmark in report.benchmarks}
    figures = list(report.figures())
    comparisons = [
        {"benchmark": d.benchmark, "row": d.label, "baseline": d.baseline}
        | asdict(d.difference)
        | {"adjusted_p": d.adjusted_p}
        for d in report.differences
    ]
    data = {"facts": report.facts, "figures": figures, "comparisons": comparisons}
    paths = save_document(report.document(plots), folder, {**data, "problems": report.problems()}, figures)
    return [*paths, *(path for drawn in plots.values() for path in drawn)]


# --- cells of the tables ----------------------------------------------------------------------------------


def _scores(rows: Sequence[RowSummary]) -> tuple[str, ...]:
    """What the answers are scored by, and the reward where it is not F1 itself."""
    names = {name for row in rows for answer in row.answers for name in answer.scores}
    own = any(has_own_reward(row.episodes) for row in rows)
    return score_order(names | ({REWARD} if own else set()))


def _tasks(row: RowSummary) -> str:
    repeated = f" of {row.items} questions" if row.items != len(row.episodes) else ""
    missing = f"{len(row.missing)} of {len(row.missing) + len(row.cells)} cells missing"
    noted = f" ({missing})" if row.missing else ""
    return f"{len(row.episodes)}{repeated}{noted}"


def _change(compared: Difference | None) -> tuple[str, str, str]:
    if compared is None or compared.difference.count == 0:
        return "-", "-", "-"
    change = compared.difference
    return score_text(compared.score, change, sign="+"), p_text(change.p_value), p_text(compared.adjusted_p)


def _verdict(d: Difference) -> str:
    sentence = comparison_sentence(d.label, d.baseline, d.difference, d.adjusted_p, "questions", d.score)
    return f"{d.benchmark}: {sentence}"


def _cost_cells(row: RowSummary, cost: Cost) -> tuple[str, ...]:
    if not row.episodes:
        return (row.label, *("-" for _ in COST_HEADER[1:]))
    judge = ", ".join(f"{name.removeprefix('judge_')} {value:g}" for name, value in cost.judge.items())
    return (
        row.label,
        f"{cost.prompt_tokens:.0f}+{cost.generated_tokens:.0f}",
        f"{cost.seconds:.1f}",
        str(cost.peak_context),
        f"{cost.kv_bytes / _MIB:.1f}",
        "-" if cost.resident_bytes is None else f"{cost.resident_bytes / _MIB:.0f}",
        f"{cost.device_bytes / _MIB:.0f}" if cost.device_bytes else "-",
        "/".join(str(cost.writes.get(outcome, 0)) for outcome in OUTCOMES),
        judge or "-",
    )


def _flat(cost: Cost) -> dict[str, float]:
    return {
        "prompt_tokens": cost.prompt_tokens,
        "generated_tokens": cost.generated_tokens,
        "seconds": cost.seconds,
        "peak_context": float(cost.peak_context),
        "kv_bytes": float(cost.kv_bytes),
        "memory_bytes": math.nan if cost.resident_bytes is None else float(cost.resident_bytes),
        "gpu_bytes": float(cost.device_bytes),
        **{f"writes_{name}": float(count) for name, count in cost.writes.items()},
        **{f"event_{name}": float(count) for name, count in cost.events.items()},
        **cost.judge,
    }


# --- plots ------------------------------------------------------------------------------------------------


def save_plots(pairs: Sequence[tuple[RowSummary, Cost]], folder: Path) -> list[Path]:
    """Draw one benchmark: rows, cost-tokens, cost-seconds and, with two values of L_max, context.

    Rows without a score are left out; without any there is no plot.
    """
    score = primary_of([row for row, _ in pairs], pairs[0][0].benchmark) if pairs else F1
    drawn = [(row, cost) for row, cost in pairs if row.values(score)]
    if not drawn:
        return []
    rows = [row for row, _ in drawn]
    intervals = {row.label: _in_units(score, row.interval(score)) for row in rows}
    y_label = f"{label(score)}{unit(score)} with 95 % interval"
    tokens = {row.label: cost.prompt_tokens + cost.generated_tokens for row, cost in drawn}
    seconds = {row.label: cost.seconds for row, cost in drawn}
    panels = {
        "cost-tokens": _cost_panel("tokens read and generated per episode", y_label, tokens, intervals),
        "cost-seconds": _cost_panel("seconds per episode", y_label, seconds, intervals),
    }
    if lines := context_lines(rows):
        curves = [
            _curve(
                [row.max_context_tokens for row in line], [intervals[row.label] for row in line], series, name
            )
            for series, (name, line) in enumerate(lines.items())
        ]
        panels["context"] = Panel("memory.max_context_tokens (L_max)", y_label, tuple(curves))
    benchmark = rows[0].benchmark
    scores = {row.label: {label(score): row.interval(score) for score in _scores([row])} for row in rows}
    return [
        save_rows_plot(scores, folder / f"{slug(benchmark)}-rows.png", benchmark),
        *(
            save_plot([replace(panel, title=benchmark)], folder / f"{slug(benchmark)}-{name}.png")
            for name, panel in panels.items()
        ),
    ]


def context_lines(rows: Sequence[RowSummary]) -> dict[str, list[RowSummary]]:
    """Rows that differ only in L_max, in its order, by their label without it. Single rows are left out."""
    lines: dict[str, list[RowSummary]] = {}
    for row in rows:
        words = [word for word in row.label.split() if not word.startswith(f"{L_MAX}=")]
        lines.setdefault(" ".join(words), []).append(row)
    return {
        name: sorted(line, key=lambda row: row.max_context_tokens)
        for name, line in lines.items()
        if len(line) > 1
    }


def _cost_panel(
    x_label: str, y_label: str, xs: Mapping[str, float], intervals: Mapping[str, Interval]
) -> Panel:
    """A point for each row."""
    curves = [_curve([x], [intervals[name]], series, name) for series, (name, x) in enumerate(xs.items())]
    wide = min(xs.values()) > 0 and max(xs.values()) > 10 * min(xs.values())
    return Panel(x_label, y_label, tuple(curves), log_x=wide)


def _curve(xs: Sequence[float], values: Sequence[Interval], series: int, name: str) -> Curve:
    spans = [(value.low, value.high) for value in values]
    return Curve(xs, [value.mean for value in values], series, name, "dots", spans)


def _in_units(score: str, value: Interval) -> Interval:
    """``value`` as it is drawn: shares in percent."""
    factor = 1 if score == REWARD else 100
    return Interval(factor * value.mean, factor * value.low, factor * value.high, value.count)
