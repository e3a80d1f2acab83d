"""Test the noise scale from squared norms of parts and of the whole, on gradients with a given trace and squared norm."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from vsgd.monitor.noise_scale import average_estimates, estimate_from_parts
from vsgd.posterior import NoiseScale

TRACE, SQUARED_NORM = 200.0, 1.5


@pytest.mark.parametrize("parts", [2, 4, 7])
def test_expected_squared_norms_give_trace_and_squared_norm(parts: int) -> None:
    size = 16
    part, whole = (SQUARED_NORM + TRACE / examples for examples in (size, parts * size))
    assert estimate_from_parts(part, whole, parts=parts, micro_batch_size=size) == pytest.approx((TRACE, SQUARED_NORM))


def test_averages_are_unbiased_and_their_standard_errors_are_right() -> None:
    runs, steps, parts, size, elements = 1000, 100, 4, 16, 20
    rng = np.random.default_rng(0)
    # Examples with this trace and mean, averaged over a part.
    grads = rng.standard_normal((runs, steps, parts, elements)) * math.sqrt(TRACE / elements / size)
    grads += math.sqrt(SQUARED_NORM / elements)
    part, whole = (grads**2).sum(-1).mean(-1), (grads.mean(2) ** 2).sum(-1)
    estimates = estimate_from_parts(part, whole, parts=parts, micro_batch_size=size)
    for estimate, truth in zip(estimates, (TRACE, SQUARED_NORM), strict=True):
        assert abs(estimate.mean() - truth) < 4 * estimate.std() / math.sqrt(runs * steps)
    found = [average_estimates(NoiseScale(*pair)) for pair in zip(*estimates, strict=True)]
    errors = np.array([(each.scale - TRACE / SQUARED_NORM) / each.error for each in found])
    assert errors.mean() == pytest.approx(0, abs=0.2)
    assert errors.var() == pytest.approx(1, abs=0.2)


def test_steps_that_are_not_finite_are_left_out() -> None:
    def average(*pairs: Any) -> Any:
        return average_estimates(NoiseScale(*np.array(pairs).T))

    seen = average((8.0, 1.0), (math.inf, 1.0), (10.0, 3.0), (1.0, math.nan))
    assert seen == average((8.0, 1.0), (10.0, 3.0))
    assert (seen.scale, seen.steps) == (4.5, 2)
    # A mean without a spread or a squared norm has no standard error; without steps, the mean is missing.
    assert average((8.0, 2.0))[:2] == (8.0, 2.0)
    assert average((0.0, 0.0), (0.0, 0.0)).scale == math.inf
    assert all(math.isnan(average(pair).error) for pair in [(8.0, 2.0), (0.0, 0.0), (math.nan, 1.0)])
    assert math.isnan(average((math.nan, 1.0)).scale)


@pytest.mark.parametrize("bad", [{"parts": 1}, {"parts": 2.0}, {"micro_batch_size": 0}])
def test_bad_arguments_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(bad))} must be"):
        estimate_from_parts(2.0, 1.0, **{"parts": 2, "micro_batch_size": 8, **bad})
