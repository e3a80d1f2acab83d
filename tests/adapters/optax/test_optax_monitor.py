"""Test that the monitor's summary of an optax state agrees with the posterior."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from contract.summaries import check

jax = pytest.importorskip("jax")
optax = pytest.importorskip("optax")

import jax.numpy as jnp  # noqa: E402
from adapters.optax.optax_problems import solvers  # noqa: E402

from vsgd.optax import noise_scale, posterior, scale_by_constant_vsgd, surprise  # noqa: E402
from vsgd.optax.monitor import summarize  # noqa: E402
from vsgd.posterior import NoiseScale, Posterior  # noqa: E402


@solvers
@pytest.mark.parametrize("dtype", ["float32", "complex64"])
def test_an_optax_state_tells_what_its_posterior_says(make: Any, dtype: str) -> None:
    rng = np.random.default_rng(0)
    shapes = {"layer": [(3, 4), ()], "head": (5,)}
    imaginary = 1j if dtype == "complex64" else 0

    def draw() -> Any:
        def one(shape: Any) -> Any:
            return jnp.asarray(rng.standard_normal(shape) + imaginary * rng.standard_normal(shape), dtype)

        return jax.tree.map(one, shapes, is_leaf=lambda node: isinstance(node, tuple))

    params, labels = draw(), {"layer": ["a", "a"], "head": "b"}
    solver = optax.multi_transform({"a": make(0.1), "b": optax.chain(optax.identity(), make(0.1, variance_ratio=50.0))}, labels)
    state = solver.init(params)
    for _ in range(3):
        _, state = solver.update(draw(), state, params)
    grads = draw()
    seen = summarize(3, state, grads, batch_size=8)
    scales = noise_scale(state, batch_size=8)
    posteriors = jax.tree.leaves(posterior(state), is_leaf=lambda node: isinstance(node, Posterior))
    of_tensors = jax.tree.leaves(scales.tensors, is_leaf=lambda node: isinstance(node, NoiseScale))
    means = jax.tree.leaves(surprise(grads, state))
    for name, *told in zip(("head", "layer.0", "layer.1"), posteriors, of_tensors, means, strict=True):
        check(seen.tensors[name], [told[0]], *told[1:])
    sizes = np.array([5, 12, 1])
    check(seen.overall, posteriors, scales.overall, (sizes * np.array(means)).sum() / sizes.sum())
    assert summarize(3, state).overall.surprise is None


def test_an_optax_state_in_bfloat16_is_surprised_by_the_gradient_as_it_is() -> None:
    solver = scale_by_constant_vsgd(state_dtype="bfloat16")
    # bfloat16 cannot represent this number; rounded, it would be off by much of its distance to the mean.
    grads = {"a": jnp.full(5, 1.001, jnp.float32)}
    state = solver.init(grads)
    for _ in range(30):
        _, state = solver.update(grads, state)
    expected = float(surprise(grads, state)["a"])
    assert summarize(30, state, grads).tensors["a"].surprise == pytest.approx(expected, rel=1e-5)
