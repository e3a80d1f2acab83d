"""Test the observer in optax chains: with masks and wrappers, on several devices, and next to VSGD."""

from __future__ import annotations

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vsgd.optax import constant_vsgd, noise_scale, observe_gradients, posterior, surprise
from vsgd.optax.monitor import summarize

PARAMS = {"a": jnp.zeros((3, 2)), "b": jnp.zeros(4)}


def draw(seed: int) -> dict[str, jax.Array]:
    keys = jax.random.split(jax.random.key(seed), 2)
    return {name: jax.random.normal(key, PARAMS[name].shape) for name, key in zip("ab", keys, strict=True)}


def run(solver: optax.GradientTransformation, steps: int = 5) -> optax.OptState:
    state = solver.init(PARAMS)
    for seed in range(steps):
        _, state = solver.update(draw(seed), state, PARAMS)
    return state


def assert_same(ours: object, theirs: object) -> None:
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-6), ours, theirs)


def test_a_mask_leaves_parameters_out_and_others_are_found() -> None:
    whole = posterior(run(observe_gradients()))
    masked = run(optax.chain(optax.masked(observe_gradients(), {"a": True, "b": False}), optax.adamw(0.1)))
    assert_same(posterior(masked)["a"], whole["a"])
    assert isinstance(posterior(masked)["b"], optax.MaskedNode)
    assert isinstance(surprise(draw(5), masked)["b"], optax.MaskedNode)


def test_next_to_vsgd_the_observer_counts_first() -> None:
    alone, both = run(observe_gradients()), run(optax.chain(observe_gradients(), constant_vsgd(0.1)))
    assert_same(posterior(both), posterior(alone))
    assert_same(surprise(draw(5), both), surprise(draw(5), alone))
    assert noise_scale(both, batch_size=2).overall.trace > 0  # from VSGD's state
    with pytest.raises(ValueError, match="without state of VSGD"):
        noise_scale(alone, batch_size=2)


def test_states_pickle_and_vmap_over_ensembles() -> None:
    state = run(observe_gradients(max_elements=3))
    assert_same(pickle.loads(pickle.dumps(state)), state)
    solver = observe_gradients(max_elements=3)
    two = jax.tree.map(lambda *each: jnp.stack(each), PARAMS, PARAMS)
    states = jax.vmap(solver.init)(two)
    for seed in range(5):
        grads = jax.tree.map(lambda *each: jnp.stack(each), draw(seed), draw(seed + 10))
        _, states = jax.vmap(solver.update)(grads, states)
    assert_same(jax.tree.map(lambda each: each[0], posterior(states)), posterior(state))


def test_gradients_and_states_that_do_not_fit_are_refused() -> None:
    solver = observe_gradients()
    state = solver.init(PARAMS)
    with pytest.raises(ValueError, match="updates has"):
        solver.update({**draw(0), "b": jnp.zeros((2, 2))}, state)
    with pytest.raises(ValueError, match="state is EmptyState, but must be ObserveGradientsState"):
        solver.update(draw(0), optax.EmptyState())
    with pytest.raises(ValueError, match="params has an array of int32, but must have floating or complex numbers"):
        solver.init({"a": jnp.zeros(2, jnp.int32)})


def test_the_monitor_takes_its_state() -> None:
    state = run(optax.chain(observe_gradients(max_elements=3), optax.adamw(0.1)))
    look = summarize(5, state, draw(5), batch_size=2)
    expected = surprise(draw(5), state)
    for name, each in posterior(state).items():
        found = look.tensors[name]
        assert found.noise_trace == pytest.approx(2 * PARAMS[name].size / 3 * float(each.noise_variance.sum()), rel=1e-5)
        assert found.gain == pytest.approx(np.median(each.gain), rel=1e-5)
        assert found.surprise == pytest.approx(float(expected[name]), rel=1e-5)
