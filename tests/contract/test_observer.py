"""Test the gradient observer in every adapter that has one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from drivers.observers import OBSERVERS, open_door

from vsgd import observer
from vsgd.observer import Hyperparameters, State
from vsgd.posterior import Posterior

doors = pytest.mark.parametrize("door", OBSERVERS)

SHAPES = ((6, 5), (), (4,))
OPTIONS: dict[str, Any] = {"gain_rate": 0.05, "forgetting_floor": 0.1}


def draw(seed: int, dtype: str = "float32") -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    imaginary = 1j if dtype.startswith("complex") else 0
    return [np.asarray(rng.standard_normal(s) + imaginary * rng.standard_normal(s), dtype) for s in SHAPES]


def list_numbers(array: np.ndarray) -> np.ndarray:
    """Return an array's real numbers; for a complex array, real and imaginary parts along a last axis."""
    return np.stack([array.real, array.imag], -1) if np.iscomplexobj(array) else array


def filter_by_numpy(runs: list[list[np.ndarray | None]], counts_apart: bool) -> list[Posterior]:
    """Return the posterior of each parameter's gradients, computed by the core on NumPy in float64."""
    update = observer.make_update(np)
    posteriors = []
    for grads in zip(*runs, strict=True):
        shape = list_numbers(next(grad for grad in grads if grad is not None)).shape
        state, seen = State(*(np.full(shape, value) for value in observer.INITIAL_STATE)), 0
        for step, grad in enumerate(grads):
            if grad is not None:
                count = seen if counts_apart else step
                c = observer.compute_coefficients(count + 1, Hyperparameters(**OPTIONS))
                state, seen = update(list_numbers(grad).astype(np.float64), state, c), seen + 1
        posteriors.append(observer.compute_posterior(state))
    return posteriors


def assert_close(ours: list[Posterior], theirs: list[Posterior], rtol: float) -> None:
    for one, other in zip(ours, theirs, strict=True):
        for name, field in one._asdict().items():
            np.testing.assert_allclose(field, getattr(other, name), rtol=rtol, atol=rtol, err_msg=name)


@doors
@pytest.mark.parametrize("dtype", ["float32", "float64", "complex64"])
@pytest.mark.filterwarnings("ignore:Gradients do not exist")
def test_it_filters_as_numpy_does_and_changes_no_step(door: str, dtype: str) -> None:
    made = open_door(door, draw(0, dtype), **OPTIONS)
    runs: list[list[np.ndarray | None]] = [list(draw(seed, dtype)) for seed in range(1, 31)]
    runs[0][2] = runs[4][0] = None  # no gradient
    params = draw(0, dtype)
    for grads in runs:
        params = [param if grad is None else param - 0.5 * grad for param, grad in zip(params, grads, strict=True)]
        made.step(grads)
    rtol = 1e-10 if dtype == "float64" else 1e-4
    assert_close(made.posterior(), filter_by_numpy(runs, counts_apart=door == "TorchDoor"), rtol)
    for ours, theirs in zip(made.read(), params, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    assert made.elements() == [None, None, None]


@doors
def test_it_watches_a_fixed_choice_of_the_elements_of_a_large_tensor(door: str) -> None:
    runs = [draw(seed) for seed in range(1, 11)]
    whole, part = open_door(door, draw(0), **OPTIONS), open_door(door, draw(0), **OPTIONS, max_elements=7, seed=3)
    for grads in runs:
        whole.step(grads)
        part.step(grads)
    chosen, *rest = part.elements()
    assert rest == [None, None]
    np.testing.assert_array_equal(chosen, observer.choose_elements(30, 7, seed=3, index=0))
    expected = whole.posterior()
    expected[0] = Posterior(*(field.ravel()[chosen] for field in expected[0]))
    assert_close(part.posterior(), expected, 1e-6)


@doors
def test_surprise_is_squared_innovations_over_their_variances(door: str) -> None:
    made = open_door(door, draw(0), **OPTIONS, max_elements=7)
    for seed in range(1, 11):
        grads = draw(seed)
        grads[2][:2] = 0.0  # elements that never had a gradient have no surprise
        made.step(grads)
    before, grads = made.posterior(), [np.asarray(3 * grad, grad.dtype) for grad in draw(11)]  # NumPy 1 widens a scalar
    grads[2][0] = 0.0
    chosen = [slice(None) if each is None else each for each in made.elements()]
    flat = [grad.ravel()[each] for grad, each in zip(grads, chosen, strict=True)]
    expected = [
        np.sum((grad - p.mean.ravel()) ** 2) / np.sum(p.noise_variance.ravel() / (1 - p.gain.ravel()))
        for grad, p in zip(flat, before, strict=True)
    ]
    np.testing.assert_allclose(made.surprise(grads), expected, rtol=1e-4)


@doors
def test_gradients_that_are_not_finite_change_nothing(door: str) -> None:
    made, plain = (open_door(door, draw(0), **OPTIONS) for _ in range(2))
    for seed in range(1, 21):
        made.step(draw(seed))
        plain.step(draw(seed))
    mean = [p.mean for p in made.posterior()]
    bad = [np.full(shape, value, np.float32) for shape, value in zip(SHAPES, (np.nan, np.inf, 1e20), strict=True)]
    made.step(bad)
    for ours, old in zip(made.posterior(), mean, strict=True):
        np.testing.assert_array_equal(ours.mean, old)
        assert all(np.isfinite(field).all() for field in ours)


@doors
def test_a_saved_run_goes_on_bit_for_bit(door: str, tmp_path: Path) -> None:
    whole, later = (open_door(door, draw(seed), **OPTIONS, max_elements=7) for seed in (0, 5))
    for seed in range(1, 5):
        whole.step(draw(seed))
    whole.save(tmp_path / "saved")
    later.load(tmp_path / "saved")
    for seed in range(5, 9):
        whole.step(draw(seed))
        later.step(draw(seed))
    assert_close(later.posterior(), whole.posterior(), 0.0)


@doors
@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"max_elements": 0}, r"max_elements value: 0 \(max_elements must be None or an integer >= 1\)"),
        ({"max_elements": 2.5}, "max_elements value: 2.5"),
        ({"gain_rate": 0.0}, r"gain_rate value: 0.0 \(gain_rate must be a number in \(0, 1\)\)"),
        ({"forgetting_floor": 1.0}, "forgetting_floor value: 1.0"),
        ({"seed": 0.5}, "seed value: 0.5"),
    ],
)
def test_options_out_of_range_are_refused(door: str, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        open_door(door, draw(0), **options)
