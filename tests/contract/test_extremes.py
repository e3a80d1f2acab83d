"""Test gradients at the limits of float32: the state stays finite and positive, and non-finite values show where they occur."""

from __future__ import annotations

import numpy as np
import pytest
from drivers import DRIVERS, make_driver, run, start

KINDS = {"VSGD": ("b_g", "b_ghat"), "ConstantVSGD": ("b",)}
STEPS = 50
noise = np.random.default_rng(0).standard_normal((STEPS, 9))
single = noise.copy()
single[:, 4] = 1e15

GRADIENTS = {
    "zeros": np.zeros((STEPS, 9)),
    "constant": np.ones((STEPS, 9)),
    "1e-25": noise * 1e-25,
    "1e10": noise * 1e10,
    "1e18": np.clip(noise, -3, 3) * 1e18,
    "a single element of 1e15": single,
    "1e15 once": np.where(np.arange(STEPS)[:, None] == 20, 1e15, noise),
}


def assert_sound(read: list[dict[str, np.ndarray]], kind: str) -> None:
    for name, values in read[0].items():
        assert np.isfinite(values).all(), name
    for rate in KINDS[kind]:
        assert (read[0][rate] > 0).all(), rate


@pytest.mark.parametrize("gradients", GRADIENTS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("engine", DRIVERS)
def test_state_stays_finite_and_positive_in_float32(engine: str, kind: str, gradients: str) -> None:
    step, read = start(engine, kind, [np.ones(9, np.float32)])
    for grad in GRADIENTS[gradients].astype(np.float32):
        step([grad])
        assert_sound(read(), kind)


@pytest.mark.parametrize("engine", DRIVERS)
def test_a_slow_ramp_keeps_the_rates_positive(engine: str) -> None:
    # It grows by 4e-4 a step, from 1 to 403: in float32 the authors' expanded square makes b_ghat negative at step 10,595.
    options = {"variance_ratio": 1.0, "kappa1": 0.6, "kappa2": 0.7}
    driver = make_driver(engine, "VSGD", [np.ones(4, np.float32)], promise="many steps", **options)
    for t in range(15_000):
        driver.step([np.full(4, np.exp(4e-4 * t), np.float32)])
        if t % 1_000 == 999:
            assert_sound(driver.read(), "VSGD")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("engine", DRIVERS)
def test_what_is_not_finite_shows_in_its_own_element_only(engine: str, kind: str, bad: float) -> None:
    params, rng = [np.ones(40, np.float32), np.ones(3, np.float32)], np.random.default_rng(1)
    grads = [[rng.standard_normal(param.size).astype(np.float32) for param in params] for _ in range(3)]
    clean, clean_spared = run(engine, kind, params, grads)
    grads[1][0][17] = bad
    with np.errstate(invalid="ignore"):
        hit, spared = run(engine, kind, params, grads)
    assert not np.isfinite(hit["param"][17])
    np.testing.assert_array_equal(np.delete(hit["param"], 17), np.delete(clean["param"], 17))
    np.testing.assert_array_equal(spared["param"], clean_spared["param"])
