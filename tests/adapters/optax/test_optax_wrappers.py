"""Test the optax transformations on trees, in wrappers of optax and JAX, and with array hyperparameters."""

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
from adapters.optax.optax_problems import (  # noqa: E402
    COMPACT,
    assert_near,
    assert_same,
    directions,
    equal_share,
    gradients,
    make_step,
    solvers,
    storages,
    train,
)
from drivers.optax_driver import BY_XLA  # noqa: E402

from vsgd import core  # noqa: E402
from vsgd.optax import constant_vsgd, scale_by_constant_vsgd, scale_by_vsgd, vsgd  # noqa: E402
from vsgd.optax.state import get_arrays  # noqa: E402


@storages
@solvers
def test_none_changes_nothing_for_the_others(make: Callable[..., Any], dtype: Any, options: dict[str, Any]) -> None:
    solver = make(0.1, weight_decay=0.1, **options)
    params = {"a": jnp.ones(40, dtype), "b": jnp.ones(20, dtype)}
    grads = [{"a": a, "b": b} for a, b in zip(gradients(5, 40), gradients(5, 20), strict=True)]
    _, start = train(solver, params, grads[:1])
    state = without = start
    for grad in grads:
        updates, state = solver.update(grad, state, params)
        others, without = solver.update({**grad, "a": None}, without, params)
        assert others["a"] is None
        assert_same(others["b"], updates["b"])
    for tree, old_tree in zip(get_arrays(without[0]), get_arrays(start[0]), strict=True):
        assert tree["a"] is old_tree["a"]
    # A None among the parameters is not a parameter and is not counted.
    ended, state = train(solver, {"0": None, **params}, [{"0": None, **grad} for grad in grads])
    assert ended["0"] is None
    assert state[0].mu_g["0"] is None
    assert_same(ended["b"], train(solver, params, grads)[0]["b"])


def test_an_empty_tree_is_no_error() -> None:
    params, state = train(vsgd(0.1), {}, [{}, {}])
    assert params == {}
    assert state[0].count == 2


@storages
@solvers
def test_what_is_masked_out_passes_through(make: Callable[..., Any], dtype: Any, options: dict[str, Any]) -> None:
    grads = gradients(3, 40)
    solver = optax.masked(make(0.1, weight_decay=0.1, **options), {"a": False, "b": True})
    params = {"a": jnp.zeros(40, dtype), "b": jnp.ones(40, dtype)}
    state = solver.init(params)
    for grad in grads:
        updates, state = solver.update({"a": grad, "b": grad}, state, params)
        params = optax.apply_updates(params, updates)
        assert_same(updates["a"], grad)
    assert_same(params["b"], train(make(0.1, weight_decay=0.1, **options), jnp.ones(40, dtype), grads)[0])


@pytest.mark.parametrize(("dtype", "options"), [(jnp.float64, {}), (jnp.bfloat16, COMPACT)], ids=["float64", "compact"])
@solvers
def test_multi_steps_equal_the_mean_gradient(make: Callable[..., Any], dtype: Any, options: dict[str, Any]) -> None:
    with x64():
        grads = gradients(12, 200, dtype=jnp.float32 if options else dtype)
        # If the accumulator's dtype can be set, it is float32 by default; in older versions it is the parameters' dtype.
        newer = "accumulator_dtype" in inspect.signature(optax.MultiSteps).parameters
        accumulator = {"accumulator_dtype": grads[0].dtype} if newer else {}
        solver = optax.MultiSteps(make(0.1, **options), every_k_schedule=4, **accumulator)
        params, state = train(solver, jnp.ones(200, dtype), grads)
        means = [jnp.mean(jnp.stack(grads[i : i + 4]), axis=0) for i in (0, 4, 8)]
        expected = train(make(0.1, **options), jnp.ones(200, dtype), means)
        assert_near((params, state.inner_opt_state), expected, 1e-12, rounded=bool(options))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@solvers
def test_apply_if_finite_leaves_a_bad_step_out(make: Callable[..., Any], bad: float) -> None:
    grads = gradients(5, 3)
    broken = [*grads[:2], grads[2].at[1].set(bad), *grads[2:]]
    params, state = train(optax.apply_if_finite(make(0.1), max_consecutive_errors=3), jnp.ones(3), broken)
    assert state.total_notfinite == 1
    # The wrapper compiles the step, which contracts products and sums.
    assert_same((params, state.inner_state), train(make(0.1), jnp.ones(3), grads), rtol=1e-6)


# --- Hyperparameters as arrays. ---


@solvers
def test_injected_hyperparameters_equal_numbers_and_can_be_scheduled_and_set(make: Callable[..., Any]) -> None:
    grads, injected = gradients(20, 5), optax.inject_hyperparams(make)
    rate, decay = (lambda count: 0.1 / (1 + count)), {"weight_decay": 0.1}
    params, state = train(injected(rate, variance_ratio=optax.constant_schedule(7.0), **decay), jnp.ones(5), grads)
    plain, plain_state = train(make(rate, variance_ratio=7.0, **decay), jnp.ones(5), grads)
    # Coefficients from float32 hyperparameters are rounded once more than those from Python's.
    assert_same((params, state.inner_state[0]), (plain, plain_state[0]), rtol=2e-6)
    solver = injected(0.1)
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
    # The run equals one with these rounded values; a prior_strength that is 0 in float16 becomes float16's smallest number.
    rule = core.VSGD if make is vsgd else core.CONSTANT_VSGD
    numbers = {name: value for name, value in rule.hyperparameters()._asdict().items() if value is not None}
    rounded = {name: float(jnp.asarray(value, dtype)) for name, value in numbers.items()}
    rounded["prior_strength"] = rounded["prior_strength"] or 2.0**-24
    transformation = {vsgd: scale_by_vsgd, constant_vsgd: scale_by_constant_vsgd}[make](**rounded)
    _, expected = directions(transformation, jnp.ones(5, dtype), grads)
    assert_same(state.inner_state[0], expected, rtol=2e-6)


@solvers
def test_injected_hyperparameters_of_rounded_state_and_its_seed(make: Callable[..., Any]) -> None:
    grads, params = gradients(10, 2000), jnp.ones(2000, jnp.bfloat16)
    injected = optax.inject_hyperparams(make, hyperparam_dtype=jnp.float32)
    result, state = train(injected(0.1, **COMPACT), params, grads)
    expected = train(make(0.1, **COMPACT), params, grads)
    assert_near((result, state.inner_state), expected, 0, rounded=True)
    # The seed is an array like the others, and can be set.
    solver = injected(0.1, **{**COMPACT, "seed": 8})
    assert equal_share(train(solver, params, grads)[0], result) < 0.9
    state = solver.init(params)
    state.hyperparams["seed"] = jnp.asarray(COMPACT["seed"])
    for grad in grads:
        params, state = make_step(solver).__wrapped__(params, state, grad)
    assert_same(params, result)


# --- In JAX' own transformations. ---


@solvers
def test_vmap_over_optimizers(make: Callable[..., Any]) -> None:
    grads = jnp.stack(gradients(6, 3))
    decay = "kappa2" if make is vsgd else "kappa"

    def run(learning_rate: Any, kappa: Any, prior_strength: Any) -> Any:
        return train(make(learning_rate, prior_strength=prior_strength, **{decay: kappa}), jnp.ones(3), list(grads))

    settings = [(0.1, 0.9, 1e-8), (0.01, 0.6, 1e-4), (0.05, 1.0, 1e-2)]
    together = jax.vmap(run)(*(jnp.asarray(column) for column in zip(*settings, strict=True)))
    for i, setting in enumerate(settings):
        # Array hyperparameters are rounded once more than Python's, and the vectors have another length.
        assert_same(jax.tree.map(lambda leaf, i=i: leaf[i], together), run(*setting), rtol=5e-6)


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


@storages
@solvers
def test_scan_and_cond_and_a_loop_agree(make: Callable[..., Any], dtype: Any, options: dict[str, Any]) -> None:
    solver = make(optax.exponential_decay(0.1, 5, 0.9), weight_decay=0.01, **options)
    params = {"w": gradients(1, 3000, dtype=dtype)[0], "b": jnp.ones((2, 2), dtype)}

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
    for other in (scanned, chosen):
        # A compiler contracts and vectorizes a loop's body in its own way.
        assert_near(other, looped, 1e-5, rounded=bool(options))


@pytest.mark.parametrize("params", [{"w": 1.0}, {"w": jnp.ones(3, jnp.bfloat16)}], ids=["weak", "bfloat16"])
@solvers
def test_one_trace_serves_all_steps(make: Callable[..., Any], params: Any) -> None:
    solver = optax.inject_hyperparams(make)(0.1)
    weak = jax.tree.map(jnp.asarray, params)
    # Use strong types, like every step's parameters; the state must have strong types without that.
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.asarray(leaf).dtype), params)
    step = make_step(solver)
    state = solver.init(weak)
    for _ in range(5):
        params, state = step(params, state, params)
    assert step._cache_size() == 1


@storages
@solvers
def test_donated_buffers_are_used(make: Callable[..., Any], dtype: Any, options: dict[str, Any]) -> None:
    grads = gradients(4, 3000)
    solver = make(0.1, weight_decay=0.1, **options)
    # A buffer that cannot be used, or is donated twice, causes a warning or an error.
    step, plain_step = make_step(solver, donate_argnums=(0, 1)), make_step(solver)
    expected, expected_state = jnp.ones(3000, dtype), solver.init(jnp.ones(3000, dtype))
    params, state = jax.tree.map(jnp.copy, (expected, expected_state))
    for grad in grads:
        before = (params, state[0].count, get_arrays(state[0]))
        params, state = step(params, state, grad)
        expected, expected_state = plain_step(expected, expected_state, grad)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before))
    assert_same((params, state), (expected, expected_state))


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


# Adam's numbers are 40 and 0; it uses a kernel for each of its three outputs, where a single kernel would move 28.
@pytest.mark.parametrize(("make", "moved", "temporary"), [(vsgd, 108, 12), (constant_vsgd, 60, 8)])
def test_bytes_that_a_compiled_step_moves_and_keeps(make: Callable[..., Any], moved: int, temporary: int) -> None:
    if jax.default_backend() != "cpu":
        pytest.skip("other compilers fuse otherwise")
    number = 1 << 16
    solver = make(0.1, weight_decay=0.1)
    params = jnp.ones(number)
    with BY_XLA:
        compiled = make_step(solver, donate_argnums=(0, 1)).lower(params, solver.init(params), params).compile()
    # The tolerance allows for some scalars besides the arrays.
    assert compiled.cost_analysis()["bytes accessed"] <= moved * number + 1000
    assert compiled.memory_analysis().temp_size_in_bytes <= temporary * number + 10_000


def test_schedule_free_ends_nearer_to_the_minimum_at_a_constant_rate() -> None:
    setting = {"prior_strength": "auto", "forgetting_floor": 0.01}
    curvature, noise = jnp.logspace(-2, 0, 100), 0.3 * jax.random.normal(jax.random.key(0), (2000, 100))

    def end(solver: Any) -> tuple[Any, Any]:
        def step(carry: Any, noise: Any) -> Any:
            params, state = carry
            updates, state = solver.update(curvature * params + noise, state, params)
            return (optax.apply_updates(params, updates), state), None

        params = jnp.ones(100)
        return jax.jit(lambda: jax.lax.scan(step, (params, solver.init(params)), noise)[0])()

    plain, _ = end(constant_vsgd(0.016, **setting))
    params, state = end(optax.contrib.schedule_free(constant_vsgd(0.016, **setting), 0.016))
    averaged = optax.contrib.schedule_free_eval_params(state, params)
    assert (curvature * averaged**2).mean() < (curvature * plain**2).mean() / 2
