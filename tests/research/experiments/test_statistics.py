"""Test the comparison's statistics against closed forms; `test_committed_pages.py` tests them in tables."""

from __future__ import annotations

import math

import numpy as np
import pytest

pytest.importorskip("scipy")

from scipy import stats

from experiments.statistics import compare_pairs, correct_holm, count_steps_to_target, find_useful_range


def test_differences_have_students_interval_and_effects_in_deviations_of_the_second() -> None:
    first, second = np.random.default_rng(1).standard_normal((2, 10))
    found = compare_pairs(first, second)
    half = stats.t.ppf(0.975, 9) * np.std(first - second, ddof=1) / math.sqrt(10)
    assert (found.low, found.high) == pytest.approx((found.mean - half, found.mean + half))
    assert found.p == pytest.approx(stats.ttest_rel(first, second).pvalue)
    assert found.effect == pytest.approx(found.mean / np.std(second, ddof=1))
    assert compare_pairs(second, second)[:4] == (0, 0, 0, 1)
    assert compare_pairs([1.5, 2.5], [1.0, 2.0]).excludes_zero
    with pytest.raises(ValueError, match="first and second have 1 and 2 values, but must have as many, at least 2"):
        compare_pairs([1.0], [1.0, 2.0])


def test_holm_multiplies_the_least_of_four_by_four_and_no_later_one_is_smaller() -> None:
    assert correct_holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_steps_to_a_target_are_of_the_first_look_that_reaches_it() -> None:
    accuracy = [0.1, 0.5, 0.9, 0.8, 0.95]
    assert count_steps_to_target(accuracy, 20, 0.9, sign=-1) == 40
    assert count_steps_to_target(accuracy, 20, 0.96, sign=-1) is None
    loss = [2.0, 1.0, None, 0.5]
    assert count_steps_to_target(loss, 10, 0.6, sign=1) == 30
    assert count_steps_to_target(loss, 10, 2.5, sign=1) == 0
    assert count_steps_to_target([2.0, None, None], 10, 0.5, sign=1) is None


def test_the_useful_range_of_a_parabola_in_the_logarithm() -> None:
    # The values are within 1% of 2 at |log10(rate) - log10(0.01)| <= 0.1 x 2.
    rates = np.logspace(-4, 0, 401)
    values = 2 + 0.5 * np.log10(rates / 0.01) ** 2
    found = find_useful_range(list(rates), list(values))
    # The range excludes a second optimum, and ends next to a diverging rate.
    assert find_useful_range([1, 10, 100, 1000], [1.0, 2.0, 1.001, 2.0]) == (1, pytest.approx(10**0.01), True, False)
    assert find_useful_range([0.01, 0.1, 1.0], [math.inf, 1.0, math.inf]) == (0.1, 0.1, False, False)
    assert find_useful_range([0.01, 0.1], [math.inf, math.inf]) is None
    assert found is not None
    assert (found.open_below, found.open_above) == (False, False)
    # The chords of a parabola, 0.01 apart, are at most 0.5 x 0.005^2 above it. Divided by the slope of 0.2, that moves an end.
    assert math.log10(found.low) == pytest.approx(-2.2, abs=1e-4)
    assert math.log10(found.factor) == pytest.approx(0.4, abs=2e-4)
