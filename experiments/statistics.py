"""What many runs say together: intervals of paired differences, steps to a target, the width of the useful learning rates."""

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
    """A mean of paired differences.

    Attributes:
        mean: of the differences.
        low: where the interval begins.
        high: where it ends.
    """

    mean: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether zero is outside the interval, its ends counted in."""
        return self.low > 0 or self.high < 0


def compute_tail(count: int, level: float = 0.95) -> float:
    """The share of bootstrap means to cut off on each side, for an interval of so many values to cover what it says.

    The percentile interval of ten values covers 90% where it says 95%: the bootstrap takes the values' spread for the
    population's, and the normal quantile for Student's. This share makes good for both, exactly where the means are normal
    (Hesterberg, 2015, "What teachers should know about the bootstrap": the expanded percentile interval).

    Args:
        count: of the values, at least 2.
        level: of the interval.
    """
    return float(stats.norm.cdf(math.sqrt(count / (count - 1)) * stats.t.ppf((1 - level) / 2, count - 1)))


def compare_pairs(ours: Sequence[float], theirs: Sequence[float], level: float = 0.95) -> Difference:
    """The mean of `ours - theirs`, pair by pair, and its bootstrap interval, the same whenever it is asked for.

    Args:
        ours: one value for each pair, at least 2.
        theirs: the other ones, in the same order.
        level: of the interval.

    Raises:
        ValueError: there are not as many of one as of the other, or less than 2.
    """
    if len(ours) != len(theirs) or len(ours) < 2:
        raise ValueError(f"ours and theirs have {len(ours)} and {len(theirs)} values, but must have as many, at least 2")
    differences = np.subtract(ours, theirs, dtype=np.float64)
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
    """The step of the first look at which the target is reached; None: of no look.

    Args:
        curve: the metric at step 0 and every so many steps; None where there is no number.
        every: the steps from look to look.
        target: of the metric.
        sign: 1 where less of the metric is better, else -1.
    """
    reached = (look for look, value in enumerate(curve) if value is not None and sign * value <= sign * target)
    first = next(reached, None)
    return None if first is None else first * every


def compute_median_steps(steps: Sequence[int | None]) -> float | None:
    """The median, where None is later than any step; None itself where half of them or more are.

    Args:
        steps: of the runs, at least one.
    """
    median = statistics.median(math.inf if each is None else each for each in steps)
    return median if math.isfinite(median) else None


class Range(NamedTuple):
    """Learning rates whose metric is near the best.

    Attributes:
        low: the lowest.
        high: the highest.
        open_below: whether the lowest that was tried is among them, so that lower ones may be.
        open_above: whether the highest is.
    """

    low: float
    high: float
    open_below: bool
    open_above: bool

    @property
    def factor(self) -> float:
        """The width."""
        return self.high / self.low


def find_useful_range(rates: Sequence[float], values: Sequence[float], tolerance: float = 0.01) -> Range | None:
    """The learning rates around the best one whose values are within a part of its; None where no value is finite.

    Between the rates that were tried, values are taken to be linear in the rate's logarithm.

    Args:
        rates: ascending.
        values: of each rate, to be low; infinite where training failed.
        tolerance: the part, of the best value's size.
    """
    best = min(range(len(values)), key=values.__getitem__)
    if not math.isfinite(values[best]):
        return None
    limit = values[best] + tolerance * abs(values[best])

    def end(step: int) -> tuple[float, bool]:
        place = best
        while 0 <= place + step < len(values):
            inside, outside = values[place], values[place + step]
            if outside > limit:
                share = (limit - inside) / (outside - inside)  # 0 where outside is infinite
                return rates[place] * (rates[place + step] / rates[place]) ** share, False
            place += step
        return rates[place], True

    (low, open_below), (high, open_above) = end(-1), end(1)
    return Range(low, high, open_below, open_above)
