"""The report kit: train, evaluate, compare, probe and bench show what they measured through it.

    figures --> Table --> Section --> Document --> show: the terminal
                                               --> save_document: report.md, report.json, report.csv
    figures --> Curve --> Panel --> save_plot: a PNG, drawn without a display

Cells of a table are text, ready to show. Programs read the numbers themselves, from JSON or CSV.
"""

from __future__ import annotations

import csv
import io
import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import rich.table
from rich.box import SIMPLE

from cluster.common.display import Display, Fitted, keep_cells
from cluster.common.printable import visible
from cluster.measure.scores import F1, REWARD, label, score_text
from cluster.measure.statistics import Interval, PairedDifference
from configs.files import dump_json, write_text

_LABEL_ROOM = 84  # characters that fit below the axis
_SPREAD = 0.5  # of the distance between two rows, over which a row's scores are spread

MOST_CATEGORIES = 12  # the terminal shows no table by category with more; the file does
MOST_LABELS = 24  # of a plot's legend
NAMED_COLOURS = 10  # matplotlib's C0 to C9
SIGNIFICANT = 0.05
SMALLEST_P = 0.0001  # shown
ALONE = "clear alone, but among all comparisons of this report"


@dataclass(frozen=True, slots=True)
class Table:
    """``legend`` explains the header. ``detail``: the file shows the table, the terminal does not."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    legend: str = ""
    detail: bool = False


@dataclass(frozen=True, slots=True)
class Section:
    """A part of a document, in this order. Without content it is skipped. ``text``: for the file only."""

    title: str
    text: str = ""
    tables: tuple[Table, ...] = ()
    notes: tuple[str, ...] = ()
    plots: tuple[Path, ...] = ()


@dataclass(frozen=True, slots=True)
class Document:
    """A report before it is shown. ``facts``: what was measured, and with what; only the file shows them."""

    title: str
    facts: Mapping[str, str]
    sections: tuple[Section, ...]


# --- the terminal and the files ---------------------------------------------------------------------------


def show(document: Document, display: Display) -> None:
    """Print tables first, then each legend once, then the notes."""
    tables = [
        (section, table) for section in document.sections for table in section.tables if not table.detail
    ]
    for section, table in tables:
        title = ": ".join(part for part in (section.title, table.title) if part)
        display.say(title or document.title)  # not the table's own title: a narrow table would wrap it
        display.console.print(Fitted(_rich_table(table)))
    legends = dict.fromkeys(table.legend for _, table in tables if table.legend)
    for line in (*legends, *(note for section in document.sections for note in section.notes)):
        display.say(line)


def markdown(document: Document) -> str:
    blocks = [f"# {document.title}", _bullets([f"{key}: {value}" for key, value in document.facts.items()])]
    blocks += [block for section in document.sections for block in _section_blocks(section)]
    return "\n\n".join(block for block in blocks if block) + "\n"


def save_document(
    document: Document,
    folder: Path,
    data: Mapping[str, Any],
    csv_lines: Sequence[Mapping[str, object]] = (),
    name: str = "report",
) -> list[Path]:
    """Write NAME.md, NAME.csv (when it has lines) and NAME.json with ``data``; return their paths.

    NaN is null in JSON and an empty cell in CSV. Raises OSError.
    """
    texts = {"md": markdown(document), "csv": _csv_text(csv_lines), "json": dump_json(data)}
    paths = {folder / f"{name}.{suffix}": text for suffix, text in texts.items() if text}
    folder.mkdir(parents=True, exist_ok=True)
    for path, text in paths.items():
        write_text(path, text)
    return list(paths)


def _section_blocks(section: Section) -> Iterator[str]:
    content = (section.text, section.tables, section.notes, section.plots)
    yield f"## {section.title}" if section.title and any(content) else ""
    yield section.text
    for table in section.tables:
        yield f"{'###' if section.title else '##'} {table.title}" if table.title else ""
        lines = [table.header, ("---",) * len(table.header), *table.rows]
        yield "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines)
        yield table.legend
    yield _bullets(section.notes)
    yield "\n".join(f"![{plot.stem}]({plot.name})" for plot in section.plots)


def _bullets(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _rich_table(table: Table) -> rich.table.Table:
    shown = rich.table.Table(box=SIMPLE, pad_edge=False)
    for number, name in enumerate(table.header):
        shown.add_column(_plain(name), justify="right" if number else "left", no_wrap=number == 0)
    for row in table.rows:
        shown.add_row(*map(_plain, row))
    keep_cells(shown)
    return shown


def _plain(text: str) -> str:
    """``text`` as rich shows it unchanged: a bracket would begin markup, and a model may have written it."""
    return visible(text).replace("[", r"\[")


def _csv_text(lines: Sequence[Mapping[str, object]]) -> str:
    if not lines:
        return ""
    file = io.StringIO()
    writer = csv.DictWriter(file, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    for line in lines:
        missing = {
            key: "" for key, value in line.items() if isinstance(value, float) and not math.isfinite(value)
        }
        writer.writerow({**line, **missing})
    return file.getvalue()


# --- figures in words -------------------------------------------------------------------------------------


def interval_text(value: Interval | PairedDifference, digits: int = 1, sign: Literal["", "+"] = "") -> str:
    """A share in percent with its interval; with ``sign`` "+" a change, in points. "-" without a task.

    Of too few seeds for an interval it is the mean alone.
    """
    return score_text(F1, value, digits, sign)


def p_text(p_value: float) -> str:
    """In four digits. "-" where nothing was tested."""
    if not math.isfinite(p_value):
        return "-"
    return f"{p_value:.4f}" if p_value >= SMALLEST_P else f"< {SMALLEST_P}"


def percent(value: float, digits: int = 1) -> str:
    return f"{100 * value:.{digits}f}" if math.isfinite(value) else "-"


def comparison_sentence(
    after: str, before: str, difference: PairedDifference, adjusted_p: float, unit: str, score: str = F1
) -> str:
    """What a person may conclude from two rows. ``unit``: what was paired, "tasks" or "questions"."""
    if difference.count == 0:
        return f"{after} and {before} share no finished task: nothing can be compared."
    verdict = "a significant gain" if difference.mean > 0 else "a significant LOSS"
    if adjusted_p >= SIGNIFICANT:
        alone = difference.p_value < SIGNIFICANT  # and its own interval leaves 0 out
        verdict = f"{ALONE}, NOT significant" if alone else "NOT significant"
    points = "" if score == REWARD else " points"
    change = f"{label(score)} {score_text(score, difference, sign='+')}{points} on {difference.count} {unit}"
    p_values = f"p = {p_text(difference.p_value)}, adjusted p = {p_text(adjusted_p)}".replace("= <", "<")
    return f"{after} against {before}: {change}, {p_values}: {verdict}."


def decoding(temperature: float) -> str:
    """How an evaluation's episodes were sampled."""
    return f"sampled at temperature {temperature:g}" if temperature > 0 else "greedy"


# --- plots ------------------------------------------------------------------------------------------------

Style = Literal["line", "thin", "dashed", "dots", "points", "crosses", "bars"]
_STYLES: dict[Style, dict[str, Any]] = {
    "line": {"linewidth": 2},
    "thin": {"linewidth": 0.6, "alpha": 0.5},
    "dashed": {"linestyle": "--"},
    "dots": {"marker": "o", "markersize": 4, "linewidth": 0.8},  # a line through dots
    "points": {"marker": "o", "linestyle": "none"},
    "crosses": {"marker": "x", "linestyle": "none"},
    "bars": {"width": 0.25},
}


@dataclass(frozen=True, slots=True)
class Curve:
    """``ys`` over ``xs``. ``series``: curves of one number share a colour. No ``label``: not in the legend.

    ``intervals``: (low, high) of each point, drawn as error bars.
    """

    xs: Sequence[float]
    ys: Sequence[float]
    series: int
    label: str = ""
    style: Style = "line"
    intervals: Sequence[tuple[float, float]] = ()


@dataclass(frozen=True, slots=True)
class Panel:
    """One pair of axes.

    ``y_range``: None for an end that follows the values. ``steps``: x counts whole things (steps, writes), so
    ticks are whole numbers. ``ticks``: text at places of x, instead of numbers.
    """

    x_label: str
    y_label: str
    curves: tuple[Curve, ...]
    title: str = ""
    y_range: tuple[float | None, float | None] = (None, None)
    log_x: bool = False
    steps: bool = False
    ticks: Mapping[int, str] = field(default_factory=dict)


def save_plot(panels: Sequence[Panel], path: Path) -> Path:
    """Draw the panels side by side, with one legend below them. Raises OSError."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    curves = [curve for panel in panels for curve in panel.curves]
    labels = list(dict.fromkeys(curve.label for curve in curves if curve.label))[:MOST_LABELS]
    series = 1 + max((curve.series for curve in curves), default=0)
    width = 7.0 if len(panels) == 1 else 5.5 * len(panels)
    figure = Figure(figsize=(width, 4 + 0.2 * len(labels)), layout="constrained")
    handles: dict[str, Any] = {}
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for curve in panel.curves:
            handles.setdefault(curve.label, _draw(axes, curve, colour(curve.series, series)))
        _set_axes(axes, panel)
    shown = [handles[label] for label in labels]
    figure.legend(handles=shown, labels=labels, loc="outside lower left", frameon=False, fontsize="small")
    FigureCanvasAgg(figure)
    figure.savefig(path)
    return path


def _draw(axes: Any, curve: Curve, shade: Any) -> Any:
    """Draw a curve; return its handle for the legend."""
    style = {"color": shade, **_STYLES[curve.style]}
    if curve.style == "bars":
        return axes.bar(curve.xs, curve.ys, **style)
    spans = _error_bars(curve) if curve.intervals else None
    return axes.errorbar(curve.xs, curve.ys, yerr=spans, capsize=3, **style)


def _set_axes(axes: Any, panel: Panel) -> None:
    from matplotlib.ticker import MaxNLocator, NullLocator

    axes.set(xlabel=panel.x_label, ylabel=panel.y_label, title=panel.title, ylim=panel.y_range)
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)
    if panel.log_x:
        axes.set_xscale("log")
    if panel.steps:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    if panel.ticks:
        axes.set_xticks(list(panel.ticks), list(panel.ticks.values()))
        axes.xaxis.set_minor_locator(NullLocator())  # a logarithmic axis would number its own


def colour(number: int, count: int) -> Any:
    """The colour of series ``number`` of ``count``: a named one, or from a scale where they are many."""
    from matplotlib import colormaps

    return f"C{number}" if count <= NAMED_COLOURS else colormaps["turbo"](number / (count - 1))


def running_mean(values: Sequence[float], width: int = 10) -> list[float]:
    """At each place the mean of the last ``width`` values, fewer at the start."""
    return [sum(values[max(0, end - width) : end]) / min(end, width) for end in range(1, len(values) + 1)]


def _error_bars(curve: Curve) -> list[list[float]]:
    """Lengths below and above. matplotlib refuses negative ones, but a mean may lie beyond its interval."""
    pairs = list(zip(curve.ys, curve.intervals, strict=True))
    return [[max(0.0, y - low) for y, (low, _) in pairs], [max(0.0, high - y) for y, (_, high) in pairs]]


def save_rows_plot(rows: Mapping[str, Mapping[str, Interval]], path: Path, title: str = "") -> Path:
    """Draw ``rows``, intervals by score of each row's label. Scores without a value are left out.

    Raises OSError.
    """
    scores = list(dict.fromkeys(score for intervals in rows.values() for score in intervals))
    shares = [score for score in scores if score != REWARD]
    has_shares = any(
        intervals[score].count for intervals in rows.values() for score in shares if score in intervals
    )
    width = max(8, _LABEL_ROOM // max(1, len(rows)))
    ticks = {place: textwrap.fill(label, width) for place, label in enumerate(rows)}
    panels = []
    if has_shares or REWARD not in scores:
        curves = _curves(rows, shares, 100)
        panels.append(Panel("", "% with 95 % interval", curves, title, (-3, 103), ticks=ticks))
    if REWARD in scores:
        panels.append(Panel("", "reward with 95 % interval", _curves(rows, [REWARD], 1), title, ticks=ticks))
    return save_plot(panels, path)


def _curves(
    rows: Mapping[str, Mapping[str, Interval]], scores: Sequence[str], factor: float
) -> tuple[Curve, ...]:
    """A curve of points for each score; ``factor`` brings them to the unit of the axis."""
    curves = []
    for series, score in enumerate(scores):
        shift = _SPREAD * ((series + 0.5) / len(scores) - 0.5)
        points = [
            (place + shift, intervals[score])
            for place, intervals in enumerate(rows.values())
            if score in intervals and intervals[score].count
        ]
        xs = [x for x, _ in points]
        means = [factor * interval.mean for _, interval in points]
        spans = [(factor * interval.low, factor * interval.high) for _, interval in points]
        curves.append(Curve(xs, means, series, score, "points", spans))
    return tuple(curves)
