"""Intervals and tests of scores: over tasks, over clusters of cards, over seeds, and Holm's adjustment.

    scores of tasks, 0 to 1 --> mean_interval          differences, -1 to 1 --> paired_difference
    a score of each seed    --> over_seeds             cards of some writes --> nested_interval

One method serves scores and differences, and 0/1 outcomes are no special case. An interval and its p are one
test: p < 0.05 exactly where the 95 % interval leaves 0 out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import betainc, betaincinv, nctdtr, stdtr, stdtrit

Played = tuple[int, str, str]
"""Seed, task id, item (``EpisodeScore.item``). An id may stand for other questions elsewhere."""

Bounds = tuple[float, float]
SCORE: Bounds = (0.0, 1.0)
DIFFERENCE: Bounds = (-1.0, 1.0)
FEWEST_SEEDS = 3
"""With two seeds the t interval is 12.7 standard errors wide on each side: it tells nothing."""

POWER = 0.8
"""How often a planned comparison should find what is there."""
MOST_SEEDS = 200  # that a plan may name

_NAN = float("nan")
_TAIL = 0.025  # of a 95 % interval


@dataclass(frozen=True, slots=True)
class Interval:
    """The mean of ``count`` tasks and its 95 % interval. All NaN without a task."""

    mean: float
    low: float
    high: float
    count: int


@dataclass(frozen=True, slots=True)
class PairedDifference:
    """Mean of (after - before) over the ``count`` units that both sides finished: tasks, questions or seeds.

    The 95 % interval and the two-sided ``p_value`` are one test. NaN where there are too few seeds.
    """

    mean: float
    low: float
    high: float
    p_value: float
    count: int


# --- over tasks -------------------------------------------------------------------------------------------


def mean(values: Sequence[float]) -> float:
    """NaN without values."""
    return sum(values) / len(values) if values else math.nan


def mean_interval(values: Sequence[float], bounds: Bounds = SCORE) -> Interval:
    """The mean of one score per task, with the interval of Korn and Graubard (1998).

    That is Clopper and Pearson's interval for the *effective* number of tasks: as many 0/1 outcomes as would
    make the mean vary as much as it does. For 0/1 outcomes it is Clopper and Pearson's itself. At an edge it
    stays wide: eight right answers of eight are [63, 100] %. Simulated coverage with 8 to 48 tasks: 95 % or
    more for shares, rare ones too (a bootstrap's: 22 % for shares of 3 %); for skewed scores down to 91 %
    (24 tasks of .05, of which one in ten has 1: 91.5; 48 tasks of .9, of which one in twenty has 0: 90.5).
    """
    data = np.asarray(values, dtype=np.float64)
    if data.size == 0:
        return Interval(_NAN, _NAN, _NAN, 0)
    return Interval(float(data.mean()), *_Share.of(data, bounds).interval(), data.size)


def paired_difference(before: Sequence[float], after: Sequence[float]) -> PairedDifference:
    """Compare two rows task by task, so that the difficulty of tasks cancels.

    Interval and p are ``mean_interval``'s test of the differences. For wins and losses of a whole point it
    is the exact sign test where no task is a tie. Ties make p smaller than that test's, which leaves them out
    (five wins and 43 ties: .036, not .0625). Simulated level at a nominal .05, over 8 to 100 tasks: at most
    .05 for symmetric differences, .12 for skewed ones (12 tasks, of which one in six gains 1 and the others
    lose .2; 8 tasks, of which one in four gains 1 and the others lose 1/3: .10). Where one of ten gains .9
    and the others lose .1, 8 tasks give .00; a sign-flip or t test gives .44. The price: 8 tasks find a gain
    of .2 with a spread of .3 in 10 % of cases (t test: 36 %), 24 in 83 % (89 %).
    """
    if len(before) != len(after):
        counts = f"got {len(before)} and {len(after)}"
        raise ValueError(f"a paired comparison needs one value per task on both sides, {counts}")
    data = np.asarray(after, dtype=np.float64) - np.asarray(before, dtype=np.float64)
    if data.size == 0:
        return PairedDifference(_NAN, _NAN, _NAN, _NAN, 0)
    share = _Share.of(data, DIFFERENCE)
    return PairedDifference(float(data.mean()), *share.interval(), share.p_value(0.0), data.size)


@dataclass(frozen=True, slots=True)
class _Share:
    """Values from ``low`` to ``high``, as the share of the way: ``hits`` of ``trials``, both fractional."""

    hits: float
    trials: float
    low: float
    high: float

    @staticmethod
    def of(data: NDArray[np.float64], bounds: Bounds) -> _Share:
        """``bounds`` give way to a scorer that reports values beyond them."""
        low, high = min(bounds[0], float(data.min())), max(bounds[1], float(data.max()))
        scaled = (data - low) / (high - low)
        # Equal values would have no variance, and any interval no width. Half a value at either end is added
        # to the variance, not to the mean. (Half a value is the prior that Jeffreys' interval uses.)
        count = data.size + 1
        centre = (scaled.sum() + 0.5) / count
        variance = (np.square(scaled).sum() + 0.5) / count - centre**2
        trials = data.size * centre * (1 - centre) / variance
        return _Share(float(scaled.mean() * trials), float(trials), low, high)

    def interval(self) -> tuple[float, float]:
        hits, misses = self.hits, self.trials - self.hits
        low = betaincinv(hits, misses + 1, _TAIL) if hits > _NOTHING else 0.0
        high = betaincinv(hits + 1, misses, 1 - _TAIL) if misses > _NOTHING else 1.0
        span = self.high - self.low
        return self.low + span * float(low), self.low + span * float(high)

    def p_value(self, mean: float) -> float:
        """Two-sided. It is below 0.05 where ``interval`` leaves ``mean`` out."""
        share = (mean - self.low) / (self.high - self.low)
        hits, misses = self.hits, self.trials - self.hits
        as_many = betainc(hits, misses + 1, share) if hits > _NOTHING else 1.0
        as_few = betainc(misses, hits + 1, 1 - share) if misses > _NOTHING else 1.0
        return min(1.0, 2 * float(min(as_many, as_few)))


_NOTHING = 1e-9  # hits of values that are all at one end, but for rounding


def nested_interval(
    groups: Sequence[Sequence[float]], samples: int, seed: int, bounds: Bounds = SCORE
) -> Interval:
    """Bootstrap of the mean of all values, where the values of a group rise and fall together.

    A group is one write's cards. Each sample draws groups, and values within each. The interval is never
    narrower than that of as many independent values, so it has a width where all are equal. With few groups
    it is too narrow all the same. With one group it is ``mean_interval``.
    """
    data = [np.asarray(group, dtype=np.float64) for group in groups if len(group)]
    if not data:
        return Interval(_NAN, _NAN, _NAN, 0)
    independent = mean_interval(np.concatenate(data).tolist(), bounds)
    if len(data) == 1:
        return independent
    low, high = np.quantile(_resampled_means(data, samples, seed), [_TAIL, 1 - _TAIL])
    return Interval(
        independent.mean,
        min(independent.low, float(low)),
        max(independent.high, float(high)),
        independent.count,
    )


def _resampled_means(data: Sequence[NDArray[np.float64]], samples: int, seed: int) -> NDArray[np.float64]:
    """The mean of all values in each of ``samples`` resamples of groups and of values, float64 [samples]."""
    count = len(data)
    picked = np.random.default_rng([seed, count]).integers(0, count, (samples, count))
    means = np.stack(
        [
            _means_of_draws(group, samples * count, seed + place).reshape(samples, count)
            for place, group in enumerate(data)
        ]
    )
    sizes = np.array([group.size for group in data])[picked]
    drawn = np.take_along_axis(means, picked[None], axis=0)[0]  # [samples, groups]
    # Groups differ in size. Weighing by size keeps this the mean of values, not of groups.
    return (drawn * sizes).sum(axis=1) / sizes.sum(axis=1)


def _means_of_draws(data: NDArray[np.float64], samples: int, seed: int) -> NDArray[np.float64]:
    """Means of ``samples`` draws with replacement, in blocks of at most a million numbers."""
    generator = np.random.default_rng(seed)
    most = max(1, 1_000_000 // data.size)
    blocks = [min(most, samples - start) for start in range(0, samples, most)]
    draws = (data[generator.integers(0, data.size, (rows, data.size))] for rows in blocks)
    return np.concatenate([drawn.mean(axis=1) for drawn in draws])


# --- over questions and seeds -----------------------------------------------------------------------------


def item_means(values: Mapping[Played, float]) -> dict[str, float]:
    """The mean of each item, which is the unit to resample: a question asked again is no new evidence."""
    by_item: dict[str, list[float]] = {}
    for (_, _, item), value in values.items():
        by_item.setdefault(item, []).append(value)
    return {item: float(np.mean(repeats)) for item, repeats in by_item.items()}


def paired_by_item(before: Mapping[Played, float], after: Mapping[Played, float]) -> PairedDifference:
    """Compare over items. Pairs share seed, task and item; those of one item are averaged first."""
    shared = [played for played in after if played in before]
    first, second = (item_means({played: side[played] for played in shared}) for side in (before, after))
    return paired_difference(list(first.values()), list(second.values()))


def over_seeds(means: Mapping[int, float], questions: PairedDifference) -> PairedDifference:
    """The t interval and t test over the seeds' means: the unit of a claim about training is the run.

    Taking tasks as the unit, a seed-to-seed spread of 4 (8) points makes 20 (29) % of nothing significant.
    Below ``FEWEST_SEEDS`` there is no interval and no p. ``questions`` is the same difference over questions.
    The claim must hold over these too (all seeds may ask the same few, and equal seeds have no spread), so
    the interval spans both and p is the larger one.
    """
    by_seed = list(means.values())
    mean = float(np.mean(by_seed)) if by_seed else _NAN
    if len(by_seed) < FEWEST_SEEDS:
        return PairedDifference(mean, _NAN, _NAN, _NAN, len(by_seed))
    freedom = len(by_seed) - 1
    error = float(np.std(by_seed, ddof=1)) / math.sqrt(len(by_seed))
    reach = float(stdtrit(freedom, 1 - _TAIL)) * error
    p_value = 2 * float(stdtr(freedom, -abs(mean) / error)) if error > 0 else 0.0
    return PairedDifference(
        mean,
        min(mean - reach, questions.low),
        max(mean + reach, questions.high),
        max(p_value, questions.p_value),
        len(by_seed),
    )


def spread_over_seeds(means: Mapping[int, float]) -> float:
    """The standard deviation over the seeds' means; NaN below two seeds."""
    return float(np.std(list(means.values()), ddof=1)) if len(means) > 1 else _NAN


def power_over_seeds(gain: float, spread: float, seeds: int, alpha: float) -> float:
    """How likely the two-sided t test over ``seeds`` finds a ``gain``. ``spread``: their standard deviation.

    Of the test alone: ``over_seeds`` also asks that the gain holds over questions.
    """
    freedom, shift = seeds - 1, gain / spread * math.sqrt(seeds)
    reach = float(stdtrit(freedom, 1 - alpha / 2))
    # Where the shift is large, the far tail underflows to NaN.
    above, below = 1 - nctdtr(freedom, shift, reach), nctdtr(freedom, shift, -reach)
    return float(np.nan_to_num(above, nan=1.0) + np.nan_to_num(below))


def seeds_needed(gain: float, spread: float, alpha: float) -> int | None:
    """The fewest seeds that find a ``gain`` with ``POWER``; None above ``MOST_SEEDS``."""
    found = (
        seeds
        for seeds in range(FEWEST_SEEDS, MOST_SEEDS + 1)
        if power_over_seeds(gain, spread, seeds, alpha) >= POWER
    )
    return next(found, None)


def smallest_gain(spread: float, seeds: int, alpha: float) -> float:
    """The gain that ``seeds`` find with ``POWER``, in the unit of ``spread``."""
    low, high = 0.0, 100.0
    for _ in range(40):
        middle = (low + high) / 2
        enough = power_over_seeds(middle, 1.0, seeds, alpha) >= POWER
        low, high = (low, middle) if enough else (middle, high)
    return high * spread


def seed_means(values: Mapping[Played, float]) -> dict[int, float]:
    """The mean over the items of each seed, in the order of seeds."""
    seeds = sorted({seed for seed, _, _ in values})
    return {
        seed: float(np.mean(list(item_means({k: v for k, v in values.items() if k[0] == seed}).values())))
        for seed in seeds
    }


# --- several comparisons ----------------------------------------------------------------------------------


def adjusted_p_values(differences: Sequence[PairedDifference]) -> list[float]:
    """Holm over the comparisons that have a p. The others test nothing: they get NaN and do not count."""
    p_values = [difference.p_value for difference in differences]
    adjusted = iter(holm([p for p in p_values if math.isfinite(p)]))
    return [next(adjusted) if math.isfinite(p) else _NAN for p in p_values]


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
