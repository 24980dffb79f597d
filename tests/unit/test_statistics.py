"""Intervals and comparisons: their coverage and level (simulated), their edges, and their units."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import binomtest, ttest_1samp

from cluster.measure.statistics import (
    DIFFERENCE,
    Interval,
    PairedDifference,
    adjusted_p_values,
    holm,
    item_means,
    mean_interval,
    nested_interval,
    over_seeds,
    paired_by_item,
    paired_difference,
    power_over_seeds,
    seed_means,
    seeds_needed,
    smallest_gain,
    spread_over_seeds,
)

Drawn = Callable[[np.random.Generator, int], NDArray[np.float64]]


def outcomes(right: int, count: int) -> list[float]:
    return [1.0] * right + [0.0] * (count - right)


def changes(values: Sequence[float]) -> PairedDifference:
    return paired_difference([0.0] * len(values), values)


# --- one row ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("right", "count"), [(0, 8), (8, 8), (1, 1), (5, 24), (0, 600), (47, 48)])
def test_a_share_has_clopper_and_pearsons_interval(right: int, count: int) -> None:
    expected = binomtest(right, count).proportion_ci(method="exact")
    interval = mean_interval(outcomes(right, count))
    assert (interval.low, interval.high) == pytest.approx((expected.low, expected.high), abs=1e-9)
    assert (interval.mean, interval.count) == (right / count, count)


@pytest.mark.parametrize("value", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("count", [1, 8, 100])
def test_equal_scores_are_no_certainty(value: float, count: int) -> None:
    interval = mean_interval([value] * count)
    assert interval.low <= value <= interval.high
    assert interval.high - interval.low > 1 / count**0.9 / 2


def test_an_interval_narrows_with_more_tasks_to_that_of_the_normal_law() -> None:
    many = np.random.default_rng(0).random(2000)
    interval = mean_interval(many.tolist())
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * many.std() / math.sqrt(2000), rel=0.02)
    assert mean_interval([]).count == 0 and math.isnan(mean_interval([]).low)


def test_a_scorer_beyond_its_bounds_is_measured_in_its_own() -> None:
    interval = mean_interval([0.0, 5.0, 10.0, 5.0])
    assert 0.0 < interval.low < 5.0 < interval.high < 10.0


ROWS: Mapping[str, Drawn] = {
    "rarely right": lambda rng, n: (rng.random(n) < 0.03) * 1.0,
    "half right": lambda rng, n: (rng.random(n) < 0.5) * 1.0,
    "nearly always right": lambda rng, n: (rng.random(n) < 0.97) * 1.0,
    "two questions a task": lambda rng, n: rng.binomial(2, 0.25, n) / 2,
    "F1, mostly 0": lambda rng, n: (rng.random(n) < 0.4) * rng.beta(2, 2, n),
    "F1, always small": lambda rng, n: rng.beta(0.6, 8, n),
    "small, with rare hits": lambda rng, n: np.where(rng.random(n) < 0.05, 1.0, 0.1 * rng.random(n)),
}


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("count", [8, 24])
def test_intervals_cover_the_mean_as_often_as_they_say(name: str, count: int) -> None:
    """95 of 100, less two standard errors of 400 trials. A bootstrap covers 22 for shares of 3 %, n = 8."""
    rng, draw = np.random.default_rng(count), ROWS[name]
    truth = float(draw(rng, 400_000).mean())
    intervals = [mean_interval(draw(rng, count).tolist()) for _ in range(400)]
    assert sum(interval.low <= truth <= interval.high for interval in intervals) / 400 >= 0.928


def test_skewed_scores_are_covered_less_often() -> None:
    """Where most samples hold none or one of the rare values. What the docstring says: 91.5 %, by 15,000."""
    rng = np.random.default_rng(0)
    intervals = [mean_interval(np.where(rng.random(24) < 0.1, 1.0, 0.05).tolist()) for _ in range(2000)]
    assert 0.90 <= sum(one.low <= 0.145 <= one.high for one in intervals) / 2000 <= 0.935


# --- two rows ---------------------------------------------------------------------------------------------


def test_paired_comparison_sees_what_the_spread_of_tasks_hides() -> None:
    """Each task improves by 0.1 +- 0.05 while tasks differ by far more: only pairing can tell."""
    rng = np.random.default_rng(1)
    before = rng.random(40)
    difference = paired_difference(before.tolist(), (before + rng.normal(0.1, 0.05, 40)).tolist())
    assert difference.mean == pytest.approx(0.1, abs=0.02)
    assert difference.p_value < 0.05 and difference.low > 0


def test_interval_and_p_never_contradict_each_other() -> None:
    rng = np.random.default_rng(2)
    significant = 0
    for _ in range(1000):
        shares = rng.dirichlet([0.5] * 6)
        row = changes(rng.choice([-1.0, -0.5, -0.1, 0.0, 0.3, 1.0], rng.integers(1, 40), p=shares).tolist())
        assert (row.p_value < 0.05) == (row.low > 0 or row.high < 0)
        assert row.low <= row.mean <= row.high
        significant += row.p_value < 0.05
    assert 200 < significant < 800  # both were seen


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(("won", "lost"), [(1, 0), (3, 0), (8, 0), (7, 1), (20, 4)])
def test_whole_wins_and_losses_have_the_sign_tests_p(won: int, lost: int, sign: int) -> None:
    row = changes([1.0 * sign] * won + [-1.0 * sign] * lost)
    exact = binomtest(won, won + lost).pvalue
    assert row.p_value == pytest.approx(exact)
    tied = changes([1.0 * sign] * won + [-1.0 * sign] * lost + [0.0] * 10)
    assert exact / 4 < tied.p_value < exact, "the sign test leaves ties out"


@pytest.mark.parametrize("values", [[0.3] * 10, [0.0] * 5, [1.0]])
def test_equal_rows_are_never_significant_and_never_certain(values: list[float]) -> None:
    row = paired_difference(values, values)
    assert row.p_value == 1.0
    assert row.low < -0.1 and row.high > 0.1


NULLS: Mapping[str, tuple[Drawn, float]] = {
    "symmetric": (
        lambda rng, n: rng.choice([-1.0, -0.5, 0.0, 0.5, 1.0], n, p=[0.1, 0.2, 0.4, 0.2, 0.1]),
        0.05,
    ),
    "normal": (lambda rng, n: rng.normal(0, 0.3, n), 0.05),
    "one large gain in ten": (lambda rng, n: rng.choice([-0.1, 0.9], n, p=[0.9, 0.1]), 0.08),
    "one whole gain in six": (lambda rng, n: rng.choice([-0.2, 1.0], n, p=[5 / 6, 1 / 6]), 0.12),
    "one gain in four": (lambda rng, n: rng.choice([-0.25, 0.75], n, p=[0.75, 0.25]), 0.05),
    "ties, losses, rare gains": (lambda rng, n: rng.choice([-0.25, 0.0, 1.0], n, p=[0.4, 0.5, 0.1]), 0.08),
}


@pytest.mark.parametrize("name", NULLS)
@pytest.mark.parametrize("count", [8, 12, 24])
def test_paired_comparison_keeps_its_level(name: str, count: int) -> None:
    """Where the mean difference is 0. A sign-flip test rejects 44 of 100 in the third at n = 8."""
    rng, (draw, level) = np.random.default_rng(count), NULLS[name]
    rejected = sum(changes(draw(rng, count).tolist()).p_value < 0.05 for _ in range(500))
    assert rejected / 500 <= level + 0.02


def test_paired_comparison_finds_what_is_there() -> None:
    rng = np.random.default_rng(3)
    found = sum(changes(rng.normal(0.2, 0.3, 24).clip(-1, 1).tolist()).p_value < 0.05 for _ in range(200))
    assert found > 140  # 83 %, where a t test finds 89 %


def test_comparison_needs_the_same_tasks() -> None:
    with pytest.raises(ValueError, match="one value per task on both sides, got 1 and 2"):
        paired_difference([1.0], [1.0, 2.0])


def test_an_item_that_seeds_repeat_counts_once() -> None:
    before = {(0, "t0", "a"): 0.0, (1, "t0", "a"): 0.5, (0, "t1", "b"): 0.2, (2, "t9", "c"): 0.9}
    after = {(0, "t0", "a"): 1.0, (1, "t0", "a"): 0.5, (0, "t1", "b"): 0.4, (0, "t2", "d"): 0.9}
    assert item_means(before) == {"a": 0.25, "b": 0.2, "c": 0.9}
    difference = paired_by_item(before, after)
    assert (difference.count, difference.mean) == (2, pytest.approx((0.5 + 0.2) / 2))


# --- clusters ---------------------------------------------------------------------------------------------


def test_nested_interval_is_as_wide_as_groups_that_rise_and_fall_together() -> None:
    """Twelve cards of one write that all succeed or all fail are one piece of evidence, not twelve."""
    together = [[1.0] * 12, [0.0] * 12, [1.0] * 12, [0.0] * 12]
    apart = [[1.0, 0.0] * 6] * 4
    wide, narrow = nested_interval(together, 1000, 0), nested_interval(apart, 1000, 0)
    assert wide.mean == narrow.mean == 0.5 and wide.count == narrow.count == 48
    assert (wide.low, wide.high) == (0.0, 1.0)
    assert 0.2 < narrow.high - narrow.low < 0.4


def test_nested_interval_is_one_of_95_percent() -> None:
    """Three groups out of 0, 1, 1 are all 0 with probability 1/27 = 3.7 %, between 2.5 % and 5 %.

    So a 95 % interval reaches 0 and a 90 % one does not. Large groups have hardly a spread of their own.
    """
    zeros, ones = [0.0] * 30, [1.0] * 30
    assert nested_interval([zeros, ones, ones], 4000, 0).low == 0.0
    assert nested_interval([zeros, zeros, ones, ones, ones], 4000, 0).low > 0.0


def test_nested_interval_of_equal_cards_is_that_of_independent_ones() -> None:
    all_right = [[1.0] * 12] * 3
    assert nested_interval(all_right, 200, 0) == mean_interval([1.0] * 36)
    unchanged = nested_interval([[0.0] * 12] * 3, 200, 0, DIFFERENCE)
    assert unchanged.low == -unchanged.high < 0
    assert nested_interval([[0.2, 0.9, 1.0]], 200, 0) == mean_interval([0.2, 0.9, 1.0])
    assert nested_interval([[], []], 100, 0).count == 0


def test_nested_interval_weighs_values_not_groups() -> None:
    """Two large groups of ten are drawn in all but 1 % of samples: they outweigh eight single values."""
    interval = nested_interval([[1.0] * 19] * 5 + [[0.0]] * 5, 500, 0)
    assert interval.mean == 0.95
    assert interval.low > 0.8


# --- seeds ------------------------------------------------------------------------------------------------

CERTAIN = PairedDifference(0.1, 0.09, 0.11, 1e-9, 600)


def test_seeds_have_the_t_tests_interval_and_p() -> None:
    means = {0: 0.088, 1: 0.151, 2: 0.174}
    expected = ttest_1samp(list(means.values()), 0)
    interval = expected.confidence_interval(0.95)
    row = over_seeds(means, CERTAIN)
    assert (row.low, row.high) == pytest.approx((interval.low, interval.high))
    assert (row.mean, row.p_value, row.count) == (pytest.approx(0.1376667), pytest.approx(expected.pvalue), 3)


def test_two_seeds_have_a_mean_and_nothing_else() -> None:
    for means in ({}, {0: 0.1}, {0: 0.1, 1: 0.2}):
        row = over_seeds(means, CERTAIN)
        assert row.count == len(means)
        assert math.isnan(row.low) and math.isnan(row.high) and math.isnan(row.p_value)


def test_equal_seeds_are_no_surer_than_their_questions() -> None:
    questions = PairedDifference(0.1, -0.05, 0.25, 0.2, 12)
    row = over_seeds({0: 0.1, 1: 0.1, 2: 0.1}, questions)
    assert (row.low, row.high, row.p_value) == (-0.05, 0.25, 0.2)


@pytest.mark.parametrize("spread", [0.04, 0.08])
def test_a_spread_between_seeds_makes_nothing_significant(spread: float) -> None:
    """Three seeds of 200 tasks. With tasks as the unit 20 to 29 of 100 comparisons are."""
    rng, rejected, by_tasks = np.random.default_rng(4), 0, 0
    for _ in range(300):
        tasks = rng.normal(rng.normal(0, spread, (3, 1)), 0.4, (3, 200)).clip(-1, 1)
        questions = changes(tasks.ravel().tolist())
        row = over_seeds(dict(enumerate(tasks.mean(axis=1).tolist())), questions)
        rejected += row.p_value < 0.05
        by_tasks += questions.p_value < 0.05
    assert rejected <= 27  # 5 % of 300 is 15, its standard error 3.8
    assert by_tasks > 45


def test_a_seeds_mean_is_over_its_questions() -> None:
    values = {(1, "t0", "a"): 0.0, (1, "t1", "a"): 1.0, (1, "t2", "b"): 1.0, (0, "t0", "a"): 0.25}
    assert seed_means(values) == {0: 0.25, 1: 0.75}


# --- several comparisons ----------------------------------------------------------------------------------


def test_holm_is_the_textbooks() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []


def test_a_comparison_without_a_test_does_not_dilute_the_others() -> None:
    gain, nothing = changes([1.0] * 8), paired_difference([], [])
    few = over_seeds({0: 0.1}, gain)
    first, second, third, fourth = adjusted_p_values([gain, nothing, few, gain])
    assert first == fourth == 2 * gain.p_value
    assert math.isnan(second) and math.isnan(third)


def test_figures_are_the_same_in_every_version() -> None:
    """Reports of one commit can be compared with those of another. nested: from NumPy's default generator."""
    values, after = [0.1, 0.4, 0.35, 0.8, 0.0], [0.3, 0.4, 0.5, 0.7, 0.6]
    plain = Interval(0.33, 0.08538243731734145, 0.6719450357948216, 5)
    groups, nested = [outcomes(9, 12), outcomes(2, 12)], Interval(11 / 24, 1 / 12, 0.834375, 24)
    paired = PairedDifference(0.17, -0.27963024536953685, 0.5730541288507114, 0.5539507667653828, 5)
    assert astuple(mean_interval(values)) == pytest.approx(astuple(plain), abs=1e-9)
    assert astuple(nested_interval(groups, 200, 3)) == pytest.approx(astuple(nested), abs=1e-9)
    assert astuple(paired_difference(values, after)) == pytest.approx(astuple(paired), abs=1e-9)


# --- power ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gain", "alpha", "seeds"), [(1.0, 0.05, 10), (0.5, 0.05, 34), (2.0, 0.05, 5), (1.0, 0.01, 16)]
)
def test_seeds_needed_are_those_of_the_text_books_t_test(gain: float, alpha: float, seeds: int) -> None:
    """G*Power's one-sample t test, two-sided, power 0.8."""
    assert seeds_needed(gain, 1.0, alpha) == seeds
    assert seeds_needed(4 * gain, 4.0, alpha) == seeds
    assert power_over_seeds(gain, 1.0, seeds - 1, alpha) < 0.8 <= power_over_seeds(gain, 1.0, seeds, alpha)


def test_the_test_over_seeds_has_the_power_that_is_said() -> None:
    sure = PairedDifference(0.0, 0.0, 0.0, 0.0, 99)  # over questions: the test of seeds alone decides
    rng = np.random.default_rng(0)
    drawn = rng.normal(0.05, 0.04, (4000, 6))
    found = [over_seeds(dict(enumerate(row)), sure).p_value < 0.05 for row in drawn.tolist()]
    assert np.mean(found) == pytest.approx(power_over_seeds(0.05, 0.04, 6, 0.05), abs=0.02)


def test_power_at_its_ends() -> None:
    assert power_over_seeds(0.0, 1.0, 5, 0.05) == pytest.approx(0.05)
    assert power_over_seeds(99.0, 1.0, 5, 0.01) == pytest.approx(1.0)
    assert seeds_needed(0.01, 1.0, 0.05) is None
    gain = smallest_gain(0.04, 5, 0.05)
    assert power_over_seeds(gain, 0.04, 5, 0.05) == pytest.approx(0.8, abs=1e-6)
    assert math.isnan(spread_over_seeds({0: 0.5})) and spread_over_seeds({0: 0.0, 1: 2.0}) == math.sqrt(2)
