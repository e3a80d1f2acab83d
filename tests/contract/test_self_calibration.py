"""Test `prior_strength="auto"`, where a run's first gradient is its unit, in every adapter and engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from drivers import DRIVERS, assert_equal, make_driver
from drivers.rules import RULES

drivers = pytest.mark.parametrize("driver", DRIVERS)
kinds = pytest.mark.parametrize("kind", RULES)

SHAPES = ((4, 3), (), (7,))
STEPS = 6
OPTIONS: dict[str, Any] = {"lr": 0.03, "weight_decay": 0.1, "eps": 1e-3}


def draw(seed: int, dtype: Any = np.float32) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    is_complex = np.issubdtype(dtype, np.complexfloating)
    return [np.asarray(rng.standard_normal(s) + (1j * rng.standard_normal(s) if is_complex else 0), dtype) for s in SHAPES]


def compute_unit(grads: list[np.ndarray]) -> float:
    """Return the root mean square of all elements, in float64; a complex number counts as two."""
    flat = np.concatenate([grad.ravel() for grad in grads])
    parts = np.concatenate([flat.real, flat.imag] if np.iscomplexobj(flat) else [flat]).astype(np.float64)
    return float(np.sqrt(np.mean(parts**2)))


def start(driver: str, kind: str, dtype: Any = np.float32, **options: Any) -> Any:
    promise = np.dtype(dtype).name if np.issubdtype(dtype, np.complexfloating) else None
    return make_driver(driver, kind, draw(0, dtype), promise=promise, **{**OPTIONS, "prior_strength": "auto", **options})


@kinds
@drivers
@pytest.mark.parametrize("dtype", ["float32", "complex64"])
def test_it_is_the_run_on_gradients_in_units_of_the_first(driver: str, kind: str, dtype: str) -> None:
    made = start(driver, kind, dtype, outlier_threshold=4.0)
    plain = {**OPTIONS, "prior_strength": 5e-5 * 10, "prior_shape": 0.0, "outlier_threshold": 4.0}
    wide = "complex128" if dtype == "complex64" else "float64"
    reference = make_driver("numpy", kind, [param.astype(wide) for param in draw(0, dtype)], **plain)
    size = 2e-3
    grads = [[np.asarray(size * grad, dtype) for grad in draw(1 + step, dtype)] for step in range(STEPS)]
    if "counts of their own" not in DRIVERS[driver].lacks:
        grads[0][1] = None  # a parameter that joins later gets the others' unit
    unit = compute_unit([grad for grad in grads[0] if grad is not None])
    for each in grads:
        made.step(each)
        reference.step([None if grad is None else grad.astype(wide) / unit for grad in each])
    assert_equal(made.read(), reference.read(), rtol=1e-5)
    # Reported values are in units of the gradients.
    for ours, theirs in zip(made.posterior(), reference.posterior(), strict=True):
        np.testing.assert_allclose(ours.mean, theirs.mean * unit, rtol=1e-4, atol=1e-6 * size)
        for name in ("noise_variance", "drift_variance", "variance"):
            np.testing.assert_allclose(getattr(ours, name), getattr(theirs, name) * unit**2, rtol=1e-4)
    if "noise scale" not in DRIVERS[driver].lacks and dtype == "float32":
        ours, theirs = made.noise_scale(8), reference.noise_scale(8)
        assert ours.trace == pytest.approx(theirs.trace * unit**2, rel=1e-4)
        nexts = [np.asarray(size * grad, dtype) for grad in draw(99, dtype)]
        expected = reference.surprise([grad.astype(wide) / unit for grad in nexts])
        assert made.surprise(nexts) == pytest.approx(expected, rel=1e-4)


@kinds
@drivers
def test_the_losss_scale_changes_nothing(driver: str, kind: str) -> None:
    runs = {}
    for factor in (1.0, 2.0**-40, 2.0**17, 1e-3, 1e3):
        runs[factor] = start(driver, kind)
        for step in range(STEPS):
            runs[factor].step([np.float32(factor) * grad for grad in draw(1 + step)])
    plain = runs.pop(1.0).read()
    for factor, made in runs.items():
        # Factors that are not powers of two round each gradient once more.
        assert_equal(made.read(), plain, rtol=0.0 if np.frexp(factor)[0] == 0.5 else 2e-5)


@kinds
@drivers
@pytest.mark.parametrize("first", [0.0, np.nan, np.inf])
def test_a_first_gradient_without_a_size_changes_nothing(driver: str, kind: str, first: float) -> None:
    made, other = start(driver, kind), start(driver, kind)
    spoilt = [np.zeros_like(grad) for grad in draw(1)]
    spoilt[2][3] = first
    for _ in range(2):
        made.step(spoilt)
    for step in range(STEPS):
        for each in (made, other):
            each.step(draw(1 + step))
    assert_equal(made.read(), other.read())


@kinds
@drivers
def test_the_unit_is_saved(driver: str, kind: str, tmp_path: Path) -> None:
    one, other = start(driver, kind), start(driver, kind)
    one.step(draw(1))
    one.save(tmp_path / "saved")
    other.load(tmp_path / "saved")
    for step in range(STEPS):
        for each in (one, other):
            each.step([100 * grad for grad in draw(2 + step)])
    assert_equal(other.read(), one.read())


@kinds
@pytest.mark.parametrize("driver", ["optax-jit", "keras", "mlx"])
def test_a_state_without_a_unit_is_refused_and_one_with_a_unit_too(driver: str, kind: str, tmp_path: Path) -> None:
    for saved, prior_strength in (("auto", 1e-8), (1e-8, "auto")):
        one, other = start(driver, kind, prior_strength=saved), start(driver, kind, prior_strength=prior_strength)
        one.step(draw(1))
        one.save(tmp_path / str(saved))
        if driver == "keras":  # Keras skips a file with another number of arrays
            with pytest.warns(UserWarning, match="Skipping variable loading for optimizer"):
                other.load(tmp_path / str(saved))
            continue
        other.load(tmp_path / str(saved))
        with pytest.raises(ValueError, match="prior_strength"):
            other.step(draw(2))


@kinds
def test_torch_loads_the_prior_with_the_state(kind: str, tmp_path: Path) -> None:
    auto, plain = start("torch-loop", kind), start("torch-loop", kind, prior_strength=1e-8)
    for one, other in ((auto, plain), (plain, start("torch-loop", kind))):
        one.step(draw(1))
        one.save(tmp_path / "saved")
        other.load(tmp_path / "saved")
        one.step(draw(2))
        other.step(draw(2))
        assert_equal(other.read(), one.read())
