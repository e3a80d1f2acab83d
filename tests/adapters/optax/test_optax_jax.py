"""The optax transformations under those of JAX: jit, scan, vmap and derivatives."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
from drivers.precision import x64

jax = pytest.importorskip("jax")
optax = pytest.importorskip("optax")

import jax.numpy as jnp  # noqa: E402
from adapters.optax.optax_problems import assert_same, gradients, reseed, solvers, train  # noqa: E402

from vsgd.optax import constant_vsgd, vsgd  # noqa: E402
from vsgd.optax.state import get_arrays  # noqa: E402

seed = pytest.fixture(autouse=True)(reseed)


@solvers
def test_vmap_over_optimizers(make: Callable[..., Any]) -> None:
    grads = jnp.stack(gradients(6, 3))
    decay = "kappa2" if make is vsgd else "kappa"

    def run(learning_rate: Any, kappa: Any, prior_strength: Any) -> Any:
        return train(make(learning_rate, prior_strength=prior_strength, **{decay: kappa}), jnp.ones(3), list(grads))

    settings = [(0.1, 0.9, 1e-8), (0.01, 0.6, 1e-4), (0.05, 1.0, 1e-2)]
    together = jax.vmap(run)(*(jnp.asarray(column) for column in zip(*settings, strict=True)))
    for i, setting in enumerate(settings):
        # Hyperparameters are rounded once more than Python's, and vectors are of another length.
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
        before = (params, state[0].count, get_arrays(state[0]))
        params, state = step(params, state, grad)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before))
    # Compiled or not differs in the contraction of products and sums.
    assert_same((params, state), train(solver, jnp.ones(3), grads), rtol=1e-6)


@pytest.mark.parametrize("before", [False, True])
def test_a_state_keeps_its_types_where_64_bits_are_switched(before: bool) -> None:
    solver = vsgd(0.1)
    with x64(before):
        params = jnp.ones(3, jnp.float32)
        state = solver.init(params)
    with x64(not before):
        grads = jnp.ones((2, 3), jnp.float32)
        new_state, _ = jax.lax.scan(lambda state, grad: solver.update(grad, state, params)[::-1], state, grads)
        assert jax.tree.map(jax.typeof, new_state) == jax.tree.map(jax.typeof, state)


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
