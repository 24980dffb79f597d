"""The scores that reports show: shares of 1 in percent, and the environment's reward in its own unit.

Rows are compared by F1. Where no episode has an answer, they are compared by the reward.
"""

from __future__ import annotations

import math
from typing import Literal

from cluster.measure.statistics import Interval, PairedDifference

F1 = "f1"
REWARD = "reward"
"""The name under which an episode's reward stands beside the scores of its answers."""

SUMMARY = "Summary"
"""The section of the charts that a reader wants first. MLflow sorts sections by name, capitals first."""


def score_order(names: set[str]) -> tuple[str, ...]:
    """f1, em and the reward first."""
    return tuple(sorted(names, key=lambda name: ((F1, "em", REWARD, name).index(name), name)))


def label(score: str) -> str:
    return score.upper() if score in (F1, "em") else score


def unit(score: str) -> str:
    """ " %" where a score is shown in percent."""
    return "" if score == REWARD else " %"


def score_text(
    score: str, value: Interval | PairedDifference, digits: int = 1, sign: Literal["", "+"] = ""
) -> str:
    """A mean with its interval; with ``sign`` "+" a change. "-" without a task.

    Of too few seeds for an interval it is the mean alone.
    """
    if value.count == 0:
        return "-"
    factor, shown = (1, 3) if score == REWARD else (100, digits)
    mean, low, high = (f"{factor * number:{sign}.{shown}f}" for number in (value.mean, value.low, value.high))
    return f"{mean} [{low}, {high}]" if math.isfinite(value.low) else mean


def mean_text(score: str, mean: float) -> str:
    """A mean alone, with its name and unit: "F1 12.3 %", "reward 0.123"."""
    return f"{label(score)} {number_text(score, mean)}{unit(score)}"


def number_text(score: str, mean: float) -> str:
    """A mean without its unit. "-" where there is none."""
    if not math.isfinite(mean):
        return "-"
    return f"{mean:.3f}" if score == REWARD else f"{100 * mean:.1f}"
