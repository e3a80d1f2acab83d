"""Test that the NumPy optimizer updates in place, and either completely or not at all."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from vsgd.numpy import VSGD

rng = np.random.default_rng(0)


@pytest.mark.parametrize("dtype", [float, complex])
def test_views_are_stepped_in_place(dtype: type) -> None:
    whole = np.ones((4, 6), dtype)
    part = whole[::2, 1::2]
    alone = np.ones((2, 3), dtype)
    one, other = VSGD([part]), VSGD([alone])
    grad = rng.standard_normal((2, 3, 2)).view(dtype)[..., 0]
    one.step([grad])
    other.step([grad])
    np.testing.assert_array_equal(whole[::2, 1::2], alone)
    assert (whole[1::2] == 1).all()
    assert (whole[:, ::2] == 1).all()


def test_a_subclass_of_arrays_is_stepped_as_the_array_that_it_is() -> None:
    class Odd(np.ndarray):
        def __mul__(self, other: object) -> Any:
            raise AssertionError("an operator of the subclass was used")

    odd, plain = np.ones((2, 2)).view(Odd), np.ones((2, 2))
    one, other = VSGD([odd], weight_decay=0.1), VSGD([plain], weight_decay=0.1)
    for _ in range(3):
        grad = rng.standard_normal((2, 2))
        one.step([grad])
        other.step([grad])
    np.testing.assert_array_equal(odd.view(np.ndarray), plain)


def test_lr_and_decay_are_attributes() -> None:
    param = np.ones(2)
    optimizer = VSGD([param])
    optimizer.lr, optimizer.weight_decay = 0.5, 0.1
    optimizer.step([np.zeros(2)])  # the direction is 0, so only the decay acts
    np.testing.assert_array_equal(param, 1 - 0.5 * 0.1)


@pytest.mark.parametrize(
    ("grads", "message"),
    [
        ([np.ones(3)], "grads has 1 items, but there are 2 params"),
        ([np.ones(3), np.ones(3)], r"grads\[1\] has shape \(3,\), but params\[1\] has \(2,\)"),
        ([np.ones(3), np.ones(2) * 1j], r"grads\[1\] is of complex128, but must be of numbers that fit params\[1\] of float64"),
        ([np.ones(3), np.array(["a", "b"])], r"grads\[1\] is of <U1, but must be of numbers"),
    ],
)
def test_gradients_that_do_not_fit_change_nothing(grads: list[Any], message: str) -> None:
    params = [np.ones(3), np.ones(2)]
    optimizer = VSGD(params)
    with pytest.raises(ValueError, match=message):
        optimizer.step(grads)
    assert (params[0] == 1).all()
    assert optimizer.state[0]["step"] == 0


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (5, "params is int, but must be a list of arrays"),
        ([np.ones(2, np.int64)], r"params\[0\] is ndarray of int64, but must be a NumPy array of floating or complex numbers"),
        ([np.ma.ones(2)], r"params\[0\] is MaskedArray of float64, but must be a NumPy array .*, unmasked"),
        ([[1.0]], r"params\[0\] is list, but must be"),
        ([np.broadcast_to(1.0, 3)], r"params\[0\] is read-only"),
    ],
)
def test_bad_parameters_are_named(params: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VSGD(params)


@pytest.mark.parametrize(("name", "value"), [("lr", -1.0), ("lr", "x"), ("weight_decay", -0.1)])
def test_an_attribute_out_of_range_changes_nothing(name: str, value: Any) -> None:
    param = np.ones(2)
    optimizer = VSGD([param])
    setattr(optimizer, name, value)
    with pytest.raises(ValueError, match=rf"\({name} must be a finite number >= 0\)"):
        optimizer.step([np.ones(2)])
    assert param.tolist() == [1.0, 1.0]
    assert optimizer.state[0]["step"] == 0
