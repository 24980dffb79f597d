"""Bootstrap intervals, and the paired comparison of two rows by a sign-flip test. Pure numpy, seeded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Played = tuple[int, str, str]
"""Seed, task id, item (``EpisodeScore.item``). An id may stand for other questions elsewhere."""

_NAN = float("nan")


@dataclass(frozen=True, slots=True)
class Interval:
    """The mean of ``count`` tasks and its 95 % percentile-bootstrap interval. All NaN without a task."""

    mean: float
    low: float
    high: float
    count: int


@dataclass(frozen=True, slots=True)
class PairedDifference:
    """Mean of (after - before) over the ``count`` tasks that both rows finished.

    With its 95 % bootstrap interval and the two-sided p-value of a sign-flip test.
    """

    mean: float
    low: float
    high: float
    p_value: float
    count: int


def bootstrap_interval(values: Sequence[float], samples: int, seed: int) -> Interval:
    """Percentile bootstrap over tasks: ``values`` has one number per task."""
    data = np.asarray(values, dtype=np.float64)
    if data.size == 0:
        return Interval(_NAN, _NAN, _NAN, 0)
    return Interval(float(data.mean()), *_central_95(_resampled_means(data, samples, seed)), data.size)


def nested_interval(groups: Sequence[Sequence[float]], samples: int, seed: int) -> Interval:
    """Bootstrap of the mean of all values, where the values of a group rise and fall together.

    A group is one write's cards, or one training's tasks. Each sample draws groups, and values within each.
    With few groups any interval is too narrow. With one group it is ``bootstrap_interval``.
    """
    data = [np.asarray(group, dtype=np.float64) for group in groups if len(group)]
    if not data:
        return Interval(_NAN, _NAN, _NAN, 0)
    count = len(data)
    picked = np.random.default_rng([seed, count]).integers(0, count, (samples, count))
    means = np.stack(
        [
            _resampled_means(group, samples * count, seed + place).reshape(samples, count)
            for place, group in enumerate(data)
        ]
    )
    sizes = np.array([group.size for group in data])[picked]
    drawn = np.take_along_axis(means, picked[None], axis=0)[0]  # [samples, groups]
    whole = np.concatenate(data)
    # Groups differ in size. Weighing by size keeps this the mean of values, not of groups.
    central = _central_95((drawn * sizes).sum(axis=1) / sizes.sum(axis=1))
    return Interval(float(whole.mean()), *central, whole.size)


def paired_difference(
    before: Sequence[float], after: Sequence[float], samples: int, seed: int
) -> PairedDifference:
    """Compare two rows task by task, so that the difficulty of tasks cancels.

    p is that of a sign-flip test. If neither row were better, each difference could have had the other sign.
    p is the share of ``samples`` random signs (and the observed ones) whose mean is as far from 0.
    Unlike the share of bootstrap means beyond 0, it keeps its level with a dozen tasks.
    """
    if len(before) != len(after):
        counts = f"got {len(before)} and {len(after)}"
        raise ValueError(f"a paired comparison needs one value per task on both sides, {counts}")
    difference = np.asarray(after, dtype=np.float64) - np.asarray(before, dtype=np.float64)
    if difference.size == 0:
        return PairedDifference(_NAN, _NAN, _NAN, 1.0, 0)
    low, high = _central_95(_resampled_means(difference, samples, seed))
    p_value = _sign_flip_p(difference, samples, seed)
    return PairedDifference(float(difference.mean()), low, high, p_value, difference.size)


def item_means(values: Mapping[Played, float]) -> dict[str, float]:
    """The mean of each item, which is the unit to resample: a question asked again is no new evidence."""
    by_item: dict[str, list[float]] = {}
    for (_, _, item), value in values.items():
        by_item.setdefault(item, []).append(value)
    return {item: float(np.mean(repeats)) for item, repeats in by_item.items()}


def paired_by_item(
    before: Mapping[Played, float], after: Mapping[Played, float], samples: int, seed: int
) -> PairedDifference:
    """Compare over items. Pairs share seed, task and item; those of one item are averaged first."""
    shared = [played for played in after if played in before]
    first, second = (item_means({played: side[played] for played in shared}) for side in (before, after))
    return paired_difference(list(first.values()), list(second.values()), samples, seed)


def adjusted_p_values(differences: Sequence[PairedDifference]) -> list[float]:
    """Holm over the comparisons that have tasks. The others test nothing: they get NaN and do not count."""
    adjusted = iter(holm([difference.p_value for difference in differences if difference.count > 0]))
    return [next(adjusted) if difference.count > 0 else _NAN for difference in differences]


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values in the order given (Holm 1979).

    Calling those below alpha significant makes one false claim or more with probability alpha at most.
    """
    order = sorted(range(len(p_values)), key=lambda place: p_values[place])
    adjusted = [1.0] * len(p_values)
    highest = 0.0
    for rank, place in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = highest
    return adjusted


def _central_95(means: NDArray[np.float64]) -> tuple[float, float]:
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def _resampled_means(data: NDArray[np.float64], samples: int, seed: int) -> NDArray[np.float64]:
    """Means of ``samples`` resamples with replacement, float64 [samples]."""
    generator = np.random.default_rng(seed)
    blocks = [
        data[generator.integers(0, data.size, (rows, data.size))].mean(axis=1)
        for rows in _blocks(data.size, samples)
    ]
    return np.concatenate(blocks)


def _sign_flip_p(difference: NDArray[np.float64], samples: int, seed: int) -> float:
    """(1 + flips as far from 0) / (1 + samples)."""
    generator = np.random.default_rng(seed)
    signs = (
        generator.integers(0, 2, (rows, difference.size)) * 2 - 1
        for rows in _blocks(difference.size, samples)
    )
    # Sums that differ in rounding alone count as equal, hence the margin.
    reached = abs(difference.sum()) - 1e-9 * np.abs(difference).sum()
    as_far = sum(int((np.abs(flips @ difference) >= reached).sum()) for flips in signs)
    return float(1 + as_far) / (1 + samples)


def _blocks(width: int, samples: int) -> list[int]:
    """``samples`` rows in blocks of at most a million numbers, so that 10,000 tasks need no gigabytes."""
    rows = max(1, 1_000_000 // width)
    return [min(rows, samples - start) for start in range(0, samples, rows)]
