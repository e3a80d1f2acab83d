"""Test `prior_strength="auto"` under the transformations and wrappers of JAX and optax."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import vsgd.optax

PARAMS = {"w": jnp.linspace(-1.0, 2.0, 6).reshape(2, 3), "b": jnp.zeros(3)}
GRADS = [
    jax.tree.map(lambda param, i=i: jnp.cos(7.0 * i + jnp.arange(param.size)).reshape(param.shape), PARAMS) for i in range(4)
]
UNIT = float(np.sqrt(np.mean(np.concatenate([np.ravel(grad) for grad in jax.tree.leaves(GRADS[0])]) ** 2)))
AUTO = {"learning_rate": 0.05, "prior_strength": "auto", "weight_decay": 0.1}

make = pytest.mark.parametrize("make", [vsgd.optax.vsgd, vsgd.optax.constant_vsgd])


def run(solver: Any, params: Any = PARAMS, grads: Any = GRADS) -> tuple[Any, Any]:
    state = solver.init(params)
    for each in grads:
        updates, state = jax.jit(solver.update)(each, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def assert_near(one: Any, other: Any) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6, atol=2e-7), one, other)


@make
def test_a_scan_is_a_loop(make: Callable[..., Any]) -> None:
    solver = make(**AUTO)
    stacked = jax.tree.map(lambda *each: jnp.stack(each), *GRADS)

    def step(carry: Any, grads: Any) -> Any:
        params, state = carry
        updates, state = solver.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    (scanned, state), _ = jax.lax.scan(step, (PARAMS, solver.init(PARAMS)), stacked)
    looped, _ = run(solver)
    assert_near(scanned, looped)
    assert float(state[0].gradient_unit) == pytest.approx(UNIT)


@make
def test_each_run_of_vmap_has_its_own_unit(make: Callable[..., Any]) -> None:
    solver, factors = make(**AUTO), jnp.array([1.0, 1e-3, 1e3])

    def train(factor: Any) -> Any:
        state, params = solver.init(PARAMS), PARAMS
        for grads in GRADS:
            updates, state = solver.update(jax.tree.map(lambda grad: factor * grad, grads), state, params)
            params = optax.apply_updates(params, updates)
        return params, state[0].gradient_unit, vsgd.optax.posterior(state)["b"].mean

    params, units, means = jax.vmap(train)(factors)
    np.testing.assert_allclose(units, UNIT * factors, rtol=1e-6)
    expected, state = run(solver)
    for i in range(3):
        assert_near(jax.tree.map(lambda leaf, i=i: leaf[i], params), expected)
        np.testing.assert_allclose(means[i], factors[i] * vsgd.optax.posterior(state)["b"].mean, rtol=1e-5)


@make
def test_wrappers_leave_it_as_it_is(make: Callable[..., Any]) -> None:
    expected, _ = run(make(**AUTO))
    injected, state = run(optax.inject_hyperparams(make)(**AUTO))
    assert_near(injected, expected)
    assert float(state.inner_state[0].gradient_unit) == pytest.approx(UNIT)
    assert_near(run(optax.flatten(make(**AUTO)))[0], expected)
    # The halves of each gradient are accumulated, and their sum calibrates.
    halves = [jax.tree.map(lambda grad, sign=sign: grad * (1 + sign), grads) for grads in GRADS for sign in (0.5, -0.5)]
    assert_near(run(optax.MultiSteps(make(**AUTO), 2), grads=halves)[0], expected)
    # The first gradient is not finite, and a wrapper or the solver itself skips it.
    spoilt = [jax.tree.map(lambda grad: grad * jnp.nan, GRADS[0]), *GRADS]
    assert_near(run(optax.apply_if_finite(make(**AUTO), 3), grads=spoilt)[0], expected)
    assert_near(run(make(**AUTO), grads=spoilt)[0], expected)


def test_the_gradient_is_not_measured_again() -> None:
    solver = vsgd.optax.vsgd(**AUTO)
    primitives = [each.primitive.name for each in jax.make_jaxpr(solver.update)(GRADS[0], solver.init(PARAMS), PARAMS).eqns]
    # The measurement is only in a branch that later steps do not take.
    assert primitives.count("cond") == 1
    assert not {"reduce_max", "reduce_sum"} & {*primitives}


@pytest.mark.skipif(not hasattr(jax, "shard_map"), reason="this JAX has no jax.shard_map")
def test_inside_shard_map_it_needs_to_know_what_varies() -> None:
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("data")
    solver, grads = vsgd.optax.vsgd(0.1, prior_strength="auto"), jnp.arange(4.0)

    def step(grads: Any) -> Any:
        return solver.update(grads, solver.init(grads), grads)[0]

    def map_step(check_vma: bool) -> Any:
        return jax.jit(jax.shard_map(step, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=check_vma))(grads)

    np.testing.assert_allclose(map_step(True), step(grads), rtol=1e-6)
    with pytest.raises(ValueError, match="prior_strength is 'auto', but inside shard_map with check_vma=False"):
        map_step(False)
