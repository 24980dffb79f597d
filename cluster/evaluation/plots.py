"""Score against what it costs, one point a row; score against L_max, one line a row, where it was swept. Drawn without a display."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cluster.evaluation.plan import L_MAX, slug
from cluster.evaluation.summary import PRIMARY, Bootstrap, Cost, RowSummary
from cluster.measure.statistics import Interval

_SIZE = (7, 4.5)
_COLOURS, _MARKERS = 10, "os^D"  # after so many rows the colours come again, with another marker


def save_plots(
    rows: Sequence[RowSummary], costs: Sequence[Cost], bootstrap: Bootstrap, folder: Path
) -> list[Path]:
    """The plots of one benchmark: cost-tokens, cost-seconds and, with at least two values, context. Returns their files; none without a score."""
    drawn = [
        (row, cost) for row, cost in zip(rows, costs, strict=True) if row.values(PRIMARY, lambda _: True)
    ]
    if not drawn:
        return []
    name = slug(drawn[0][0].benchmark)
    tokens = [cost.prompt_tokens + cost.generated_tokens for _, cost in drawn]
    written = [
        _scatter(
            drawn,
            tokens,
            "tokens read and generated per episode",
            bootstrap,
            folder / f"{name}-cost-tokens.png",
        ),
        _scatter(
            drawn,
            [cost.seconds for _, cost in drawn],
            "seconds per episode",
            bootstrap,
            folder / f"{name}-cost-seconds.png",
        ),
    ]
    lines = context_lines([row for row, _ in drawn])
    return [*written, _context_plot(lines, bootstrap, folder / f"{name}-context.png")] if lines else written


def context_lines(rows: Sequence[RowSummary]) -> dict[str, list[RowSummary]]:
    """Rows that differ in L_max alone, by their label without it, in the order of L_max; single points are left out."""
    lines: dict[str, list[RowSummary]] = {}
    for row in rows:
        words = [word for word in row.label.split() if not word.startswith(f"{L_MAX}=")]
        lines.setdefault(" ".join(words), []).append(row)
    return {
        name: sorted(line, key=lambda row: row.max_context_tokens)
        for name, line in lines.items()
        if len(line) > 1
    }


def _scatter(
    drawn: Sequence[tuple[RowSummary, Cost]],
    costs: Sequence[float],
    label: str,
    bootstrap: Bootstrap,
    path: Path,
) -> Path:
    figure, axes = _figure(f"{drawn[0][0].benchmark}: {PRIMARY.upper()} against cost", label)
    for place, ((row, _), cost) in enumerate(zip(drawn, costs, strict=True)):
        interval = row.interval(PRIMARY, bootstrap)
        marker = _MARKERS[place // _COLOURS % len(_MARKERS)]
        axes.errorbar(
            [cost], [100 * interval.mean], yerr=_spread([interval]), fmt=marker, capsize=3, label=row.label
        )
    if min(costs) > 0 and max(costs) > 10 * min(costs):
        axes.set_xscale("log")
    return _save(figure, axes, path)


def _context_plot(lines: dict[str, list[RowSummary]], bootstrap: Bootstrap, path: Path) -> Path:
    first = next(iter(lines.values()))[0]
    figure, axes = _figure(
        f"{first.benchmark}: {PRIMARY.upper()} against L_max", "memory.max_context_tokens (L_max)"
    )
    for name, rows in lines.items():
        intervals = [row.interval(PRIMARY, bootstrap) for row in rows]
        means = [100 * one.mean for one in intervals]
        axes.errorbar(
            [row.max_context_tokens for row in rows],
            means,
            yerr=_spread(intervals),
            marker="o",
            capsize=3,
            label=name,
        )
    return _save(figure, axes, path)


def _spread(intervals: Sequence[Interval]) -> list[list[float]]:
    """Below and above the means. Never negative, which matplotlib refuses: a mean may lie beyond its own interval, by rounding or chance."""
    return [
        [100 * max(0.0, one.mean - one.low) for one in intervals],
        [100 * max(0.0, one.high - one.mean) for one in intervals],
    ]


def _figure(title: str, label: str) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=_SIZE, layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title)
    axes.set_xlabel(label)
    axes.set_ylabel(f"{PRIMARY.upper()} % with 95 % interval")
    axes.grid(alpha=0.3)
    return figure, axes


def _save(figure: Any, axes: Any, path: Path) -> Path:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    axes.legend(frameon=False, fontsize=8)
    FigureCanvasAgg(figure)
    figure.savefig(path)
    return path
