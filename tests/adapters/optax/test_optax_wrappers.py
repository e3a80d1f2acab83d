"""The optax transformations on trees, in optax's wrappers, and with hyperparameters that are arrays."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from drivers.precision import x64

jax = pytest.importorskip("jax")
optax = pytest.importorskip("optax")

import jax.numpy as jnp  # noqa: E402
from adapters.optax.optax_problems import assert_same, directions, gradients, reseed, solvers, train  # noqa: E402

from vsgd import core  # noqa: E402
from vsgd.optax import constant_vsgd, scale_by_constant_vsgd, scale_by_vsgd, vsgd  # noqa: E402
from vsgd.optax.state import get_arrays  # noqa: E402

seed = pytest.fixture(autouse=True)(reseed)


@solvers
def test_none_in_the_parameters_stays_none(make: Callable[..., Any]) -> None:
    grads = gradients(3, 4)
    params, state = train(make(0.1), {"a": jnp.ones(4), "b": None}, [{"a": grad, "b": None} for grad in grads])
    assert params["b"] is None
    assert state[0].mu_g["b"] is None
    assert_same(params["a"], train(make(0.1), jnp.ones(4), grads)[0])


@solvers
def test_a_gradient_of_none_leaves_its_state_alone(make: Callable[..., Any]) -> None:
    solver = make(0.1, weight_decay=0.1)
    params = {"a": jnp.ones(4), "b": jnp.ones(2)}
    _, before = train(solver, params, [{"a": jnp.ones(4), "b": jnp.ones(2)}])
    updates, after = solver.update({"a": jnp.ones(4), "b": None}, before, params)
    assert updates["b"] is None
    assert updates["a"] is not None
    for tree, old_tree in zip(get_arrays(after[0]), get_arrays(before[0]), strict=True):
        assert tree["b"] is old_tree["b"]
        assert (tree["a"] != old_tree["a"]).all()


def test_an_empty_tree_is_no_error() -> None:
    params, state = train(vsgd(0.1), {}, [{}, {}])
    assert params == {}
    assert state[0].count == 2


@solvers
def test_what_is_masked_out_passes_through(make: Callable[..., Any]) -> None:
    grads = gradients(3, 4)
    solver = optax.masked(make(0.1), {"a": True, "b": False})
    params = {"a": jnp.ones(4), "b": jnp.zeros(4)}
    results, state = params, solver.init(params)
    for grad in grads:
        updates, state = solver.update({"a": grad, "b": grad}, state, params)
        results = optax.apply_updates(results, updates)
        assert_same(updates["b"], grad)
    assert_same(results["a"], train(make(0.1), jnp.ones(4), grads)[0])


def test_multi_transform_runs_each_on_its_own() -> None:
    grads = [{"a": a, "b": b} for a, b in zip(gradients(4, 3), gradients(4, 2), strict=True)]
    solver = optax.multi_transform({"one": vsgd(0.1), "other": constant_vsgd(0.2)}, {"a": "one", "b": "other"})
    params, _ = train(solver, {"a": jnp.ones(3), "b": jnp.ones(2)}, grads)
    assert_same(params["a"], train(vsgd(0.1), jnp.ones(3), [grad["a"] for grad in grads])[0])
    assert_same(params["b"], train(constant_vsgd(0.2), jnp.ones(2), [grad["b"] for grad in grads])[0])


@solvers
def test_multi_steps_equal_the_mean_gradient(make: Callable[..., Any]) -> None:
    with x64():
        grads = gradients(12, 3, dtype=jnp.float64)
        # Where it can be chosen, it is float32 by default; in older ones it is the parameters'.
        newer = "accumulator_dtype" in inspect.signature(optax.MultiSteps).parameters
        solver = optax.MultiSteps(make(0.1), every_k_schedule=4, **({"accumulator_dtype": jnp.float64} if newer else {}))
        params, state = train(solver, jnp.ones(3, jnp.float64), grads)
        means = [jnp.mean(jnp.stack(grads[i : i + 4]), axis=0) for i in (0, 4, 8)]
        expected, expected_state = train(make(0.1), jnp.ones(3, jnp.float64), means)
        assert_same((params, state.inner_opt_state), (expected, expected_state), rtol=1e-12)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@solvers
def test_apply_if_finite_leaves_a_bad_step_out(make: Callable[..., Any], bad: float) -> None:
    grads = gradients(5, 3)
    broken = [*grads[:2], grads[2].at[1].set(bad), *grads[2:]]
    solver = optax.apply_if_finite(make(0.1), max_consecutive_errors=3)
    params, state = train(solver, jnp.ones(3), broken)
    assert state.total_notfinite == 1
    expected, expected_state = train(solver, jnp.ones(3), grads)
    assert_same((params, state.inner_state), (expected, expected_state.inner_state))
    # It compiles the step, which contracts products and sums.
    assert_same((params, state.inner_state), train(make(0.1), jnp.ones(3), grads), rtol=1e-6)


def test_extra_arguments_are_ignored() -> None:
    for transformation in (scale_by_vsgd(), scale_by_constant_vsgd(), vsgd(0.1), constant_vsgd(0.1)):
        assert isinstance(transformation, optax.GradientTransformationExtraArgs)
        params = jnp.ones(3)
        plain = transformation.update(params, transformation.init(params), params)
        assert_same(transformation.update(params, transformation.init(params), params, value=1.0, loss=None), plain)


# --- Hyperparameters as arrays. ---


def half_rounded(value: float, dtype: Any) -> float:
    return float(jnp.asarray(value, dtype))


@solvers
def test_injected_hyperparameters_equal_numbers(make: Callable[..., Any]) -> None:
    grads = gradients(20, 5)
    injected, state = train(optax.inject_hyperparams(make)(0.05, weight_decay=0.1), jnp.ones(5), grads)
    plain, plain_state = train(make(0.05, weight_decay=0.1), jnp.ones(5), grads)
    # Coefficients from float32 hyperparameters are rounded once more than from Python's.
    assert_same((injected, state.inner_state), (plain, plain_state), rtol=2e-6)


def test_injected_hyperparameters_can_be_scheduled_and_set() -> None:
    grads = gradients(4, 5)
    make = optax.inject_hyperparams(vsgd)
    solver = make(lambda count: 0.1 / (1 + count), variance_ratio=optax.constant_schedule(7.0))
    plain = vsgd(lambda count: 0.1 / (1 + count), variance_ratio=7.0)
    assert_same(train(solver, jnp.ones(5), grads)[0], train(plain, jnp.ones(5), grads)[0], rtol=2e-6)
    solver = make(0.1)
    state = solver.init(jnp.ones(5))
    state.hyperparams["learning_rate"] = jnp.asarray(0.0)
    updates, _ = solver.update(grads[0], state, jnp.ones(5))
    assert not updates.any()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@solvers
def test_injected_hyperparameters_rounded_to_half_precision_compute_in_float32(make: Callable[..., Any], dtype: Any) -> None:
    grads = [jnp.zeros(5, dtype), *gradients(20, 5, dtype=dtype), *[jnp.zeros(5, dtype)] * 20]
    solver = optax.inject_hyperparams(make)(0.05, weight_decay=0.0)
    params, state = train(solver, jnp.ones(5, dtype), grads)
    assert params.dtype == dtype
    assert {leaf.dtype for leaf in jax.tree.leaves(state.inner_state[0][1:])} == {jnp.dtype(jnp.float32)}
    for leaf in jax.tree.leaves((params, state)):
        assert jnp.isfinite(leaf).all()
    # It is a run with these rounded values and nothing else; a prior_strength of 0 in float16 is the smallest number there.
    rule = core.VSGD if make is vsgd else core.CONSTANT_VSGD
    numbers = {name: value for name, value in rule.hyperparameters()._asdict().items() if value is not None}
    rounded = {name: half_rounded(value, dtype) for name, value in numbers.items()}
    rounded["prior_strength"] = rounded["prior_strength"] or 2.0**-24
    transformation = {vsgd: scale_by_vsgd, constant_vsgd: scale_by_constant_vsgd}[make](**rounded)
    _, expected = directions(transformation, jnp.ones(5, dtype), grads)
    assert_same(state.inner_state[0], expected, rtol=2e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@solvers
def test_hyperparam_dtype_keeps_the_digits(make: Callable[..., Any], dtype: Any) -> None:
    grads = gradients(20, 5, dtype=dtype)
    solver = optax.inject_hyperparams(make, hyperparam_dtype=jnp.float32)(0.05)
    params, state = train(solver, jnp.ones(5, dtype), grads)
    assert params.dtype == dtype
    _, expected = train(make(0.05), jnp.ones(5, dtype), grads)
    assert_same(state.inner_state[0], expected[0], rtol=2e-6)
