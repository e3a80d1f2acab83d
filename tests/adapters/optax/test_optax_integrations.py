"""VSGD in the hands of flax and equinox: what their trainers do with it is what plain optax does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

jax = pytest.importorskip("jax")
optax = pytest.importorskip("optax")

import jax.numpy as jnp  # noqa: E402

from vsgd.optax import constant_vsgd, vsgd  # noqa: E402

solvers = pytest.mark.parametrize("make", [vsgd, constant_vsgd])

X = np.random.default_rng(0).standard_normal((64, 3)).astype(np.float32)
Y = np.sin(X.sum(1, keepdims=True))
STEPS = 30


def train(make: Callable[..., Any], params: Any, loss: Callable[[Any], Any]) -> tuple[Any, list[float]]:
    """Plain optax: the parameters at the end, and the losses."""
    solver = make(0.02, weight_decay=0.01)
    state = solver.init(params)

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = solver.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    losses = []
    for _ in range(STEPS):
        params, state, value = step(params, state)
        losses.append(float(value))
    assert losses[-1] < losses[0] / 2
    return params, losses


def assert_same(one: Any, other: Any) -> None:
    leaves, expected = jax.tree.leaves(one), jax.tree.leaves(other)
    assert len(leaves) == len(expected) == 4
    for leaf, each in zip(leaves, expected, strict=True):
        # Programs differ, and with them the order of a sum in the gradients, in float32 and 30 steps.
        np.testing.assert_allclose(leaf, each, rtol=0, atol=1e-4)


@solvers
def test_flax_nnx_optimizer(make: Callable[..., Any]) -> None:
    pytest.importorskip("flax", minversion="0.11")  # whose `update` takes the model
    from flax import nnx

    class Model(nnx.Module):
        def __init__(self, rngs: Any) -> None:
            self.hidden = nnx.Linear(3, 16, rngs=rngs)
            self.out = nnx.Linear(16, 1, rngs=rngs)

        def __call__(self, x: Any) -> Any:
            return self.out(nnx.tanh(self.hidden(x)))

    def loss(model: Any) -> Any:
        return ((model(X) - Y) ** 2).mean()

    model = Model(nnx.Rngs(0))
    graph, start = nnx.split(model)
    expected, losses = train(make, start, lambda params: loss(nnx.merge(graph, params)))

    optimizer = nnx.Optimizer(model, make(0.02, weight_decay=0.01), wrt=nnx.Param)

    @nnx.jit
    def step(model: Any, optimizer: Any) -> Any:
        value, grads = nnx.value_and_grad(loss)(model)
        optimizer.update(model, grads)
        return value

    values = [float(step(model, optimizer)) for _ in range(STEPS)]
    np.testing.assert_allclose(values, losses, rtol=1e-4)
    assert_same(nnx.state(model, nnx.Param), expected)
    # The state can be split and merged, as checkpoints do.
    again = nnx.merge(*nnx.split(optimizer))
    assert jax.tree.structure(nnx.state(again)) == jax.tree.structure(nnx.state(optimizer))


@solvers
def test_flax_train_state_and_its_bytes(make: Callable[..., Any]) -> None:
    linen = pytest.importorskip("flax.linen")
    from flax import serialization
    from flax.training.train_state import TrainState

    class Model(linen.Module):
        @linen.compact
        def __call__(self, x: Any) -> Any:
            return linen.Dense(1)(linen.tanh(linen.Dense(16)(x)))

    model = Model()
    params = model.init(jax.random.key(0), X)

    def loss(params: Any) -> Any:
        return ((model.apply(params, X) - Y) ** 2).mean()

    expected, _ = train(make, params, loss)

    def create() -> Any:
        return TrainState.create(apply_fn=model.apply, params=params, tx=make(0.02, weight_decay=0.01))

    @jax.jit
    def step(state: Any) -> Any:
        return state.apply_gradients(grads=jax.grad(loss)(state.params))

    state = create()
    for _ in range(STEPS // 2):
        state = step(state)
    restored = serialization.from_bytes(create(), serialization.to_bytes(state))
    for _ in range(STEPS - STEPS // 2):
        state, restored = step(state), step(restored)
    assert_same(state.params, expected)
    for leaf, other in zip(jax.tree.leaves(restored), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(leaf, other)


@solvers
def test_equinox_filtered_trees(make: Callable[..., Any]) -> None:
    eqx = pytest.importorskip("equinox")
    model = eqx.nn.MLP(3, 1, 16, depth=1, activation=jnp.tanh, key=jax.random.key(0))

    def loss(model: Any) -> Any:
        return ((jax.vmap(model)(X) - Y) ** 2).mean()

    # Functions and sizes among the leaves are None here.
    start, static = eqx.partition(model, eqx.is_inexact_array)
    expected, _ = train(make, start, lambda params: loss(eqx.combine(params, static)))
    solver = make(0.02, weight_decay=0.01)
    state = solver.init(eqx.filter(model, eqx.is_inexact_array))

    @eqx.filter_jit
    def step(model: Any, state: Any) -> Any:
        grads = eqx.filter_grad(loss)(model)
        updates, state = solver.update(grads, state, eqx.filter(model, eqx.is_inexact_array))
        return eqx.apply_updates(model, updates), state

    for _ in range(STEPS):
        model, state = step(model, state)
    assert_same(eqx.filter(model, eqx.is_inexact_array), expected)
