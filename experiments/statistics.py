"""Compute statistics of many runs: intervals of paired differences, steps to a target, useful ranges of learning rates."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

_RESAMPLES = 100_000
_BATCH = 10_000  # resamples in memory at once


class Difference(NamedTuple):
    """A mean of paired differences, with its interval.

    Attributes:
        mean: of the differences.
        low: the lower end of the interval.
        high: the upper end of the interval.
    """

    mean: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether zero is outside the closed interval."""
        return self.low > 0 or self.high < 0


def compute_tail(count: int, level: float = 0.95) -> float:
    """Compute the share of bootstrap means to cut off on each side, so that the interval has its nominal coverage.

    For ten values the 95% percentile interval covers 90%: the bootstrap uses the sample's spread for the population's, and the
    normal quantile for Student's. This share corrects both, exactly where the means are normal (Hesterberg, 2015, "What
    teachers should know about the bootstrap": the expanded percentile interval).

    Args:
        count: the number of values, at least 2.
        level: the nominal coverage.
    """
    return float(stats.norm.cdf(math.sqrt(count / (count - 1)) * stats.t.ppf((1 - level) / 2, count - 1)))


def compare_pairs(first: Sequence[float], second: Sequence[float], level: float = 0.95) -> Difference:
    """Compute the mean of `first - second`, pair by pair, and its bootstrap interval, always with the same random numbers.

    Args:
        first: one value of each pair, at least 2.
        second: the other values, in the same order.
        level: the nominal coverage.

    Raises:
        ValueError: the numbers of values differ or are less than 2.
    """
    if len(first) != len(second) or len(first) < 2:
        raise ValueError(f"first and second have {len(first)} and {len(second)} values, but must have as many, at least 2")
    differences = np.subtract(first, second, dtype=np.float64)
    found = stats.bootstrap(
        (differences,),
        np.mean,
        n_resamples=_RESAMPLES,
        batch=_BATCH,
        vectorized=True,
        confidence_level=1 - 2 * compute_tail(len(differences), level),
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return Difference(float(differences.mean()), float(found.low), float(found.high))


def count_steps_to_target(curve: Sequence[float | None], every: int, target: float, sign: int) -> int | None:
    """Return the step of the first look that reaches the target; None if no look does.

    Args:
        curve: the metric at step 0 and after every `every` steps; None where the metric is missing.
        every: the steps between looks.
        target: of the metric.
        sign: 1 where a low metric is better, else -1.
    """
    reached = (look for look, value in enumerate(curve) if value is not None and sign * value <= sign * target)
    first = next(reached, None)
    return None if first is None else first * every


def compute_median_steps(steps: Sequence[int | None]) -> float | None:
    """Compute the median, where None counts as later than any step; None if at least half of the values are None.

    Args:
        steps: of the runs, at least one.
    """
    median = statistics.median(math.inf if each is None else each for each in steps)
    return median if math.isfinite(median) else None


class Range(NamedTuple):
    """A range of learning rates whose metric is near the best.

    Attributes:
        low: the lowest.
        high: the highest.
        open_below: whether the range reaches the lowest rate of the trials, so that lower rates may belong to it.
        open_above: likewise for the highest rate.
    """

    low: float
    high: float
    open_below: bool
    open_above: bool

    @property
    def factor(self) -> float:
        """The ratio of the ends."""
        return self.high / self.low


def find_useful_range(rates: Sequence[float], values: Sequence[float], tolerance: float = 0.01) -> Range | None:
    """Find the range around the best learning rate whose values are within a tolerance of the best.

    Between the given rates, values are linear in the rate's logarithm.

    Args:
        rates: the learning rates, in rising order.
        values: the metric of each rate, where low is better; infinite where training failed.
        tolerance: relative to the size of the best value.

    Returns:
        The range; None where no value is finite.
    """
    best = min(range(len(values)), key=values.__getitem__)
    if not math.isfinite(values[best]):
        return None
    limit = values[best] + tolerance * abs(values[best])

    def find_end(step: int) -> tuple[float, bool]:
        place = best
        while 0 <= place + step < len(values):
            inside, outside = values[place], values[place + step]
            if outside > limit:
                share = (limit - inside) / (outside - inside)  # 0 where outside is infinite
                return rates[place] * (rates[place + step] / rates[place]) ** share, False
            place += step
        return rates[place], True

    (low, open_below), (high, open_above) = find_end(-1), find_end(1)
    return Range(low, high, open_below, open_above)
