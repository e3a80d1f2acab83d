"""What the tests of the optax adapter share: gradients, runs on them, and equality of trees."""

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
rng = np.random.default_rng(0)


def reseed() -> None:
    """Let `rng` begin anew: a fixture of each file, so that tests see the same numbers whichever ran before."""
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
