"""Shared by the tests of the optax adapter: gradients, runs on them, and equality of trees."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vsgd.optax import constant_vsgd, scale_by_constant_vsgd, scale_by_vsgd, vsgd

solvers = pytest.mark.parametrize("make", [vsgd, constant_vsgd])
transformations = pytest.mark.parametrize("make", [scale_by_vsgd, scale_by_constant_vsgd])
#: Stochastically rounded bfloat16 state, and stochastically rounded steps of bfloat16 parameters.
COMPACT: dict[str, Any] = {"state_dtype": "bfloat16", "stochastic_rounding": True, "seed": 7}
#: The parameters' dtype, and the state's options.
storages = pytest.mark.parametrize(
    ("dtype", "options"), [(jnp.float32, {}), (jnp.bfloat16, COMPACT)], ids=["float32", "compact"]
)


def gradients(steps: int, *shape: int, dtype: Any = np.float32) -> list[Any]:
    """Return random gradients, which depend only on the number of steps and the shape."""
    rng = np.random.default_rng((steps, *shape))
    return list(jnp.asarray(rng.standard_normal((steps, *shape)), dtype))


def make_step(solver: Any, **options: Any) -> Any:
    """Return a compiled step from parameters, state and gradients to new parameters and state."""

    def step(params: Any, state: Any, grads: Any) -> Any:
        updates, state = solver.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(step, **options)


def train(solver: Any, params: Any, grads: list[Any]) -> tuple[Any, Any]:
    """Return parameters and state after a step with each of the gradients."""
    step, state = make_step(solver).__wrapped__, solver.init(params)
    for grad in grads:
        params, state = step(params, state, grad)
    return params, state


def directions(transformation: Any, params: Any, grads: list[Any]) -> tuple[list[Any], Any]:
    """Return a transformation's result for each of the gradients, and its last state."""
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
        # Convert to float64, because older NumPy versions cannot compare bfloat16.
        np.testing.assert_allclose(np.asarray(a, np.float64), np.asarray(b, np.float64), rtol=rtol, atol=0, equal_nan=False)


def equal_share(one: Any, other: Any) -> float:
    """Return the share of the elements that are equal."""
    assert jax.tree.map(jax.typeof, one) == jax.tree.map(jax.typeof, other)
    flat = (np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(tree)]) for tree in (one, other))
    return float(np.mean(next(flat) == next(flat)))


def assert_near(one: Any, other: Any, rtol: float, rounded: bool) -> None:
    """Assert equality up to float32's last digits, which occasionally change a stochastic rounding."""
    if rounded:
        assert equal_share(one, other) > 0.99
    else:
        assert_same(one, other, rtol)
