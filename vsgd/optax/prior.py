"""A prior in the units of gradients of JAX."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax

from vsgd import prior
from vsgd.optax.numerics import arithmetic_dtype


def prior_strength_from(gradients: Iterable[optax.Updates], scale: float = 10.0) -> float:
    """A `prior_strength` in the units of a model's gradients, to be taken before training: see `docs/tuning.md`.

    It is `5e-5 * scale` times the mean of the squares of all elements, over all parameters and mini-batches together. So the
    first steps expect a variance of about `scale` times what a squared gradient is.

    The mini-batches are taken one after the other: a generator need not hold the gradients of more than one. Gradients are to
    be those that the transformation will see, of the loss that is trained on. Call it outside of `jax.jit`.

    Args:
        gradients: for each of a few mini-batches, 10 are advised, a tree of gradients, as `jax.grad` returns it. None is left
            out. A tree of gradients that `jax.vmap` or `jax.lax.scan` stacked counts as one mini-batch; the mean is the same.
        scale: the variance to start with, over the mean squared gradient. Larger starts slower, far smaller is unsafe.

    Returns:
        A number for `vsgd`, `constant_vsgd` and what they scale by.

    Raises:
        ValueError: `scale` is out of its range; there are no gradients, all are zero, one is not finite or none of numbers; or
            they are so small or large that what would be returned is no prior strength.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from vsgd.optax import prior_strength_from, vsgd
        >>> def loss(params, x):
        ...     return jnp.mean((x @ params["weight"] - 1.0) ** 2)
        >>> params = {"weight": jnp.zeros(2)}
        >>> batches = jnp.array([[[1.0, 0.0]], [[0.0, 2.0]]])
        >>> gradients = (jax.grad(loss)(params, x) for x in batches)
        >>> strength = prior_strength_from(gradients)
        >>> round(strength, 6)  # 5e-5 * 10 * (2**2 + 4**2) / 4
        0.0025
        >>> solver = vsgd(0.01, prior_strength=strength)
    """
    return prior.prior_strength_from(gradients, scale, _leaves, lambda sizes: float(jnp.sum(sizes)))


def _leaves(name: str, batch: Any) -> Iterator[prior.Leaf]:
    for path, grad in jax.tree_util.tree_leaves_with_path(batch):
        where = name + jax.tree_util.keystr(path)
        if not (hasattr(grad, "dtype") and jnp.issubdtype(grad.dtype, jnp.inexact)):
            kind = f"an array of {grad.dtype}" if hasattr(grad, "dtype") else type(grad).__name__
            raise ValueError(f"{where} is {kind}, but must be an array of floating or complex numbers")
        array = jnp.asarray(grad, arithmetic_dtype(grad.dtype))
        yield prior.Leaf(where, jnp.abs(array), array.size * (2 if jnp.iscomplexobj(array) else 1))
