"""The outcome of a benchmark: cases against a named baseline, tables, plots. Frozen and picklable."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from cluster.measure.report import Table

RatioOf = Literal["baseline/candidate", "candidate/baseline"]


class BenchError(RuntimeError):
    """A benchmark cannot run, or would compare different results. One line with the cause."""


@dataclass(frozen=True, slots=True)
class Context:
    """What every benchmark is given.

    ``quick``: sizes and repeats that only show that it runs, as the tests do. Its figures mean nothing.
    """

    model_path: Path
    repeats: int
    threads: int
    quick: bool
    folder: Path  # for plots


@dataclass(frozen=True, slots=True)
class Timing:
    """One run: wall seconds, and CPU seconds of its process, which are steadier on a shared machine."""

    wall_s: float
    cpu_s: float


@dataclass(frozen=True, slots=True)
class Goal:
    """What the median ratio should be."""

    sense: Literal["at least", "at most"]
    value: float

    def met(self, value: float) -> bool:
        return value >= self.value if self.sense == "at least" else value <= self.value


@dataclass(frozen=True, slots=True)
class Spread:
    """Median and quartiles of the repeats."""

    median: float
    low: float
    high: float
    count: int

    @staticmethod
    def of(values: tuple[float, ...]) -> Spread:
        low, median, high = np.percentile(np.asarray(values, dtype=np.float64), [25, 50, 75])
        return Spread(float(median), float(low), float(high), len(values))


@dataclass(frozen=True, slots=True)
class Case:
    """A candidate beside its baseline, measured in turns: value i of one next to value i of the other.

    ``values`` are in ``unit`` ("s": lower is better, "tokens/s": higher is better, ...). ``ratio`` reads as
    the goal does: a speed-up or a share is "how many times as good", a cost "how many times as dear".
    """

    name: str
    baseline: str
    candidate: str
    unit: str
    baseline_values: tuple[float, ...]
    candidate_values: tuple[float, ...]
    ratio: RatioOf
    goal: Goal | None
    note: str = ""

    def __post_init__(self) -> None:
        if not self.baseline_values or len(self.baseline_values) != len(self.candidate_values):
            raise ValueError(
                f"case {self.name}: {len(self.baseline_values)} values of the baseline, "
                f"{len(self.candidate_values)} of the candidate"
            )

    @property
    def ratios(self) -> Spread:
        """Over the pairs."""
        pairs = zip(self.baseline_values, self.candidate_values, strict=True)
        return Spread.of(tuple(b / c if self.ratio == "baseline/candidate" else c / b for b, c in pairs))


@dataclass(frozen=True, slots=True)
class Outcome:
    """All of one benchmark. ``figures``: single numbers for JSON and MLflow, e.g. "head_fraction"."""

    cases: tuple[Case, ...]
    tables: tuple[Table, ...] = ()
    plots: tuple[Path, ...] = ()
    figures: Mapping[str, float] = field(default_factory=dict)
