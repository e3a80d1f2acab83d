"""Compute statistics of many runs: intervals of paired differences, steps to a target, useful ranges of learning rates."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats


class Difference(NamedTuple):
    """A mean of paired differences, with Student's interval.

    Attributes:
        mean: of the differences.
        low: the lower end of the 95% interval.
        high: the upper end of the interval.
        p: of the two-sided t-test.
        effect: the mean in standard deviations of the second values of the pairs.
    """

    mean: float
    low: float
    high: float
    p: float
    effect: float

    @property
    def excludes_zero(self) -> bool:
        """Whether zero is outside the closed interval."""
        return self.low > 0 or self.high < 0


def compare_pairs(first: ArrayLike, second: ArrayLike) -> Difference:
    """Compute the mean of `first - second`, pair by pair, and Student's interval, which is exact where differences are normal.

    Args:
        first: one value of each pair, at least 2.
        second: the other values, in the same order.

    Raises:
        ValueError: the numbers of values differ or are less than 2.
    """
    first, second = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if len(first) != len(second) or len(first) < 2:
        raise ValueError(f"first and second have {len(first)} and {len(second)} values, but must have as many, at least 2")
    differences = first - second
    mean, spread = float(differences.mean()), float(second.std(ddof=1))
    if not np.ptp(differences):  # the test's statistic would be infinite, or NaN
        return Difference(mean, mean, mean, 0.0 if mean else 1.0, mean / spread if spread else math.nan)
    test = stats.ttest_1samp(differences, 0)
    interval = test.confidence_interval()
    effect = mean / spread if spread else math.nan
    return Difference(mean, float(interval.low), float(interval.high), float(test.pvalue), effect)


def correct_holm(values: Sequence[float]) -> list[float]:
    """Correct p-values for many comparisons by Holm's method.

    Args:
        values: the p-values.

    Returns:
        The corrected p-values, in the same order.
    """
    order = np.argsort(values)
    factors = np.arange(len(values), 0, -1)
    corrected = np.minimum(1, np.maximum.accumulate(np.asarray(values)[order] * factors))
    result = np.empty(len(values))
    result[order] = corrected
    return [float(each) for each in result]


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
