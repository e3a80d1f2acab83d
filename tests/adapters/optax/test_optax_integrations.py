"""Test that training with VSGD in flax and equinox equals training with plain optax."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

jax = pytest.importorskip("jax")
optax = pytest.importorskip("optax")

import jax.numpy as jnp  # noqa: E402
from adapters.optax.optax_problems import make_step, solvers  # noqa: E402

X = np.random.default_rng(0).standard_normal((64, 3)).astype(np.float32)
Y = np.sin(X.sum(1, keepdims=True))
STEPS = 30


def loss_of(predicted: Any) -> Any:
    return ((predicted - Y) ** 2).mean()


def assert_trained(params: Any, solver: Any, start: Any, loss: Callable[[Any], Any]) -> None:
    """Assert that the parameters equal those of plain optax after `STEPS` steps, which halve the loss."""
    state, expected = solver.init(start), start
    step, compute_gradients = make_step(solver), jax.jit(jax.grad(loss))
    for _ in range(STEPS):
        expected, state = step(expected, state, compute_gradients(expected))
    assert loss(expected) < loss(start) / 2
    leaves, expected_leaves = jax.tree.leaves(params), jax.tree.leaves(expected)
    assert len(leaves) == len(expected_leaves) == 4
    for leaf, each in zip(leaves, expected_leaves, strict=True):
        # The programs differ, and therefore the order of sums in the gradients, in float32 and over 30 steps.
        np.testing.assert_allclose(leaf, each, rtol=0, atol=1e-4)


@solvers
def test_flax_nnx_optimizer(make: Callable[..., Any]) -> None:
    pytest.importorskip("flax", minversion="0.11")  # from this version on, `update` takes the model
    from flax import nnx

    rngs = nnx.Rngs(0)
    model = nnx.Sequential(nnx.Linear(3, 16, rngs=rngs), nnx.tanh, nnx.Linear(16, 1, rngs=rngs))
    solver = make(0.02, weight_decay=0.01)
    graph, start = nnx.split(nnx.clone(model))
    optimizer = nnx.Optimizer(model, solver, wrt=nnx.Param)

    @nnx.jit
    def step(model: Any, optimizer: Any) -> None:
        optimizer.update(model, nnx.grad(lambda model: loss_of(model(X)))(model))

    for i in range(STEPS):
        step(model, optimizer)
        if i == STEPS // 2:  # as checkpoints do
            optimizer = nnx.merge(*nnx.split(optimizer))
    assert_trained(nnx.state(model, nnx.Param), solver, start, lambda params: loss_of(nnx.merge(graph, params)(X)))


@solvers
def test_flax_train_state_and_its_bytes(make: Callable[..., Any]) -> None:
    linen = pytest.importorskip("flax.linen")
    from flax import serialization
    from flax.training.train_state import TrainState

    model = linen.Sequential([linen.Dense(16), linen.tanh, linen.Dense(1)])
    params, solver = model.init(jax.random.key(0), X), make(0.02, weight_decay=0.01)

    def loss(params: Any) -> Any:
        return loss_of(model.apply(params, X))

    def create() -> Any:
        return TrainState.create(apply_fn=model.apply, params=params, tx=solver)

    @jax.jit
    def step(state: Any) -> Any:
        return state.apply_gradients(grads=jax.grad(loss)(state.params))

    state = create()
    for i in range(STEPS):
        state = step(state)
        if i == STEPS // 2:
            state = serialization.from_bytes(create(), serialization.to_bytes(state))
    assert_trained(state.params, solver, params, loss)


@solvers
def test_equinox_filtered_trees(make: Callable[..., Any]) -> None:
    eqx = pytest.importorskip("equinox")
    model, solver = eqx.nn.MLP(3, 1, 16, depth=1, activation=jnp.tanh, key=jax.random.key(0)), make(0.02, weight_decay=0.01)

    def loss(model: Any) -> Any:
        return loss_of(jax.vmap(model)(X))

    # Functions and sizes among the leaves are None here.
    start, static = eqx.partition(model, eqx.is_inexact_array)
    state = solver.init(start)

    @eqx.filter_jit
    def step(model: Any, state: Any) -> Any:
        grads = eqx.filter_grad(loss)(model)
        updates, state = solver.update(grads, state, eqx.filter(model, eqx.is_inexact_array))
        return eqx.apply_updates(model, updates), state

    for _ in range(STEPS):
        model, state = step(model, state)
    assert_trained(eqx.filter(model, eqx.is_inexact_array), solver, start, lambda params: loss(eqx.combine(params, static)))
