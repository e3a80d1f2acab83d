"""Looking at the state of an optax transformation: what is told equals what the posterior says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from contract.summaries import check
from drivers.rules import RULES

kinds = pytest.mark.parametrize("kind", RULES)


@kinds
@pytest.mark.parametrize("dtype", ["float32", "complex64"])
def test_an_optax_state_tells_what_its_posterior_says(kind: str, dtype: str) -> None:
    jax = pytest.importorskip("jax")
    optax = pytest.importorskip("optax")
    import vsgd.optax as ours
    from vsgd.optax.monitor import summarize

    make: Callable[..., Any] = {"VSGD": ours.vsgd, "ConstantVSGD": ours.constant_vsgd}[kind]
    rng = np.random.default_rng(0)
    shapes = {"layer": [(3, 4), ()], "head": (5,)}

    imaginary = 1j if dtype == "complex64" else 0

    def draw() -> Any:
        def one(shape: Any) -> Any:
            return jax.numpy.asarray(rng.standard_normal(shape) + imaginary * rng.standard_normal(shape), dtype)

        return jax.tree.map(one, shapes, is_leaf=lambda node: isinstance(node, tuple))

    params = draw()
    labels = {"layer": ["a", "a"], "head": "b"}
    solver = optax.multi_transform({"a": make(0.1), "b": optax.chain(optax.identity(), make(0.1, variance_ratio=50.0))}, labels)
    state = solver.init(params)
    for _ in range(3):
        _, state = solver.update(draw(), state, params)
    grads = draw()
    seen = summarize(3, state, grads, batch_size=8)
    known, scales, surprises = ours.posterior(state), ours.noise_scale(state, batch_size=8), ours.surprise(grads, state)

    def flat(tree: Any, kind: Any) -> list[Any]:
        return jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, kind))

    found = [seen.tensors[name] for name in ("head", "layer.0", "layer.1")]
    posteriors = [type(each)(*map(np.asarray, each)) for each in flat(known, ours_posterior())]
    means = flat(surprises, ())
    for each in zip(found, [[one] for one in posteriors], flat(scales.tensors, type(scales.overall)), means, strict=True):
        check(*each)
    sizes = np.array([5, 12, 1])
    check(seen.overall, posteriors, scales.overall, (sizes * np.array(means)).sum() / sizes.sum())
    assert summarize(3, state).overall.surprise is None


def ours_posterior() -> type:
    from vsgd.posterior import Posterior

    return Posterior


def test_an_optax_state_in_bfloat16_is_surprised_by_the_gradient_as_it_is() -> None:
    jnp = pytest.importorskip("jax.numpy")
    pytest.importorskip("optax")
    import vsgd.optax as ours
    from vsgd.optax.monitor import summarize

    solver = ours.scale_by_constant_vsgd(state_dtype="bfloat16")
    # Not a number of bfloat16: rounded, it would be off by much of its distance to the mean.
    grads = {"a": jnp.full(5, 1.001, jnp.float32)}
    state = solver.init(grads)
    for _ in range(30):
        _, state = solver.update(grads, state)
    expected = float(ours.surprise(grads, state)["a"])
    assert summarize(30, state, grads).tensors["a"].surprise == pytest.approx(expected, rel=1e-5)
