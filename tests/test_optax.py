"""What the optax transformations promise: state, dtypes, hyperparameters, and that no number of them is their own."""

from __future__ import annotations

import importlib.util
import inspect
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engines import ENGINES, x64

jax = pytest.importorskip("jax")
optax = pytest.importorskip("optax")

import jax.numpy as jnp  # noqa: E402

from vsgd import core  # noqa: E402
from vsgd.numpy import VSGD  # noqa: E402
from vsgd.optax import (  # noqa: E402
    ScaleByConstantVsgdState,
    ScaleByVsgdState,
    constant_vsgd,
    scale_by_constant_vsgd,
    scale_by_vsgd,
    vsgd,
)

solvers = pytest.mark.parametrize("make", [vsgd, constant_vsgd])
transformations = pytest.mark.parametrize("make", [scale_by_vsgd, scale_by_constant_vsgd])
rng = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def seed() -> None:
    """The same numbers whichever tests ran before."""
    rng.bit_generator.state = np.random.default_rng(0).bit_generator.state


def gradients(steps: int, *shape: int, dtype: Any = np.float32) -> list[Any]:
    return list(jnp.asarray(rng.standard_normal((steps, *shape)), dtype))


def train(solver: Any, params: Any, grads: list[Any]) -> tuple[Any, Any]:
    """Parameters and state after a step with each of the gradients."""
    state = solver.init(params)
    for grad in grads:
        updates, state = solver.update(grad, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def directions(transformation: Any, params: Any, grads: list[Any]) -> tuple[list[Any], Any]:
    """What a transformation makes of each of the gradients, and its last state."""
    state = transformation.init(params)
    results = []
    for grad in grads:
        result, state = transformation.update(grad, state)
        results.append(result)
    return results, state


def assert_same(one: Any, other: Any, rtol: float = 0.0) -> None:
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert jnp.asarray(a).dtype == jnp.asarray(b).dtype
        # As float64: an older NumPy compares no bfloat16.
        np.testing.assert_allclose(np.asarray(a, np.float64), np.asarray(b, np.float64), rtol=rtol, atol=0, equal_nan=False)


# --- The numbers are those of the reference. ---

HYPER = {
    "VSGD": {"variance_ratio": 7.0, "prior_strength": 1e-5, "kappa1": 0.7, "kappa2": 0.95, "eps": 1e-3, "weight_decay": 0.1},
    "ConstantVSGD": {"variance_ratio": 5.0, "prior_strength": 1e-5, "kappa": 0.7, "eps": 1e-3, "weight_decay": 0.1},
}


@pytest.mark.parametrize("hyper", [{}, HYPER], ids=["defaults", "others"])
@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.complex128])
@pytest.mark.parametrize("engine", ["optax-eager", "optax-jit"])
@pytest.mark.parametrize("kind", HYPER)
def test_steps_are_those_of_the_reference(kind: str, engine: str, dtype: type, hyper: dict[str, dict[str, float]]) -> None:
    params = [rng.standard_normal(shape).astype(dtype) for shape in ((), (3,), (2, 3))]
    wide = [param.astype(np.complex128 if dtype is np.complex128 else np.float64) for param in params]
    step, read = ENGINES[engine](kind, params, lr=0.05, **hyper.get(kind, {}))
    reference_step, reference_read = ENGINES["numpy"](kind, wide, lr=0.05, **hyper.get(kind, {}))
    for _ in range(60):
        grads = [rng.standard_normal(param.shape).astype(dtype) for param in params]
        step(grads)
        reference_step([grad.astype(array.dtype) for grad, array in zip(grads, wide, strict=True)])
    tolerance = 1e-4 if dtype is np.float32 else 1e-10
    for ours, reference in zip(read(), reference_read(), strict=True):
        assert ours.keys() == reference.keys()
        for name, expected in reference.items():
            # In float32 an element may pass near 0, where only its error beside the others' size means anything.
            scale = np.abs(expected).max()
            np.testing.assert_allclose(ours[name], expected, rtol=0, atol=tolerance * scale)


@solvers
def test_defaults_are_the_references(make: Callable[..., Any]) -> None:
    kind = {vsgd: core.Hyperparameters, constant_vsgd: core.ConstantHyperparameters}[make]
    for function in (make, {vsgd: scale_by_vsgd, constant_vsgd: scale_by_constant_vsgd}[make]):
        arguments = inspect.signature(function).parameters
        assert {name: arguments[name].default for name in kind._fields} == kind()._asdict()


def test_weight_decay_alone_shrinks_exponentially() -> None:
    with x64():
        params, _ = train(vsgd(0.1, weight_decay=0.5), jnp.ones(3), [jnp.zeros(3)] * 20)
        np.testing.assert_allclose(params, (1 - 0.1 * 0.5) ** 20, rtol=1e-14)


@pytest.mark.parametrize("mask", [{"w": True, "b": False}, lambda params: {"w": True, "b": False}], ids=["tree", "callable"])
@solvers
def test_mask_tells_what_decays(make: Callable[..., Any], mask: Any) -> None:
    params = {"w": jnp.ones(3), "b": jnp.ones(2)}
    grads = [{"w": w, "b": b} for w, b in zip(gradients(4, 3), gradients(4, 2), strict=True)]
    masked, _ = train(make(0.1, weight_decay=0.5, mask=mask), params, grads)
    assert_same(masked["w"], train(make(0.1, weight_decay=0.5), params, grads)[0]["w"])
    assert_same(masked["b"], train(make(0.1), params, grads)[0]["b"])


def test_weight_decay_may_be_a_schedule() -> None:
    grads = gradients(6, 3)
    scheduled, _ = train(vsgd(0.1, weight_decay=optax.constant_schedule(0.5)), jnp.ones(3), grads)
    assert_same(scheduled, train(vsgd(0.1, weight_decay=0.5), jnp.ones(3), grads)[0])


@solvers
def test_a_constant_schedule_equals_its_constant(make: Callable[..., Any]) -> None:
    grads = gradients(6, 3)
    scheduled, _ = train(make(optax.constant_schedule(0.05)), jnp.ones(3), grads)
    assert_same(scheduled, train(make(0.05), jnp.ones(3), grads)[0])


def test_the_first_step_is_at_the_schedules_beginning() -> None:
    grads = gradients(4, 3)
    params, _ = train(vsgd(lambda count: 0.1 / (1 + count)), jnp.ones(3), grads)
    array = np.ones(3, np.float32)
    reference = VSGD([array])
    for t, grad in enumerate(grads):
        reference.lr = 0.1 / (1 + t)
        reference.step([np.asarray(grad)])
    np.testing.assert_allclose(params, array, rtol=1e-6)


# --- State and dtypes. ---


@pytest.mark.parametrize(
    ("dtype", "state_dtype"),
    [
        (jnp.float8_e4m3fn, jnp.float32),
        (jnp.float16, jnp.float32),
        (jnp.bfloat16, jnp.float32),
        (jnp.float32, jnp.float32),
        (jnp.float64, jnp.float64),
        (jnp.complex64, jnp.complex64),
        (jnp.complex128, jnp.complex128),
    ],
)
@transformations
def test_state_is_float32_or_more_and_updates_as_the_gradient(make: Callable[..., Any], dtype: Any, state_dtype: Any) -> None:
    with x64():
        params = {"w": jnp.ones((2, 3), dtype), "scalar": jnp.ones((), dtype)}
        transformation = make()
        state = transformation.init(params)
        result, new_state = jax.jit(transformation.update)(params, state)
        assert {leaf.dtype for leaf in jax.tree.leaves(result)} == {jnp.dtype(dtype)}
        for each in (state, new_state):
            assert each.count.dtype == jnp.int32
            assert {leaf.dtype for leaf in jax.tree.leaves(each[1:])} == {jnp.dtype(state_dtype)}
        assert jax.tree.map(jax.typeof, state) == jax.tree.map(jax.typeof, new_state)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@transformations
def test_half_precision_differs_in_the_rounding_of_updates_alone(make: Callable[..., Any], dtype: Any) -> None:
    grads = gradients(5, 7, dtype=dtype)
    half, half_state = directions(make(), jnp.ones(7, dtype), grads)
    single, single_state = directions(make(), jnp.ones(7), [grad.astype(jnp.float32) for grad in grads])
    assert_same(half, [each.astype(dtype) for each in single])
    assert_same(half_state, single_state)


def test_updates_follow_the_gradient_and_state_the_parameter() -> None:
    with x64():
        (result,), state = directions(scale_by_vsgd(), jnp.ones(2, jnp.float64), [jnp.ones(2, jnp.bfloat16)])
        assert (result.dtype, state.mu_g.dtype) == (jnp.bfloat16, jnp.float64)
        (result,), state = directions(scale_by_vsgd(), jnp.ones(2, jnp.bfloat16), [jnp.ones(2, jnp.float64)])
        assert (result.dtype, state.mu_g.dtype) == (jnp.float64, jnp.float32)


@transformations
def test_a_float64_neighbour_changes_no_bit_of_a_float32_parameter(make: Callable[..., Any]) -> None:
    grads = gradients(5, 7)
    alone, _ = directions(make(), jnp.ones(7), grads)
    with x64():
        wide = gradients(5, 2, dtype=jnp.float64)
        mixed = [{"a": grad, "b": other} for grad, other in zip(grads, wide, strict=True)]
        together, _ = directions(make(), {"a": jnp.ones(7, jnp.float32), "b": jnp.ones(2, jnp.float64)}, mixed)
        assert_same([each["a"] for each in together], alone)
        assert_same([each["b"] for each in together], directions(make(), jnp.ones(2, jnp.float64), wide)[0])


@transformations
def test_numpy_numbers_are_numbers(make: Callable[..., Any]) -> None:
    with x64():  # where a strong float64 would widen
        grads = gradients(3, 4)
        names = core.VSGD.hyperparameters() if make is scale_by_vsgd else core.CONSTANT_VSGD.hyperparameters()
        numbers = names._replace(prior_shape=names.prior_strength)._asdict().items()
        given, state = directions(make(**{name: np.float64(value) for name, value in numbers}), jnp.ones(4, jnp.float32), grads)
        plain, plain_state = directions(make(), jnp.ones(4, jnp.float32), grads)
        assert_same((given, state), (plain, plain_state))


@transformations
def test_a_complex_number_is_two_real_ones(make: Callable[..., Any]) -> None:
    reals, imaginaries = gradients(5, 4), gradients(5, 4)
    together, state = directions(
        make(), jnp.ones(4, jnp.complex64), [jax.lax.complex(*pair) for pair in zip(reals, imaginaries, strict=True)]
    )
    for part, grads in ((jnp.real, reals), (jnp.imag, imaginaries)):
        alone, alone_state = directions(make(), jnp.ones(4), grads)
        assert_same([part(each) for each in together], alone)
        assert_same([part(each) for each in state[1:]], list(alone_state[1:]))


@transformations
def test_plain_numbers_and_numpy_arrays_are_parameters(make: Callable[..., Any]) -> None:
    params = {"number": 1.0, "array": np.ones(3, np.float32)}
    grads = [{"number": 0.5, "array": np.full(3, 0.5, np.float32)}] * 3
    results, _ = directions(make(), params, grads)
    expected, _ = directions(make(), jnp.ones(()), [jnp.full((), 0.5)] * 3)
    for result, each in zip(results, expected, strict=True):
        np.testing.assert_array_equal(result["number"], each)
        np.testing.assert_array_equal(result["array"], np.full(3, each))


@transformations
def test_the_count_stays_at_its_largest(make: Callable[..., Any]) -> None:
    transformation = make()
    largest = jnp.asarray(jnp.iinfo(jnp.int32).max, jnp.int32)
    state = transformation.init(jnp.ones(3))._replace(count=largest)
    result, state = transformation.update(jnp.ones(3), state)
    assert state.count == largest
    assert jnp.isfinite(result).all()


@solvers
def test_a_state_of_numpy_arrays_continues(make: Callable[..., Any]) -> None:
    grads = gradients(6, 3)
    solver = make(0.1, weight_decay=0.1)
    params, state = train(solver, jnp.ones(3), grads[:3])
    state = jax.tree.map(np.asarray, state)
    for grad in grads[3:]:
        updates, state = solver.update(grad, state, params)
        params = optax.apply_updates(params, updates)
    assert_same((params, state), train(solver, jnp.ones(3), grads))


def test_state_names() -> None:
    assert ScaleByVsgdState._fields == ("count", "mu_g", "b_g", "b_ghat")
    assert ScaleByConstantVsgdState._fields == ("count", "mu_g", "b")
    assert isinstance(vsgd(0.1).init(jnp.ones(2))[0], ScaleByVsgdState)
    assert isinstance(constant_vsgd(0.1).init(jnp.ones(2))[0], ScaleByConstantVsgdState)


# --- Trees. ---


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
    for tree, old_tree in zip(after[0][1:], before[0][1:], strict=True):
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


@solvers
def test_vmap_over_optimizers(make: Callable[..., Any]) -> None:
    grads = jnp.stack(gradients(6, 3))
    decay = "kappa2" if make is vsgd else "kappa"

    def run(learning_rate: Any, kappa: Any, prior_strength: Any) -> Any:
        return train(make(learning_rate, prior_strength=prior_strength, **{decay: kappa}), jnp.ones(3), list(grads))

    settings = [(0.1, 0.9, 1e-8), (0.01, 0.6, 1e-4), (0.05, 1.0, 1e-2)]
    together = jax.vmap(run)(*(jnp.asarray(column) for column in zip(*settings, strict=True)))
    for i, setting in enumerate(settings):
        # Rounded hyperparameters as above, in vectors of another length.
        assert_same(jax.tree.map(lambda leaf, i=i: leaf[i], together), run(*setting), rtol=5e-6)


def test_vmap_over_parameters() -> None:
    params, grads = jnp.ones((4, 3)), gradients(1, 4, 3)[0]
    solver = vsgd(0.1)
    updates, state = jax.vmap(solver.update)(grads, jax.vmap(solver.init)(params), params)
    expected, _ = solver.update(grads, solver.init(params), params)
    assert_same(updates, expected, rtol=1e-6)
    assert state[0].count.shape == (4,)


def test_derivatives_run_through_the_optimizer() -> None:
    with x64():
        grads = gradients(5, 3, dtype=jnp.float64)

        def end(learning_rate: Any, prior_strength: Any) -> Any:
            return train(vsgd(learning_rate, prior_strength=prior_strength), jnp.ones(3, jnp.float64), grads)[0].sum()

        for argument, (at, by) in enumerate([(0.1, 1e-6), (1e-2, 1e-8)]):
            point = [0.1, 1e-2]
            derivative = jax.grad(end, argnums=argument)(*point)
            above, below = ([*point[:argument], at + shift, *point[argument + 1 :]] for shift in (by, -by))
            # The difference of two runs has about half of float64's digits.
            np.testing.assert_allclose(derivative, (end(*above) - end(*below)) / (2 * by), rtol=1e-6)


# --- Transformations of JAX. ---


def loss(params: Any) -> Any:
    return ((params["w"] - 3) ** 2).sum() + (params["b"] ** 4).sum()


@solvers
def test_scan_and_cond_and_a_loop_agree(make: Callable[..., Any]) -> None:
    solver = make(optax.exponential_decay(0.1, 5, 0.9), weight_decay=0.01)
    params = {"w": jnp.ones(3), "b": jnp.ones((2, 2))}

    def step(carry: Any, _: Any = None) -> tuple[Any, None]:
        params, state = carry
        updates, state = solver.update(jax.grad(loss)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    def step_or_not(carry: Any, wanted: Any) -> tuple[Any, None]:
        return jax.lax.cond(wanted, lambda carry: step(carry)[0], lambda carry: carry, carry), None

    looped = start = (params, solver.init(params))
    compiled = jax.jit(step)
    for _ in range(10):
        looped, _ = compiled(looped)
    scanned, _ = jax.lax.scan(step, start, length=10)
    chosen, _ = jax.lax.scan(step_or_not, start, jnp.arange(20) % 2 == 0)
    # A compiler contracts and vectorizes a loop's body in its own way.
    assert_same(scanned, looped, rtol=1e-5)
    assert_same(chosen, looped, rtol=1e-5)


@pytest.mark.parametrize("params", [{"w": 1.0}, {"w": jnp.ones(3, jnp.bfloat16)}], ids=["weak", "bfloat16"])
@solvers
def test_one_trace_serves_all_steps(make: Callable[..., Any], params: Any) -> None:
    solver = optax.inject_hyperparams(make)(0.1)
    weak = jax.tree.map(jnp.asarray, params)
    # Strong types, as every step's parameters have; the state must be so by itself.
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.asarray(leaf).dtype), params)
    traces = 0

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        nonlocal traces
        traces += 1
        updates, state = solver.update(params, state, params)
        return optax.apply_updates(params, updates), state

    state = solver.init(weak)
    for _ in range(5):
        params, state = step(params, state)
    assert traces == 1


@solvers
def test_donated_buffers_are_used(make: Callable[..., Any]) -> None:
    grads = gradients(4, 3)
    solver = make(0.1, weight_decay=0.1)

    # A buffer that cannot be used, or is donated twice, is a warning or an error.
    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any, grad: Any) -> Any:
        updates, state = solver.update(grad, state, params)
        return optax.apply_updates(params, updates), state

    params, state = jnp.ones(3), solver.init(jnp.ones(3))
    for grad in grads:
        before = (params, state)
        params, state = step(params, state, grad)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before))
    # Compiled or not differs in the contraction of products and sums.
    assert_same((params, state), train(solver, jnp.ones(3), grads), rtol=1e-6)


def test_a_description_of_parameters_is_enough_for_init() -> None:
    state, *_ = vsgd(0.1).init(jax.ShapeDtypeStruct((2, 8), jnp.bfloat16))
    assert (state.b_g.shape, state.b_g.dtype) == ((2, 8), jnp.float32)


# Adam's are 40 and 0; a kernel for each of its three outputs, where one kernel for all would move 28.
@pytest.mark.parametrize(("make", "moved", "temporary"), [(vsgd, 108, 12), (constant_vsgd, 60, 8)])
def test_bytes_that_a_compiled_step_moves_and_keeps(make: Callable[..., Any], moved: int, temporary: int) -> None:
    if jax.default_backend() != "cpu":
        pytest.skip("other compilers fuse otherwise")
    number = 1 << 16
    solver = make(0.1, weight_decay=0.1)

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any, grads: Any) -> Any:
        updates, state = solver.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params = jnp.ones(number)
    compiled = step.lower(params, solver.init(params), params).compile()
    # Beside the arrays there are some scalars.
    assert compiled.cost_analysis()["bytes accessed"] <= moved * number + 1000
    assert compiled.memory_analysis().temp_size_in_bytes <= temporary * number + 10_000


# --- Bad input, and packages. ---


@pytest.mark.parametrize(
    ("hyper", "message"),
    [
        ({"learning_rate": -1}, "Invalid learning rate: -1 (learning_rate must be a finite number >= 0)"),
        ({"learning_rate": None}, "Invalid learning rate: None (learning_rate must be a finite number >= 0)"),
        ({"weight_decay": -0.1}, "Invalid weight_decay value: -0.1 (weight_decay must be a finite number >= 0)"),
        ({"variance_ratio": 0}, "Invalid variance_ratio value: 0 (variance_ratio must be a finite number > 0)"),
        ({"prior_strength": 0.0}, "Invalid prior_strength value: 0.0 (prior_strength must be a finite number >= 1e-30)"),
        ({"eps": "0"}, "Invalid epsilon value: '0' (eps must be a finite number >= 0)"),
    ],
)
@solvers
def test_a_bad_hyperparameter_is_named(make: Callable[..., Any], hyper: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        make(**{"learning_rate": 0.01, **hyper})
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("make", "name"), [(scale_by_vsgd, "kappa1"), (scale_by_vsgd, "kappa2"), (scale_by_constant_vsgd, "kappa")]
)
def test_a_bad_kappa_is_named(make: Callable[..., Any], name: str) -> None:
    with pytest.raises(ValueError) as error:
        make(**{name: 0.5})
    assert str(error.value) == f"Invalid {name} value: 0.5 ({name} must be a number in (0.5, 1])"


def test_integer_gradients_are_refused() -> None:
    transformation = scale_by_vsgd()
    params = {"w": jnp.ones(3), "n": jnp.ones(3, jnp.int32)}
    with pytest.raises(ValueError) as error:
        transformation.update(params, transformation.init(params))
    assert str(error.value) == "updates has an array of int32 at ['n'], but must have floating or complex numbers"


def test_weight_decay_needs_the_parameters() -> None:
    solver = vsgd(0.1, weight_decay=0.1)
    with pytest.raises(ValueError, match="you are not passing `params`"):
        solver.update(jnp.ones(3), solver.init(jnp.ones(3)))


@pytest.mark.parametrize("missing", ["jax", "optax"])
def test_without_its_framework_the_adapter_names_the_extra(missing: str) -> None:
    script = f"import sys; sys.modules['{missing}'] = None; import vsgd.optax"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert "ImportError: vsgd.optax needs JAX and optax: pip install 'vsgd[optax]'" in done.stderr


def test_the_adapter_imports_no_other_framework() -> None:
    others = {"torch", "tensorflow", "keras", "numba", "flax", "mlx", "vsgd.numpy"}
    assert run_script(f"import sys, vsgd.optax; print(*{others} & {{*sys.modules}})") == ""


def run_script(script: str, **environment: str) -> str:
    command = [sys.executable, "-c", textwrap.dedent(script)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **environment})
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# --- The tests that optax has for its own optimizers. ---


@pytest.mark.parametrize(
    ("module", "case", "number"),
    [
        ("optax.contrib._common_test", "ContribTest", 32),
        ("optax._src.alias_test", "AliasTest", 32),
        ("optax._src.float64_test", "Float64Test", 4),
    ],
)
def test_optax_own_suites_pass_whole(module: str, case: str, number: int) -> None:
    pytest.importorskip("absl")
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"this optax does not ship {module}")
    command = [sys.executable, str(Path(__file__).parent / "optax_suites.py"), module, case]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    # The number in optax 0.2.8; later ones may have more.
    assert int(done.stdout) >= number
