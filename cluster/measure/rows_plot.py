"""A plot of rows: each score of each row, with its 95 % interval."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path

from cluster.measure.report import Curve, Panel, save_plot
from cluster.measure.statistics import Interval

_LABEL_ROOM = 84  # characters that fit below the axis
_SPREAD = 0.5  # of the distance between two rows, over which a row's scores are spread


def save_rows_plot(rows: Mapping[str, Mapping[str, Interval]], path: Path, title: str = "") -> Path:
    """Draw ``rows``, intervals by score of each row's label. Scores without a value are left out.

    Raises OSError.
    """
    scores = list(dict.fromkeys(score for intervals in rows.values() for score in intervals))
    curves = []
    for series, score in enumerate(scores):
        shift = _SPREAD * ((series + 0.5) / len(scores) - 0.5)
        points = [
            (place + shift, intervals[score])
            for place, intervals in enumerate(rows.values())
            if score in intervals and intervals[score].count
        ]
        xs = [x for x, _ in points]
        means = [100 * interval.mean for _, interval in points]
        spans = [(100 * interval.low, 100 * interval.high) for _, interval in points]
        curves.append(Curve(xs, means, series, score, "points", spans))
    width = max(8, _LABEL_ROOM // max(1, len(rows)))
    ticks = {place: textwrap.fill(label, width) for place, label in enumerate(rows)}
    return save_plot([Panel("", "% with 95 % interval", tuple(curves), title, (-3, 103), ticks=ticks)], path)
