"""State in bfloat16 and bfloat16 parameters, both by stochastic rounding, in optax."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
from drivers.emulation import round_all, words

jax = pytest.importorskip("jax")
optax = pytest.importorskip("optax")

import jax.numpy as jnp  # noqa: E402

from vsgd import core  # noqa: E402
from vsgd.optax import constant_vsgd, vsgd  # noqa: E402
from vsgd.optax.state import get_arrays  # noqa: E402

RULES = {vsgd: core.VSGD, constant_vsgd: core.CONSTANT_VSGD}
solvers = pytest.mark.parametrize("make", RULES)
STEPS = 30
SHAPES = {"number": (), "row": (5,), "table": (6, 7, 50)}


def gradients(steps: int = STEPS, shapes: dict[str, tuple[int, ...]] = SHAPES) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    return [{name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()} for _ in range(steps)]


def ones(dtype: Any = np.float32) -> dict[str, Any]:
    return {name: jnp.ones(shape, dtype) for name, shape in SHAPES.items()}


def stepper(solver: Any, **options: Any) -> Callable[..., Any]:
    @partial(jax.jit, **options)
    def step(params: Any, state: Any, grads: Any) -> Any:
        updates, state = solver.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


def train(solver: Any, params: Any, grads: list[Any], jit: bool = True) -> Any:
    step = stepper(solver) if jit else stepper(solver).__wrapped__
    state = solver.init(params)
    for grad in grads:
        params, state = step(params, state, grad)
    return params, state


def flat(tree: Any) -> np.ndarray:
    """All elements, as complex numbers, which hold them all."""
    return np.concatenate([np.asarray(leaf).astype(np.complex128).ravel() for leaf in jax.tree.leaves(tree)])


def equal_share(one: Any, other: Any) -> float:
    return float(np.mean(flat(one) == flat(other)))


def assert_same(one: Any, other: Any) -> None:
    assert jax.tree.map(jax.typeof, one) == jax.tree.map(jax.typeof, other)
    np.testing.assert_array_equal(flat(one), flat(other))


# --- The contract. ---


@solvers
def test_a_step_of_a_bfloat16_parameter_is_rounded_once(make: Callable[..., Any]) -> None:
    rng = np.random.default_rng(0)
    count = 20_000
    # Of sizes from 2**-12 to 2**12 against steps of about 1.
    sizes = 2.0 ** rng.integers(-12, 12, count)
    params = jnp.asarray(rng.standard_normal(count) * sizes, jnp.bfloat16)
    plain, rounded = make(1.0, weight_decay=1e-3), make(1.0, weight_decay=1e-3, stochastic_rounding=True, seed=5)
    state = plain_state = rounded.init(params)
    assert_same(state, plain.init(params))
    for step in range(1, 11):
        grads = jnp.asarray(rng.standard_normal(count), jnp.bfloat16)
        wide = np.asarray(params, np.float32)
        steps, plain_state = plain.update(grads.astype(jnp.float32), plain_state, wide)
        updates, state = rounded.update(grads, state, params)
        assert updates.dtype == jnp.float32
        params = optax.apply_updates(params, updates)
        assert params.dtype == jnp.bfloat16
        (expected,) = round_all([wide + np.asarray(steps)], words(5, 0, step, (count,)), len(RULES[make].state_names))[:1]
        np.testing.assert_array_equal(np.asarray(params, np.float32), expected)
        assert_same(state, plain_state)


def test_the_way_between_two_bfloat16_numbers_is_a_float32() -> None:
    everything = np.arange(2**16, dtype=np.uint32) << 16
    numbers = everything.view(np.int32).view(np.float32)
    numbers = numbers[np.isfinite(numbers) & (np.abs(numbers) > 1e-30) & (np.abs(numbers) < 1e38)]
    rng = np.random.default_rng(0)
    for _ in range(10):
        target = rng.choice(numbers, len(numbers))
        # Where a step leaves less of a parameter than 2**-15, there is no such float32.
        fits = np.abs(target) >= np.abs(numbers) * 2.0**-15
        params = jnp.asarray(numbers[fits], jnp.bfloat16)
        reached = optax.apply_updates(params, jnp.asarray(target[fits] - numbers[fits]))
        np.testing.assert_array_equal(np.asarray(reached, np.float32), target[fits])


# --- Equal, however it is run. ---


def scanned(solver: Any, params: Any, grads: list[Any]) -> Any:
    step = stepper(solver)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *grads)
    carry, _ = jax.lax.scan(lambda carry, grad: (step(*carry, grad), None), (params, solver.init(params)), stacked)
    return carry


def donated(solver: Any, params: Any, grads: list[Any]) -> Any:
    step, state = stepper(solver, donate_argnums=(0, 1)), solver.init(params)
    params = jax.tree.map(jnp.copy, params)
    for grad in grads:
        before = state
        params, state = step(params, state, grad)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves((before[0].count, get_arrays(before[0]))))
    return params, state


RUNS = {"compiled": train, "eager": partial(train, jit=False), "scan": scanned, "donated": donated}


@pytest.mark.parametrize("run", ["eager", "scan", "donated"])
@solvers
def test_runs_are_equal_but_for_float32_rounding(make: Callable[..., Any], run: str) -> None:
    def trained(run: str, seed: int) -> Any:
        solver = make(0.01, weight_decay=0.1, state_dtype="bfloat16", stochastic_rounding=True, seed=seed)
        return RUNS[run](solver, ones(jnp.bfloat16), gradients(STEPS))

    expected = trained("compiled", 3)
    result = trained(run, 3)
    assert jax.tree.map(jax.typeof, result) == jax.tree.map(jax.typeof, expected)
    # Roundings that went the other way, as above; once it did, what follows differs.
    assert equal_share(result, expected) > 0.99
    # With other noise hardly an element is equal.
    assert equal_share(trained(run, 4), expected) < 0.5


# --- Trees and wrappers. ---


def compact(make: Callable[..., Any], **options: Any) -> Any:
    return make(0.1, **{"weight_decay": 0.1, "state_dtype": "bfloat16", "stochastic_rounding": True, "seed": 7, **options})


@solvers
def test_none_changes_nothing_for_the_others(make: Callable[..., Any]) -> None:
    solver, grads = compact(make), gradients(5)
    params = ones(jnp.bfloat16)
    state, without = solver.init(params), solver.init(params)
    for grad in grads:
        updates, state = solver.update(grad, state, params)
        others, without = solver.update({**grad, "number": None}, without, params)
        assert others["number"] is None
        assert_same({**others, "number": 0.0}, {**updates, "number": 0.0})
    assert_same(without[0].mu_g["number"], solver.init(params)[0].mu_g["number"])
    # None among the parameters is no parameter: it is not counted.
    with_none = train(solver, {"a": None, **params}, [{"a": None, **grad} for grad in grads])
    assert_same(with_none[0]["table"], train(solver, params, grads)[0]["table"])


@solvers
def test_masked_and_accumulated(make: Callable[..., Any]) -> None:
    grads, params = gradients(6), ones(jnp.bfloat16)
    expected, _ = train(compact(make), {"table": params["table"]}, [{"table": grad["table"]} for grad in grads])
    result, _ = train(optax.masked(compact(make), {"number": False, "row": False, "table": True}), params, grads)
    assert_same(result["table"], expected["table"])

    solver = optax.MultiSteps(compact(make), every_k_schedule=2)
    repeated, state = train(solver, params, [grad for grad in grads for _ in range(2)])
    expected, expected_state = train(compact(make), params, grads)
    assert_same(state.inner_opt_state[0].count, expected_state[0].count)
    assert equal_share((repeated, state.inner_opt_state), (expected, expected_state)) > 0.99


@solvers
def test_decay_is_masked(make: Callable[..., Any]) -> None:
    grads, params = gradients(6), ones(jnp.bfloat16)
    mask = {"number": False, "row": False, "table": True}
    masked, _ = train(compact(make, mask=mask), params, grads)
    assert_same(masked["table"], train(compact(make), params, grads)[0]["table"])
    assert_same(masked["row"], train(compact(make, weight_decay=0.0), params, grads)[0]["row"])


@solvers
def test_injected_hyperparameters(make: Callable[..., Any]) -> None:
    grads, params = gradients(10), ones(jnp.bfloat16)
    injected = optax.inject_hyperparams(make, hyperparam_dtype=jnp.float32)
    result, state = train(compact(injected), params, grads)
    expected = train(compact(make), params, grads)
    assert equal_share((result, state.inner_state), expected) > 0.99
    assert {leaf.dtype for leaf in jax.tree.leaves(get_arrays(state.inner_state[0]))} == {jnp.dtype(jnp.bfloat16)}
    # The seed is an array among the others, and may be set.
    other, _ = train(compact(injected, seed=8), params, grads)
    assert equal_share(other, expected[0]) < 0.9
    state = compact(injected, seed=8).init(params)
    state.hyperparams["seed"] = jnp.asarray(7)
    step = stepper(compact(injected, seed=8))
    for grad in grads:
        params, state = step(params, state, grad)
    assert_same(params, result)


@solvers
def test_float32_parameters_are_not_rounded(make: Callable[..., Any]) -> None:
    grads = gradients(5)
    assert_same(train(make(0.1, stochastic_rounding=True), ones(), grads), train(make(0.1), ones(), grads))


# --- Bad input. ---


def test_rounding_needs_the_parameters() -> None:
    solver = vsgd(0.1, stochastic_rounding=True)
    with pytest.raises(ValueError, match="you are not passing `params`"):
        solver.update(jnp.ones(3), solver.init(jnp.ones(3)))
