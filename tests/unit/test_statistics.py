"""Intervals and paired comparisons: what they hold, at which level, and with few tasks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import astuple

import numpy as np
import pytest

from cluster.measure.statistics import (
    Interval,
    PairedDifference,
    adjusted_p_values,
    bootstrap_interval,
    holm,
    item_means,
    nested_interval,
    paired_by_item,
    paired_difference,
)


def test_interval_holds_the_mean_and_narrows_with_more_tasks() -> None:
    rng = np.random.default_rng(0)
    few, many = rng.random(20).tolist(), rng.random(2000).tolist()
    small, large = bootstrap_interval(few, 500, 0), bootstrap_interval(many, 500, 0)
    for interval, values in ((small, few), (large, many)):
        assert interval.low < np.mean(values) < interval.high
        assert interval.mean == pytest.approx(np.mean(values))
    assert large.high - large.low < (small.high - small.low) / 3
    standard_error = np.std(many) / math.sqrt(len(many))
    assert large.high - large.low == pytest.approx(2 * 1.96 * standard_error, rel=0.15)


def _plain(values: Sequence[float]) -> Interval:
    return bootstrap_interval(values, 4000, 0)


def _nested(values: Sequence[float]) -> Interval:
    return nested_interval([[value] for value in values], 4000, 0)


def _paired(values: Sequence[float]) -> PairedDifference:
    return paired_difference([0.0] * len(values), values, 4000, 0)


@pytest.mark.parametrize("interval", [_plain, _nested, _paired])
def test_every_interval_is_one_of_95_percent(
    interval: Callable[[Sequence[float]], Interval | PairedDifference],
) -> None:
    """Three draws out of 0, 1, 1 are all 0 with probability 1/27 = 3.7 %, between 2.5 % and 5 %.

    So a 95 % interval reaches 0 and a 90 % one does not. Of 0, 0, 1, 1, 1 it is 1 %: 98 % would reach 0.
    """
    assert interval([0.0, 1.0, 1.0]).low == 0.0
    assert interval([0.0, 0.0, 1.0]).high == 1.0
    assert interval([0.0, 0.0, 1.0, 1.0, 1.0]).low > 0.0
    assert interval([0.0, 0.0, 0.0, 1.0, 1.0]).high < 1.0


def test_interval_is_the_same_for_the_same_seed_and_nan_without_tasks() -> None:
    assert bootstrap_interval([0.1, 0.9, 0.4], 50, 7) == bootstrap_interval([0.1, 0.9, 0.4], 50, 7)
    assert bootstrap_interval([0.1, 0.9, 0.4], 50, 7) != bootstrap_interval([0.1, 0.9, 0.4], 50, 8)
    empty = bootstrap_interval([], 50, 0)
    assert empty.count == 0
    assert math.isnan(empty.mean)


def test_many_tasks_are_resampled_in_blocks_without_a_seam() -> None:
    """40,000 tasks are 25 samples a block: three blocks, each with samples of its own."""
    values = np.random.default_rng(0).random(40_000).tolist()
    interval = bootstrap_interval(values, 60, 0)
    standard_error = np.std(values) / math.sqrt(len(values))
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * standard_error, rel=0.3)


def test_paired_comparison_sees_what_the_spread_of_tasks_hides() -> None:
    """Each task improves by 0.05 +- 0.02 while tasks differ by far more: only pairing can tell."""
    rng = np.random.default_rng(1)
    before = rng.random(40)
    after = before + rng.normal(0.05, 0.02, 40)
    difference = paired_difference(before.tolist(), after.tolist(), 500, 0)
    assert difference.p_value < 0.05
    assert difference.mean == pytest.approx(0.05, abs=0.01)
    assert difference.low > 0


def test_paired_comparison_rejects_at_about_its_level_when_nothing_changed() -> None:
    rng = np.random.default_rng(2)
    rejected = sum(
        paired_difference(rng.random(30).tolist(), rng.random(30).tolist(), 400, number).p_value < 0.05
        for number in range(200)
    )
    assert 1 <= rejected <= 26  # 5 % of 200 is 10


@pytest.mark.parametrize("values", [[0.3] * 10, [0.0] * 5])
def test_equal_rows_are_never_significant(values: list[float]) -> None:
    assert paired_difference(values, values, 50, 0).p_value == 1.0


def test_p_value_never_claims_more_than_the_flips_show() -> None:
    assert paired_difference([0.0] * 40, [1.0] * 40, 500, 0).p_value == pytest.approx(1 / 501)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(
    ("won", "tied", "exact"), [(1, 0, 1.0), (3, 0, 0.25), (4, 20, 0.125), (8, 0, 2 / 256)]
)
def test_p_value_is_the_exact_tests_with_few_tasks(won: int, tied: int, exact: float, sign: int) -> None:
    """Two-sided: all signs are equal in 2 of 2^won cases.

    A bootstrap of three wins in three never sees a loss, whatever chance is.
    """
    rows = [[0.1] * (won + tied), [0.4] * won + [0.1] * tied][::sign]
    assert paired_difference(*rows, 20_000, 0).p_value == pytest.approx(exact, abs=0.005)


@pytest.mark.parametrize("count", [4, 8, 12])
def test_paired_comparison_keeps_its_level_with_few_tasks(count: int) -> None:
    rng = np.random.default_rng(count)
    differences = rng.normal(0, 1, (400, count))
    rejected = sum(
        paired_difference([0.0] * count, row.tolist(), 400, number).p_value < 0.05
        for number, row in enumerate(differences)
    )
    assert rejected <= 34  # 5 % of 400 is 20, its standard error 4.4


def test_comparison_needs_the_same_tasks() -> None:
    with pytest.raises(ValueError, match="one value per task on both sides, got 1 and 2"):
        paired_difference([1.0], [1.0, 2.0], 10, 0)


def test_nested_interval_is_as_wide_as_groups_that_rise_and_fall_together() -> None:
    """Twelve cards of one write that all succeed or all fail are one piece of evidence, not twelve."""
    together = [[1.0] * 12, [0.0] * 12, [1.0] * 12, [0.0] * 12]
    apart = [[1.0, 0.0] * 6] * 4
    wide, narrow = nested_interval(together, 1000, 0), nested_interval(apart, 1000, 0)
    assert wide.mean == narrow.mean == 0.5 and wide.count == narrow.count == 48
    assert (wide.low, wide.high) == (0.0, 1.0)
    assert 0.2 < narrow.high - narrow.low < 0.4


def test_nested_interval_of_one_group_is_the_plain_one() -> None:
    values = np.random.default_rng(3).random(30).tolist()
    nested, plain = nested_interval([values], 4000, 0), bootstrap_interval(values, 4000, 0)
    assert (nested.low, nested.high) == pytest.approx((plain.low, plain.high), abs=0.02)
    assert nested_interval([[], []], 100, 0).count == 0


def test_nested_interval_weighs_values_not_groups() -> None:
    """Two large groups of ten are drawn in all but 1 % of samples: they outweigh eight single values."""
    interval = nested_interval([[1.0] * 19] * 5 + [[0.0]] * 5, 500, 0)
    assert interval.mean == 0.95
    assert interval.low > 0.8


def test_holm_is_the_textbooks() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []


def test_a_comparison_without_tasks_does_not_dilute_the_others() -> None:
    gain = paired_difference([0.0] * 8, [1.0] * 8, 500, 0)
    nothing = paired_difference([], [], 500, 0)
    first, second, third = adjusted_p_values([gain, nothing, gain])
    assert first == third == 2 * gain.p_value
    assert math.isnan(second)


def test_an_item_that_seeds_repeat_counts_once() -> None:
    before = {(0, "t0", "a"): 0.0, (1, "t0", "a"): 0.5, (0, "t1", "b"): 0.2, (2, "t9", "c"): 0.9}
    after = {(0, "t0", "a"): 1.0, (1, "t0", "a"): 0.5, (0, "t1", "b"): 0.4, (0, "t2", "d"): 0.9}
    assert item_means(before) == {"a": 0.25, "b": 0.2, "c": 0.9}
    difference = paired_by_item(before, after, 50, 0)
    assert (difference.count, difference.mean) == (2, pytest.approx((0.5 + 0.2) / 2))


def test_the_same_seed_gives_the_same_figures_in_every_version() -> None:
    """Reports of one commit can be compared with those of another. From NumPy's default generator."""
    values, after = [0.1, 0.4, 0.35, 0.8, 0.0], [0.3, 0.4, 0.5, 0.7, 0.6]
    plain = Interval(0.33, 0.11, 0.5605, 5)
    nested = Interval(0.33, 0.1, 0.5916666666666667, 5)
    paired = PairedDifference(0.17, -0.02, 0.38, 41 / 201, 5)
    assert astuple(bootstrap_interval(values, 200, 3)) == pytest.approx(astuple(plain), abs=1e-12)
    assert astuple(nested_interval([values[:2], values[2:]], 200, 3)) == pytest.approx(
        astuple(nested), abs=1e-12
    )
    assert astuple(paired_difference(values, after, 200, 3)) == pytest.approx(astuple(paired), abs=1e-12)
