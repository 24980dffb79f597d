"""The probe's plots: from inside a write, recall against damage over the grid, forgetting. A colour a cell; thin lines are single seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cluster.probe.values import CellRun, Point

MOST_LABELS = 24


def save_plots(cells: Mapping[str, Sequence[CellRun]], folder: Path) -> list[Path]:
    """recall_damage.png always; steps.png and forgetting.png where there is something to draw."""
    made = [_save_recall_damage(cells, folder / "recall_damage.png")]
    if any(run.steps for runs in cells.values() for run in runs):
        made.append(_save_curves(cells, folder / "steps.png", "optimizer step", steps=True))
    if any(len(run.writes) > 1 for runs in cells.values() for run in runs):
        made.append(_save_curves(cells, folder / "forgetting.png", "write", steps=False))
    return made


def _save_recall_damage(cells: Mapping[str, Sequence[CellRun]], path: Path) -> Path:
    """A point a seed: up and to the left is better. Crosses are cells with a write that was rolled back."""
    figure, (written, paraphrased) = _figure(2, len(cells))
    for number, (label, runs) in enumerate(cells.items()):
        for axes, other in ((written, False), (paraphrased, True)):
            for place, run in enumerate(runs):
                last = run.after[-1]
                refused = any(line.outcome == "rolled_back" for line in run.writes)
                axes.scatter(
                    last.text("text", "damage"),
                    _percent(last, other),
                    color=cell_colour(number, len(cells)),
                    marker="x" if refused else "o",
                    label=label if place == 0 else None,
                )
    for axes, title in ((written, "written questions"), (paraphrased, "paraphrases")):
        axes.set(
            xlabel="damage (nats per token of unrelated text)", ylabel="recall %", title=title, ylim=(-4, 104)
        )
    return _save(figure, written, path)


def _save_curves(cells: Mapping[str, Sequence[CellRun]], path: Path, unit: str, steps: bool) -> Path:
    """Recall (full: written, dashed: paraphrases) and damage, from the untouched model on."""
    figure, (recall, damage) = _figure(2, len(cells))
    for number, (label, runs) in enumerate(cells.items()):
        curves = [[run.after[0], *run.steps] if steps else list(run.after) for run in runs]
        colour = cell_colour(number, len(cells))
        for curve in curves if len(curves) > 1 else []:
            recall.plot([_percent(point, False) for point in curve], color=colour, linewidth=0.5, alpha=0.5)
            damage.plot(
                [point.text("text", "damage") for point in curve], color=colour, linewidth=0.5, alpha=0.5
            )
        columns = list(zip(*curves, strict=False))  # a write that diverged has fewer steps
        recall.plot(
            [_mean([_percent(point, False) for point in column]) for column in columns],
            color=colour,
            label=label,
        )
        recall.plot(
            [_mean([_percent(point, True) for point in column]) for column in columns],
            color=colour,
            linestyle="--",
        )
        damage.plot(
            [_mean([point.text("text", "damage") for point in column]) for column in columns], color=colour
        )
    recall.set(
        xlabel=unit,
        ylabel="recall % of what is written so far",
        title="full: written, dashed: paraphrases",
        ylim=(-4, 104),
    )
    damage.set(xlabel=unit, ylabel="nats per token", title="damage to unrelated text")
    return _save(figure, recall, path)


def _figure(panels: int, labels: int) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5 * panels, 4 + 0.2 * min(labels, MOST_LABELS)), layout="constrained")
    return figure, figure.subplots(1, panels)


def _save(figure: Any, axes: Any, path: Path) -> Path:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    handles, labels = axes.get_legend_handles_labels()
    figure.legend(
        handles[:MOST_LABELS], labels[:MOST_LABELS], loc="outside lower left", frameon=False, fontsize="small"
    )
    FigureCanvasAgg(figure)
    figure.savefig(path)
    return path


def cell_colour(number: int, count: int) -> Any:
    """Of ``count`` cells, the ``number``-th's own: from ten named colours, or along a scale where they are more."""
    from matplotlib import colormaps

    return f"C{number}" if count <= 10 else colormaps["turbo"](number / (count - 1))


def _percent(point: Point, paraphrased: bool) -> float:
    values = point.recall(paraphrased, "em").values()
    return 100 * sum(values) / len(values) if values else float("nan")


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
