"""A probe's plots: a colour a cell; thin lines are single seeds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from cluster.measure.report import Curve, Panel, Style, save_plot
from cluster.measure.statistics import mean
from cluster.probe.values import CellRun, LeakKind, Point

_SHARES = (-4.0, 104.0)  # the y axis of percent, with room for the marks at 0 and 100


def save_plots(cells: Mapping[str, Sequence[CellRun]], folder: Path) -> list[Path]:
    """Draw recall_damage.png, steps.png where steps were measured, forgetting.png where there are writes."""
    plots = {"recall_damage": _recall_damage(cells)}
    if any(run.steps for runs in cells.values() for run in runs):
        plots["steps"] = _curves(cells, "optimizer step", lambda run: [run.after[0], *run.steps])
    if any(len(run.writes) > 1 for runs in cells.values() for run in runs):
        plots["forgetting"] = _curves(cells, "write", lambda run: run.after)
    return [save_plot(panels, folder / f"{name}.png") for name, panels in plots.items()]


def _recall_damage(cells: Mapping[str, Sequence[CellRun]]) -> list[Panel]:
    """A point a seed: up and to the left is better. Crosses are cells with a write that was rolled back."""
    damage, leak = "damage (nats per token of unrelated text)", "strangers with a written answer %"
    axes: tuple[tuple[str, str, Callable[[Point], float], Callable[[Point], float]], ...] = (
        ("written questions", damage, _damage, _written),
        ("paraphrases", damage, _damage, _reworded),
        ("paraphrases, against the leak", leak, _strangers, _reworded),
    )
    panels = []
    for title, x_label, x, y in axes:
        curves = []
        for series, (label, runs) in enumerate(cells.items()):
            for run in runs:
                refused = any(line.outcome == "rolled_back" for line in run.writes)
                last = run.after[-1]
                style: Style = "crosses" if refused else "points"
                curves.append(Curve([x(last)], [y(last)], series, label, style))
        panels.append(Panel(x_label, "recall %", tuple(curves), title, y_range=_SHARES))
    return panels


def _curves(
    cells: Mapping[str, Sequence[CellRun]], unit: str, points: Callable[[CellRun], Sequence[Point]]
) -> list[Panel]:
    """Recall, leak and damage, from the untouched model on."""
    recall: list[Curve] = []
    leak: list[Curve] = []
    damage: list[Curve] = []
    for series, (label, runs) in enumerate(cells.items()):
        seeds = [points(run) for run in runs]
        for curve in seeds if len(seeds) > 1 else []:
            recall.append(_curve([[point] for point in curve], _written, series, "", "thin"))
            leak.append(_curve([[point] for point in curve], _strangers, series, "", "thin"))
            damage.append(_curve([[point] for point in curve], _damage, series, "", "thin"))
        columns = list(zip(*seeds, strict=False))  # a write that diverged has fewer steps
        recall.append(_curve(columns, _written, series, label, "line"))
        recall.append(_curve(columns, _reworded, series, "", "dashed"))
        leak.append(_curve(columns, _strangers, series, label, "line"))
        leak.append(_curve(columns, _same_person, series, "", "dashed"))
        damage.append(_curve(columns, _damage, series, label, "line"))
    title, y_label = "full: written, dashed: paraphrases", "recall % of what is written so far"
    return [
        Panel(unit, y_label, tuple(recall), title, y_range=_SHARES, steps=True),
        Panel(
            unit, "leak %", tuple(leak), "full: strangers, dashed: same person", y_range=_SHARES, steps=True
        ),
        Panel(unit, "nats per token", tuple(damage), "damage to unrelated text", steps=True),
    ]


def _curve(
    columns: Sequence[Sequence[Point]],
    value: Callable[[Point], float],
    series: int,
    label: str,
    style: Style,
) -> Curve:
    means = [mean([value(point) for point in column]) for column in columns]
    return Curve(range(len(means)), means, series, label, style)


def _recall(point: Point, reworded: bool) -> float:
    return 100 * mean(list(point.recall(reworded, "em").values()))


def _written(point: Point) -> float:
    return _recall(point, reworded=False)


def _reworded(point: Point) -> float:
    return _recall(point, reworded=True)


def _leak(point: Point, kind: LeakKind) -> float:
    return 100 * mean(list(point.leak(kind).values()))


def _strangers(point: Point) -> float:
    return _leak(point, "stranger")


def _same_person(point: Point) -> float:
    return _leak(point, "same_person")


def _damage(point: Point) -> float:
    return point.text("text", "damage")
