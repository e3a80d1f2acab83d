"""Test parameters of all dtypes, and parameters that only sometimes have a gradient."""

from __future__ import annotations

import inspect
from importlib import import_module

import numpy as np
import pytest
from drivers import ADAPTERS, DRIVERS, assert_equal, make_driver, run
from drivers.emulation import round_to_nearest
from drivers.rules import RULES

import vsgd.numpy

drivers = pytest.mark.parametrize("driver", DRIVERS)
kinds = pytest.mark.parametrize("kind", RULES)


@kinds
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_the_defaults_are_the_rules(adapter: str, kind: str) -> None:
    of_optax = {"VSGD": ("vsgd", "scale_by_vsgd"), "ConstantVSGD": ("constant_vsgd", "scale_by_constant_vsgd")}
    for name in of_optax[kind] if adapter == "optax" else [kind]:
        parameters = inspect.signature(getattr(import_module(f"vsgd.{adapter}"), name)).parameters
        given = {name.replace("epsilon", "eps"): parameter.default for name, parameter in parameters.items()}
        expected = RULES[kind].hyperparameters()._asdict()
        assert {name: given[name] for name in expected} == expected


@pytest.mark.parametrize("dtype", ["complex64", "complex128"])
@kinds
@drivers
def test_a_complex_parameter_is_two_real_ones(driver: str, kind: str, dtype: str) -> None:
    rng = np.random.default_rng(0)
    real = {"complex64": np.float32, "complex128": np.float64}[dtype]
    param, *grads = rng.standard_normal((6, 2, 7, 3)).astype(real)
    decay = {"weight_decay": 0.125}
    (ours,) = run(driver, kind, [param[0] + 1j * param[1]], [[re + 1j * im] for re, im in grads], promise="complex64", **decay)
    re, im = run(driver, kind, list(param), list(map(list, grads)), **decay)
    for name, value in ours.items():
        assert value.dtype == dtype
        # XLA may contract a product and a sum in one of the runs and not in the other.
        rtol = 0 if driver.startswith(("numpy", "torch")) else 4 * np.finfo(real).eps
        np.testing.assert_allclose(value.real, re[name], rtol=rtol, err_msg=name)
        np.testing.assert_allclose(value.imag, im[name], rtol=rtol, err_msg=name)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@kinds
@drivers
def test_half_precision_is_float32_rounded_after_each_step(driver: str, kind: str, dtype: str) -> None:
    def to_half(array: np.ndarray) -> np.ndarray:
        return round_to_nearest(array) if dtype == "bfloat16" else array.astype(np.float16).astype(np.float32)

    half = make_driver(driver, kind, [np.ones(9, np.float32)], dtype, promise=f"{dtype} parameters", lr=0.125)
    reference = [np.ones(9, np.float32)]
    optimizer = getattr(vsgd.numpy, kind)(reference, lr=0.125)
    rng = np.random.default_rng(0)
    for _ in range(20):
        # Small gradients, so that the rates are too small for float16.
        grad = to_half(1e-4 * rng.standard_normal(9).astype(np.float32))
        half.step([grad])
        optimizer.step([grad])
        reference[0][...] = to_half(reference[0])
        (ours,) = half.read()
        np.testing.assert_array_equal(ours.pop("param").astype(np.float32), reference[0])
    for name, value in ours.items():
        assert value.dtype == np.float32
        np.testing.assert_allclose(value, optimizer.state[0][name], rtol=1e-5, err_msg=name)


@kinds
@drivers
def test_a_parameter_without_gradient_is_left_alone_and_starts_as_new(driver: str, kind: str) -> None:
    rng = np.random.default_rng(0)
    params = [rng.standard_normal(3).astype(np.float32), rng.standard_normal((2, 5)).astype(np.float32)]
    draws = [[rng.standard_normal(param.shape).astype(np.float32) for param in params] for _ in range(8)]
    grads = [[first, late if t >= 5 else None] for t, (first, late) in enumerate(draws)]
    (_, ours) = run(driver, kind, params, grads, promise="counts of their own", weight_decay=0.125)
    assert_equal([ours], run(driver, kind, params[1:], [[late] for _, late in draws[5:]], weight_decay=0.125))
