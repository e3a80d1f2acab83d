"""Test the gradient observer's filter against closed forms and a Kalman filter with the true variances."""

from __future__ import annotations

import numpy as np
import pytest

from vsgd import observer
from vsgd.observer import Hyperparameters, State


def solve_best_gain(ratio: float) -> float:
    """Return the gain w of the stationary Kalman filter for this ratio of drift to noise: ratio = w^2 / (1 - w)."""
    return (-ratio + np.sqrt(ratio**2 + 4 * ratio)) / 2


@pytest.mark.parametrize("ratio", [1e-3, 0.05, 1.0])
@pytest.mark.parametrize("factor", [0.5, 1.0, 1.5])
def test_innovations_correlate_with_the_sensitivity_unless_the_gain_is_best(ratio: float, factor: float) -> None:
    # docs/uncertainty.md derives E[d e] = ((1 - w) V - w R) / (w (2 - w)), V = (Q + w^2 R) / (w (2 - w)).
    rng, gain = np.random.default_rng(0), factor * solve_best_gain(ratio)
    update = observer.make_update(np)
    # A gain rate of 0 keeps the gain constant.
    c = observer.compute_coefficients(10**6, Hyperparameters())._replace(gain_rate=0.0)
    state = State(np.zeros(4000), np.full(4000, gain), np.zeros(4000), np.ones(4000))
    truth = np.zeros(4000)
    products = []
    for step in range(1500):
        truth = truth + np.sqrt(ratio) * rng.standard_normal(4000)
        grad = truth + rng.standard_normal(4000)
        if step >= 500:
            products.append(np.mean((grad - state.mean) * state.sensitivity))
        state = update(grad, state, c)
    prediction = (ratio + gain**2) / (gain * (2 - gain))
    expected = ((1 - gain) * prediction - gain) / (gain * (2 - gain))
    scale = (prediction + 1) / np.sqrt(gain)  # for one product
    assert np.mean(products) == pytest.approx(expected, abs=0.01 * scale)
    assert (abs(expected) > 0.03 * scale) == (factor != 1)


def test_intervals_noise_and_error_match_the_kalman_filter_that_has_the_variances() -> None:
    # Slow, medium and fast elements, over three decades of scale.
    ratio = np.repeat([1e-3, 3e-2, 1.0], 400)
    scale = np.tile(np.logspace(-3, 0, 400), 3)
    best = solve_best_gain(ratio)
    rng, update = np.random.default_rng(1), observer.make_update(np)
    truth, kalman = np.zeros(1200), np.zeros(1200)
    state = State(*(np.full(1200, value) for value in observer.INITIAL_STATE))
    sums = np.zeros((4, 1200))
    for step in range(1, 8001):
        truth = truth + scale * np.sqrt(ratio) * rng.standard_normal(1200)
        grad = truth + scale * rng.standard_normal(1200)
        # The gain rate is larger than the default, which needs more steps.
        state = update(grad, state, observer.compute_coefficients(step, Hyperparameters(gain_rate=0.01)))
        kalman += best * (grad - kalman)
        if step > 4000:
            posterior = observer.compute_posterior(state)
            error = (posterior.mean - truth) ** 2
            covered = error < 1.6449**2 * posterior.variance
            sums += covered, posterior.noise_variance / scale**2, error / scale**2, (kalman - truth) ** 2 / scale**2
    cover, noise, error, least = (sums / 4000).reshape(4, 3, 400).mean(axis=2)
    np.testing.assert_allclose(cover, 0.9, atol=0.03)
    np.testing.assert_allclose(noise, 1.0, atol=0.05)
    np.testing.assert_allclose(error / least, 1.0, atol=0.05)
    np.testing.assert_allclose(state.gain.reshape(3, 400).mean(axis=1) / solve_best_gain(ratio[::400]), 1.0, atol=0.2)


def test_the_loss_may_be_scaled() -> None:
    # Scale by a power of two, so that float32 rounds identically.
    rng, update = np.random.default_rng(2), observer.make_update(np)
    states = [State(*(np.full(50, value, np.float32) for value in observer.INITIAL_STATE)) for _ in range(2)]
    for step in range(1, 301):
        grad = rng.standard_normal(50).astype(np.float32)
        c = observer.compute_coefficients(step, Hyperparameters())
        states = [update(grad * np.float32(each), state, c) for each, state in zip((1, 2.0**-20), states, strict=True)]
    np.testing.assert_array_equal(states[0].gain, states[1].gain)
    np.testing.assert_array_equal(states[0].mean * np.float32(2.0**-20), states[1].mean)


def test_chosen_elements_are_distinct_spread_and_of_the_seed() -> None:
    chosen = observer.choose_elements(1003, 100, seed=0, index=2)
    assert len(chosen) == 100
    assert (np.diff(chosen) > 0).all()
    assert (np.abs(np.histogram(chosen, 10, (0, 1003))[0] - 10) <= 1).all()
    assert not np.array_equal(chosen, observer.choose_elements(1003, 100, seed=1, index=2))
    assert not np.array_equal(chosen, observer.choose_elements(1003, 100, seed=0, index=3))
    assert observer.choose_elements(100, 100, seed=0, index=0) is None
    assert observer.choose_elements(10**10, 4, seed=0, index=0).dtype == np.int64
