"""Where the workers' time went in each step of a run: kept in the run's folder (a resumed run goes on with it) and drawn at its end."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from actors.engine.step_loop import PHASES
from cluster.tracking.tracker import RunStatus, Tracker

_SECTION = "timeline/worker_"


class KeptTimeline:
    """A tracker that passes everything on and appends each step's worker timeline to ``path``, one JSON object a line."""

    def __init__(self, inner: Tracker, path: Path) -> None:
        self._inner, self._path = inner, path

    @property
    def run_id(self) -> str:
        return self._inner.run_id

    @property
    def location(self) -> str:
        return self._inner.location

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._inner.log(metrics, step)
        shares = {
            name.removeprefix(_SECTION): value for name, value in metrics.items() if name.startswith(_SECTION)
        }
        if shares:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, "shares": shares}) + "\n")

    def artifact(self, path: Path) -> None:
        self._inner.artifact(path)

    def dataset(self, values: Mapping[str, str]) -> None:
        self._inner.dataset(values)

    def model(self, values: Mapping[str, str]) -> None:
        self._inner.model(values)

    def finish(self, status: RunStatus) -> None:
        self._inner.finish(status)


def save_timeline(path: Path, folder: Path) -> list[Path]:
    """Draw ``timeline.png`` into ``folder``; nothing without a step in ``path``. A step that a resumed run took again counts once, as taken last."""
    if not path.exists():
        return []
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    by_step: dict[int, dict[str, float]] = {line["step"]: line["shares"] for line in lines}
    return [_draw(dict(sorted(by_step.items())), folder)]


def _draw(by_step: Mapping[int, Mapping[str, float]], folder: Path) -> Path:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.add_subplot()
    steps, below = list(by_step), [0.0] * len(by_step)
    for phase in PHASES:
        shares = [100 * shares.get(phase, 0.0) for shares in by_step.values()]
        axes.bar(
            steps,
            shares,
            bottom=below,
            width=0.9,
            label=phase,
            color="lightgrey" if phase == "idle" else None,
        )
        below = [bottom + share for bottom, share in zip(below, shares, strict=True)]
    axes.set_xlabel("training step")
    axes.set_ylabel("% of the workers' time")
    axes.set_ylim(0, 100)
    figure.legend(loc="outside right upper", frameon=False)
    path = folder / "timeline.png"
    FigureCanvasAgg(figure)
    figure.savefig(path)
    return path
