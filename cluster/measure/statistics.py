"""Bootstrap intervals, and the paired comparison of two evaluation rows by a sign-flip test. Pure numpy, seeded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Played = tuple[int, str, str]
"""Seed, task id, item (``EpisodeScore.item``). The item is part of it: an id may stand for other questions where the environment is set otherwise."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean over ``count`` tasks with the 95 % percentile-bootstrap interval of the mean. All NaN when there is no task."""

    mean: float
    low: float
    high: float
    count: int


@dataclass(frozen=True, slots=True)
class PairedDifference:
    """Mean of (after - before) over the ``count`` tasks that both rows finished, its 95 % bootstrap interval and two-sided sign-flip p-value."""

    mean: float
    low: float
    high: float
    p_value: float
    count: int


def bootstrap_interval(values: Sequence[float], samples: int, seed: int) -> Interval:
    """Percentile bootstrap over tasks: ``values`` has one number per task."""
    data = np.asarray(values, dtype=np.float64)
    if data.size == 0:
        return Interval(float("nan"), float("nan"), float("nan"), 0)
    means = _resampled_means(data, samples, seed)
    low, high = np.quantile(means, [0.025, 0.975])
    return Interval(float(data.mean()), float(low), float(high), data.size)


def nested_interval(groups: Sequence[Sequence[float]], samples: int, seed: int) -> Interval:
    """Percentile bootstrap of the mean over all values where those of a group rise and fall together (cards of one write, tasks of one training).

    Groups are resampled, and within each group drawn its values. Of few groups any interval is too narrow; with one it is ``bootstrap_interval``.
    """
    data = [np.asarray(group, dtype=np.float64) for group in groups if len(group)]
    if not data:
        return Interval(float("nan"), float("nan"), float("nan"), 0)
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
    low, high = np.quantile((drawn * sizes).sum(axis=1) / sizes.sum(axis=1), [0.025, 0.975])
    whole = np.concatenate(data)
    return Interval(float(whole.mean()), float(low), float(high), whole.size)


def paired_difference(
    before: Sequence[float], after: Sequence[float], samples: int, seed: int
) -> PairedDifference:
    """Paired: tasks are resampled together, so the tasks' own difficulty cancels.

    p is that of a sign-flip test: if neither row were better, each task's difference could as well have had the other sign. The share of ``samples``
    random signs (and the ones seen) under which the mean is as far from 0; unlike the share of bootstrap means beyond 0 it holds with a dozen tasks.
    """
    if len(before) != len(after):
        raise ValueError(
            f"a paired comparison needs one value per task on both sides, got {len(before)} and {len(after)}"
        )
    difference = np.asarray(after, dtype=np.float64) - np.asarray(before, dtype=np.float64)
    if difference.size == 0:
        return PairedDifference(float("nan"), float("nan"), float("nan"), 1.0, 0)
    low, high = np.quantile(_resampled_means(difference, samples, seed), [0.025, 0.975])
    return PairedDifference(
        float(difference.mean()),
        float(low),
        float(high),
        _sign_flip_p(difference, samples, seed),
        difference.size,
    )


def item_means(values: Mapping[Played, float]) -> dict[str, float]:
    """What may be resampled: one value for each item. A question that another seed asks again is no new evidence, so its values are averaged."""
    found: dict[str, list[float]] = {}
    for (_, _, item), value in values.items():
        found.setdefault(item, []).append(value)
    return {item: float(np.mean(some)) for item, some in found.items()}


def paired_by_item(
    before: Mapping[Played, float], after: Mapping[Played, float], samples: int, seed: int
) -> PairedDifference:
    """Paired bootstrap over items: pairs share seed, task and item, and those of one item are averaged. ``count`` is of items."""
    shared = [played for played in after if played in before]
    first, second = (item_means({played: side[played] for played in shared}) for side in (before, after))
    return paired_difference(list(first.values()), list(second.values()), samples, seed)


def adjusted_p_values(differences: Sequence[PairedDifference]) -> list[float]:
    """Holm over the comparisons that compared anything; NaN for the others, which test nothing and so must not dilute the rest."""
    adjusted = iter(holm([one.p_value for one in differences if one.count > 0]))
    return [next(adjusted) if one.count > 0 else float("nan") for one in differences]


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values in the order given (Holm 1979): below alpha, all together, with at most alpha chance of one false finding."""
    order = sorted(range(len(p_values)), key=lambda place: p_values[place])
    adjusted = [1.0] * len(p_values)
    highest = 0.0
    for rank, place in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = highest
    return adjusted


def _resampled_means(data: NDArray[np.float64], samples: int, seed: int) -> NDArray[np.float64]:
    """Means of ``samples`` resamples with replacement, float64 [samples]."""
    generator = np.random.default_rng(seed)
    return np.concatenate(
        [
            data[generator.integers(0, data.size, (rows, data.size))].mean(axis=1)
            for rows in _blocks(data.size, samples)
        ]
    )


def _sign_flip_p(difference: NDArray[np.float64], samples: int, seed: int) -> float:
    """(1 + flips as far from 0) / (1 + samples); sums that differ in rounding alone count as equal."""
    generator = np.random.default_rng(seed)
    signs = (
        generator.integers(0, 2, (rows, difference.size)) * 2 - 1
        for rows in _blocks(difference.size, samples)
    )
    reached = abs(difference.sum()) - 1e-9 * np.abs(difference).sum()
    return float(1 + sum(int((np.abs(flips @ difference) >= reached).sum()) for flips in signs)) / (
        1 + samples
    )


def _blocks(width: int, samples: int) -> list[int]:
    """``samples`` rows in blocks of a million numbers at most, so that 10,000 tasks need no gigabytes."""
    rows = max(1, 1_000_000 // width)
    return [min(rows, samples - start) for start in range(0, samples, rows)]
