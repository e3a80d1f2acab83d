"""Test runs with a prior in the gradients' own units: with a separate shape they ignore the loss's scale, and none diverges."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from drivers import AVAILABLE, DRIVERS, HAS_TORCH, make_driver, run, start
from drivers.rules import RULES
from drivers.trajectories import deviation, stack

import vsgd.numpy

kinds = pytest.mark.parametrize("kind", RULES)
rates = pytest.mark.parametrize("lr", [0.1, 0.3])


def draw(size: float, batches: int = 12) -> list[list[np.ndarray]]:
    """Return gradients of some mini-batches of different sizes, for parameters of different shapes."""
    rng = np.random.default_rng(0)
    sizes = np.geomspace(size, size / 10, batches)
    return [[size * rng.standard_normal((5, 3)), size * rng.standard_normal(40)] for size in sizes]


@kinds
def test_the_first_variance_is_scale_times_the_mean_square(kind: str) -> None:
    gradients = draw(1e6)
    strength = vsgd.numpy.prior_strength_from(gradients, scale=7.0)
    optimizer = getattr(vsgd.numpy, kind)([np.zeros(2)], prior_strength=strength, prior_shape=0.0)
    mean_square = np.mean(np.concatenate([grad.ravel() for grads in gradients for grad in grads]) ** 2)
    ratio = optimizer.hyper.variance_ratio
    np.testing.assert_allclose(optimizer.posterior(0).variance, ratio / (ratio + 1) * 7.0 * mean_square, rtol=1e-12)


def trajectory(engine: str, kind: str, dtype: Any, s: float, **options: Any) -> list[dict[str, np.ndarray]]:
    """Return parameters and states over the steps, for gradients times s, a prior that fits the gradients, and a shape of 0."""
    # Round before and after scaling, so that powers of two change no bit of the gradients.
    grads = [[(s * grad.astype(dtype).astype(np.float64)).astype(dtype) for grad in batch] for batch in draw(1e-3)]
    hyper = {"lr": 0.1, "prior_shape": 0.0, "prior_strength": vsgd.numpy.prior_strength_from(grads[:10]), **options}
    step, read = start(engine, kind, [np.ones_like(grad) for grad in grads[0]], **hyper)
    looks = []
    for batch in grads:
        step(batch)
        looks.append(read())
    return stack(looks)


def in_units(run: list[dict[str, np.ndarray]], s: float) -> list[dict[str, np.ndarray]]:
    units = {"mu_g": s, "b_g": s * s, "b_ghat": s * s, "b": s * s}
    return [{name: values / units.get(name, 1) for name, values in each.items()} for each in run]


@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["float32", "float64"])
@kinds
@pytest.mark.parametrize("engine", DRIVERS)
def test_a_loss_times_a_power_of_two_changes_no_bit(engine: str, kind: str, dtype: Any) -> None:
    # eps must be scaled like the gradients, or be 0.
    for power, eps in ((13, 1e-5), (-13, 0.0)):
        s = 2.0**power
        plain, scaled = trajectory(engine, kind, dtype, 1.0, eps=eps), trajectory(engine, kind, dtype, s, eps=s * eps)
        for one, other in zip(plain, in_units(scaled, s), strict=True):
            assert np.isfinite(one["param"]).all()
            for name, values in one.items():
                np.testing.assert_array_equal(values, other[name])


@kinds
@pytest.mark.parametrize("engine", [name for name in AVAILABLE if name != "optax-eager"])  # the same function as optax-jit
def test_with_eps_0_gradients_of_zero_move_nothing(engine: str, kind: str) -> None:
    # With the weakest prior, only the prior's part of each rate keeps the variance above 0.
    options = {"prior_strength": 1e-30, "prior_shape": 0.0, "eps": 0.0}
    (ended,) = run(engine, kind, [np.ones(3, np.float32)], [[np.zeros(3, np.float32)]] * 500, **options)
    np.testing.assert_array_equal(ended["param"], 1)
    assert (ended["b" if kind == "ConstantVSGD" else "b_g"] > 0).all()


@kinds
@pytest.mark.parametrize(
    ("s", "options", "least", "most"),
    [
        # The bound is ten times the roundings of 12 steps.
        (1e-4, {"eps": 0.0}, 0.0, 7e-15),
        (1e4, {"eps": 0.0}, 0.0, 7e-15),
        (2.0**-13, {"eps": 1e-5}, 0.1, math.inf),
        # gamma is 5e-10 * 4 in the plain run, where its shape is lost next to 1e-4; with the larger gradients it is 0.1.
        (2.0**-13, {"eps": 0.0, "prior_shape": None}, 0.0, 1e-4),
        (2.0**13, {"eps": 0.0, "prior_shape": None}, 1e-4, math.inf),
    ],
)
def test_the_scale_shows_in_last_bits_or_where_eps_is_as_it_was_or_the_shape_the_papers(
    kind: str, s: float, options: dict[str, Any], least: float, most: float
) -> None:
    plain, scaled = (trajectory("numpy", kind, np.float64, scale, **options) for scale in (1.0, s))
    assert least <= deviation(in_units(scaled, s), plain).error < most


# --- Least squares, whose gradients are far larger than the default prior expects. ---

SAMPLES, FEATURES, BATCH, STEPS = 256, 20, 32, 1000


def least_squares(lr: float, seed: int, s: float = 1.0, kind: str = "VSGD", **hyper: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return the losses after each step, and the final weights.

    The learning rate is constant. The losses are unscaled and relative to the loss at the start. Without a prior strength, the
    run uses the one that fits the gradients.
    """
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((SAMPLES, FEATURES))
    y = x @ rng.standard_normal(FEATURES) + 0.5 * rng.standard_normal(SAMPLES)
    weights = np.zeros(FEATURES)

    def gradient() -> np.ndarray:
        batch = rng.integers(SAMPLES, size=BATCH)
        return s * (2 / BATCH) * x[batch].T @ (x[batch] @ weights - y[batch])

    fitting = vsgd.numpy.prior_strength_from([gradient()] for _ in range(10))
    optimizer = getattr(vsgd.numpy, kind)([weights], lr=lr, **{"prior_strength": fitting, **hyper})
    losses = np.empty(STEPS)
    for t in range(STEPS):
        optimizer.step([gradient()])
        losses[t] = np.mean((x @ weights - y) ** 2)
    return losses / np.mean(y**2), weights


@pytest.mark.parametrize("seed", range(4))
@rates
def test_least_squares_at_a_constant_rate_run_away_with_the_default_prior_only(lr: float, seed: int) -> None:
    default, _ = least_squares(lr, seed, prior_strength=1e-8)
    assert default.max() > 1.5
    for prior_shape in (None, 0.0):
        losses, _ = least_squares(lr, seed, prior_shape=prior_shape)
        assert losses.max() <= 1
        assert losses[-100:].mean() < 0.1
        assert default[-100:].mean() > 10 * losses[-100:].mean()


# --- prior_shape. ---


@kinds
def test_a_shape_that_is_the_strength_is_the_papers(kind: str) -> None:
    paper = trajectory("numpy", kind, np.float64, 1.0, prior_strength=0.1, prior_shape=None)
    assert deviation(trajectory("numpy", kind, np.float64, 1.0, prior_strength=0.1, prior_shape=0.1), paper).error == 0
    assert deviation(trajectory("numpy", kind, np.float64, 1.0, prior_strength=0.1, prior_shape=0.0), paper).error > 0.01


@kinds
@pytest.mark.parametrize("engine", AVAILABLE)
def test_every_engine_takes_a_shape_and_a_floor(engine: str, kind: str) -> None:
    # The floor applies from the fifth or sixth of twelve steps on.
    options = {"prior_shape": 0.3, "forgetting_floor": 0.25}
    reference = trajectory("numpy", kind, np.float64, 1.0, **options)
    found = trajectory(engine, kind, np.float64, 1.0, **options)
    assert deviation([{name: each[name] for name in reference[0]} for each in found], reference).error < 1e-12


@kinds
@pytest.mark.skipif(not HAS_TORCH, reason="torch is not installed")
@pytest.mark.parametrize(("name", "value", "before"), [("prior_shape", 0.0, None), ("forgetting_floor", 0.01, 0.0)])
def test_torch_checkpoints_hold_what_is_newer_and_older_ones_have_the_papers(
    name: str, value: float, before: float | None, kind: str
) -> None:
    def make(**options: Any) -> Any:
        driver = make_driver("torch-loop", kind, [np.ones(3)], **options)
        driver.step([np.ones(3)])
        return driver.optimizer

    older = make(**{name: value}).state_dict()
    loaded = make()
    loaded.load_state_dict(older)
    assert loaded.param_groups[0][name] == value
    del older["param_groups"][0][name]
    loaded.load_state_dict(older)
    assert loaded.param_groups[0][name] == before
    # Check also an optimizer that was pickled before the option existed.
    pickled = make().__getstate__()
    for holder in (pickled["defaults"], pickled["param_groups"][0]):
        del holder[name]
    loaded.__setstate__(pickled)
    loaded.step()
    assert loaded.param_groups[0][name] == before


# --- forgetting_floor. ---


@kinds
@pytest.mark.parametrize("floor", [0.0, 0.01, 0.3])
def test_the_rates_forget_by_the_power_of_the_step_or_by_the_floor(kind: str, floor: float) -> None:
    rule = RULES[kind]
    hyper = rule.hyperparameters(forgetting_floor=floor)
    kappa = hyper.kappa if kind == "ConstantVSGD" else hyper.kappa2
    for step in (1, 2, 10, 1000, 10**6):
        rho = max(step**-kappa, floor)
        coefficients = rule.coefficients(step, hyper)._asdict()
        keep, half_rho = (coefficients[f"{name}_ghat" if kind == "VSGD" else name] for name in ("keep", "half_rho"))
        assert keep == pytest.approx(1 - rho, rel=1e-15, abs=1e-15)
        assert half_rho == pytest.approx(rho / 2, rel=1e-15)


def test_with_a_floor_the_noise_estimate_follows_noise_that_falls() -> None:
    rng = np.random.default_rng(0)
    observers = {
        floor: vsgd.numpy.ConstantVSGD([np.zeros(2000)], lr=0.0, prior_strength=1e-6, forgetting_floor=floor)
        for floor in (0.0, 0.01)
    }
    for step in range(4000):
        grad = rng.standard_normal(2000) * (1.0 if step < 2000 else 0.1)
        for observer in observers.values():
            observer.step([grad])
    noise = {floor: observer.posterior(0).noise_variance.mean() / 0.1**2 for floor, observer in observers.items()}
    # The expected value for a constant gradient and a gain w: docs/uncertainty.md.
    w = 1 / 4
    assert noise[0.01] == pytest.approx(2 * (1 - w) / (2 - w), rel=0.02)
    assert noise[0.0] > 20
