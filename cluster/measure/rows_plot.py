"""A plot of rows: each score of each row, with its 95 % interval."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

from cluster.measure.report import Curve, Panel, save_plot
from cluster.measure.scores import REWARD
from cluster.measure.statistics import Interval

_LABEL_ROOM = 84  # characters that fit below the axis
_SPREAD = 0.5  # of the distance between two rows, over which a row's scores are spread


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
