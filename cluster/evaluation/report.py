"""The tables of an evaluation: for the terminal, and as report.md, report.csv (one figure a line) and report.json."""

from __future__ import annotations

import csv
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from actors.types import Answer
from cluster.evaluation.plan import slug
from cluster.evaluation.summary import Bootstrap, Chosen, Cost, Difference, RowSummary
from cluster.measure.report import UNANSWERABLE, interval_text, markdown_table, percent, plain_json
from cluster.measure.statistics import Interval

SCORES_LEGEND = (
    "Intervals: 95 % bootstrap over different questions, seeds pooled. p: sign-flip test, paired with the baseline, adjusted for all "
    "{count} comparison(s) of this report (Holm)."
)
COST_LEGEND = (
    "Per episode: tokens read (each context once) + generated, seconds. writes: accepted/empty/rolled back. Memory: the worst of a worker while the "
    "row ran, with all that the engine reserves; KV: computed for the longest context."
)
COST_HEADER = (
    "row",
    "tokens",
    "s/ep",
    "longest context",
    "KV MiB",
    "memory MiB",
    "GPU MiB",
    "writes",
    "judge",
)
_MIB = 1024 * 1024
_MOST_MESSAGES = 3  # different failures shown of each row


@dataclass(frozen=True, slots=True)
class Table:
    title: str
    header: tuple[str, ...]
    lines: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True)
class ComparisonReport:
    """Everything that is shown. ``costs`` has one entry for each of ``rows``; ``facts`` are the lines above all tables."""

    facts: Mapping[str, str]
    rows: tuple[RowSummary, ...]
    costs: tuple[Cost, ...]
    differences: tuple[Difference, ...]
    bootstrap: Bootstrap

    @property
    def benchmarks(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(row.benchmark for row in self.rows))

    def of(self, benchmark: str) -> list[tuple[RowSummary, Cost]]:
        return [
            (row, cost) for row, cost in zip(self.rows, self.costs, strict=True) if row.benchmark == benchmark
        ]

    @property
    def scores_legend(self) -> str:
        return SCORES_LEGEND.format(count=sum(one.difference.count > 0 for one in self.differences))

    def scores(self, benchmark: str) -> Table:
        rows = [row for row, _ in self.of(benchmark)]
        names, parts = score_names(rows), sorted({part for row in rows for part in row.reward_parts()})
        compared = {one.label: one for one in self.differences if one.benchmark == benchmark}
        baselines = sorted({one.baseline for one in compared.values()})
        against = f"F1 against {baselines[0] if len(baselines) == 1 else 'its baseline'}"
        header = [
            "row",
            "tasks",
            *(f"{_shown(name)} % [95% CI]" for name in names),
            *parts,
            *((against, "p") if compared else ()),
        ]
        lines = []
        for row in rows:
            line = [
                row.label,
                _tasks(row),
                *(interval_text(row.interval(name, self.bootstrap)) for name in names),
            ]
            line += [
                f"{row.reward_parts()[part]:.3f}" if part in row.reward_parts() else "-" for part in parts
            ]
            lines.append((*line, *(_difference(compared.get(row.label)) if compared else ())))
        return Table(f"{benchmark}: scores", tuple(header), tuple(lines))

    def categories(self, benchmark: str, score: str) -> Table:
        """A column for each category, and one without the questions that have no answer; no line where there is one category."""
        rows = [row for row, _ in self.of(benchmark)]
        columns = [
            (name, [row.interval(score, self.bootstrap, chosen) for row in rows])
            for name, chosen in groups(rows)
        ]
        header = [f"{name} ({max(interval.count for interval in intervals)})" for name, intervals in columns]
        lines = [
            (row.label, *(percent(intervals[place].mean) for _, intervals in columns))
            for place, row in enumerate(rows)
            if columns
        ]
        return Table(f"{benchmark}: {_shown(score)} % by category (tasks)", ("row", *header), tuple(lines))

    def cost(self, benchmark: str) -> Table:
        return Table(
            f"{benchmark}: cost",
            COST_HEADER,
            tuple(_cost_cells(row, cost) for row, cost in self.of(benchmark)),
        )

    def events(self, benchmark: str) -> list[str]:
        """What each memory did and where the model failed to keep to a form, summed over its episodes."""
        return [
            f"{row.label}: {', '.join(f'{name} {count}' for name, count in cost.events.items())}"
            for row, cost in self.of(benchmark)
            if cost.events
        ]

    def problems(self) -> list[str]:
        found = []
        for row in self.rows:
            found += [f"{row.benchmark}, {row.label}: NOT MEASURED, {reason}" for reason in row.missing]
            for message, count in Counter(row.failed).most_common(_MOST_MESSAGES):
                found.append(
                    f"{row.benchmark}, {row.label}: {count} episode(s) failed and are left out: {message}"
                )
            unmeasured = next((cell.peak.problem for _, cell in row.cells if cell.peak.problem), "")
            found += [f"{row.benchmark}, {row.label}: no peak memory: {unmeasured}"] if unmeasured else []
        return found

    def verdicts(self) -> list[str]:
        return [_verdict(one) for one in self.differences]

    def metrics(self) -> dict[str, float]:
        """For the tracker, flat: eval/<benchmark>/<row>/<measure>; what is unknown is left out."""
        found = {
            f"eval/{slug(row.benchmark)}/{slug(row.label)}/{slug(name)}": value.mean
            for row, cost in zip(self.rows, self.costs, strict=True)
            for name, value in self._overall(row, cost).items()
        }
        return {key: value for key, value in found.items() if math.isfinite(value)}

    def figures(self) -> Iterator[tuple[str, str, str, str, Interval]]:
        """(benchmark, row, measure, category or "", value) of every figure; a cost has no interval."""
        for row, cost in zip(self.rows, self.costs, strict=True):
            for name, value in self._overall(row, cost).items():
                yield row.benchmark, row.label, name, "", value
            for group, chosen in groups([row]):
                for name in score_names([row]):
                    yield row.benchmark, row.label, name, group, row.interval(name, self.bootstrap, chosen)

    def _overall(self, row: RowSummary, cost: Cost) -> dict[str, Interval]:
        scores = {name: row.interval(name, self.bootstrap) for name in score_names([row])}
        plain = {**row.reward_parts(), **_flat(cost), "failed_episodes": float(len(row.failed))}
        return {
            **scores,
            **{name: Interval(value, math.nan, math.nan, len(row.episodes)) for name, value in plain.items()},
        }


def score_names(rows: Sequence[RowSummary]) -> tuple[str, ...]:
    """f1 and em first, then what else the scorers report."""
    names = {name for row in rows for answer in row.answers for name in answer.scores}
    return tuple(name for name in ("f1", "em", *sorted(names - {"f1", "em"})) if name in names)


def groups(rows: Sequence[RowSummary]) -> list[tuple[str, Chosen]]:
    """Categories of the answers, by name; none where there is only one."""
    names = sorted({answer.category for row in rows for answer in row.answers})
    if len(names) < 2:
        return []
    found: list[tuple[str, Chosen]] = [(name, _is(name)) for name in names]
    if UNANSWERABLE in names:
        found.append((f"all but {UNANSWERABLE}", lambda answer: answer.category != UNANSWERABLE))
    return found


def save_comparison(report: ComparisonReport, plots: Sequence[Path], folder: Path) -> list[Path]:
    """report.md, report.csv and report.json; returns their paths."""
    paths = [folder / name for name in ("report.md", "report.csv", "report.json")]
    found = list(report.figures())
    paths[0].write_text(markdown(report, plots), encoding="utf-8")
    with paths[1].open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("benchmark", "row", "measure", "category", "value", "low", "high", "items"))
        for benchmark, label, name, group, value in found:
            writer.writerow(
                (
                    benchmark,
                    label,
                    name,
                    group,
                    *(_blank(number) for number in (value.mean, value.low, value.high)),
                    value.count,
                )
            )
    figures = [
        {"benchmark": b, "row": r, "measure": m, "category": c, **plain_json(asdict(value))}
        for b, r, m, c, value in found
    ]
    compared = [
        {
            "benchmark": d.benchmark,
            "row": d.label,
            "baseline": d.baseline,
            **plain_json({**asdict(d.difference), "adjusted_p": d.adjusted_p}),
        }
        for d in report.differences
    ]
    content = {
        "facts": dict(report.facts),
        "figures": figures,
        "comparisons": compared,
        "problems": report.problems(),
    }
    paths[2].write_text(json.dumps(content, indent=1), encoding="utf-8")
    return paths


def markdown(report: ComparisonReport, plots: Sequence[Path]) -> str:
    lines = ["# Evaluation", "", *(f"- {key}: {value}" for key, value in report.facts.items())]
    for benchmark in report.benchmarks:
        lines += ["", f"## {benchmark}", "", *_markdown(report.scores(benchmark)), "", report.scores_legend]
        for score in score_names([row for row, _ in report.of(benchmark)]):
            table = report.categories(benchmark, score)
            lines += (
                ["", f"### {_shown(score)} % by category (tasks)", "", *_markdown(table)]
                if table.lines
                else []
            )
        lines += ["", "### Cost", "", *_markdown(report.cost(benchmark)), "", COST_LEGEND]
        events = report.events(benchmark)
        lines += ["", "### What the memories did", "", *(f"- {event}" for event in events)] if events else []
        own = [plot for plot in plots if plot.name.startswith(f"{slug(benchmark)}-")]
        lines += ["", *(f"![{plot.stem}]({plot.name})" for plot in own)] if own else []
    for title, found in (("Comparisons", report.verdicts()), ("Problems", report.problems())):
        lines += ["", f"## {title}", "", *(f"- {line}" for line in found)] if found else []
    return "\n".join(lines) + "\n"


def _markdown(table: Table) -> list[str]:
    return markdown_table(table.header, table.lines)


def _is(name: str) -> Chosen:
    def chosen(answer: Answer) -> bool:
        return answer.category == name

    return chosen


def _shown(score: str) -> str:
    return score.upper() if score in ("f1", "em") else score


def _tasks(row: RowSummary) -> str:
    repeated = f" of {row.items} questions" if row.items != len(row.episodes) else ""
    notes = [f"{len(row.failed)} failed"] if row.failed else []
    notes += (
        [f"{len(row.missing)} of {len(row.missing) + len(row.cells)} cells missing"] if row.missing else []
    )
    noted = f" ({', '.join(notes)})" if notes else ""
    return f"{len(row.episodes)}{repeated}{noted}"


def _difference(one: Difference | None) -> tuple[str, str]:
    if one is None or one.difference.count == 0:
        return "-", "-"
    d = one.difference
    return f"{100 * d.mean:+.1f} [{100 * d.low:+.1f}, {100 * d.high:+.1f}]", f"{one.adjusted_p:.3f}"


def _verdict(one: Difference) -> str:
    d = one.difference
    if d.count == 0:
        return f"{one.benchmark}: {one.label} and {one.baseline} share no finished task: nothing can be compared."
    change, p = _difference(one)
    verdict = (
        "NOT significant"
        if one.adjusted_p >= 0.05
        else ("a significant gain" if d.mean > 0 else "a significant LOSS")
    )
    return f"{one.benchmark}: {one.label} against {one.baseline}: F1 {change} points on {d.count} questions, adjusted p = {p}: {verdict}."


def _cost_cells(row: RowSummary, cost: Cost) -> tuple[str, ...]:
    judge = ", ".join(f"{name.removeprefix('judge_')} {value:g}" for name, value in cost.judge.items()) or "-"
    memory = "-" if cost.resident_bytes is None else f"{cost.resident_bytes / _MIB:.0f}"
    writes = "/".join(str(cost.writes.get(outcome, 0)) for outcome in ("accepted", "empty", "rolled_back"))
    if not row.episodes:
        return (row.label, *("-" for _ in COST_HEADER[1:]))
    tokens = f"{cost.prompt_tokens:.0f}+{cost.generated_tokens:.0f}"
    device = f"{cost.device_bytes / _MIB:.0f}" if cost.device_bytes else "-"
    return (
        row.label,
        tokens,
        f"{cost.seconds:.1f}",
        str(cost.peak_context),
        f"{cost.kv_bytes / _MIB:.1f}",
        memory,
        device,
        writes,
        judge,
    )


def _flat(cost: Cost) -> dict[str, float]:
    plain = {
        "prompt_tokens": cost.prompt_tokens,
        "generated_tokens": cost.generated_tokens,
        "seconds": cost.seconds,
        "peak_context": float(cost.peak_context),
        "kv_bytes": float(cost.kv_bytes),
        "memory_bytes": math.nan if cost.resident_bytes is None else float(cost.resident_bytes),
        "gpu_bytes": float(cost.device_bytes),
    }
    counted = {
        **{f"writes_{name}": count for name, count in cost.writes.items()},
        **{f"event_{name}": count for name, count in cost.events.items()},
    }
    return {**plain, **{name: float(count) for name, count in counted.items()}, **cost.judge}


def _blank(value: float) -> str:
    return f"{value:.6g}" if math.isfinite(value) else ""
