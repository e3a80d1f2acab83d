"""A prior in the units of gradients of JAX."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax

from vsgd import prior
from vsgd.optax.numerics import choose_arithmetic_dtype
from vsgd.validation import document_options


@document_options()
def prior_strength_from(gradients: Iterable[optax.Updates], scale: float = 10.0) -> float:
    """Compute a `prior_strength` in the units of a model's gradients, before training: see `docs/calibration.md`.

    The result is `5e-5 * scale` times the mean square of all gradient elements, over all parameters and mini-batches. Pass the
    gradients that the transformation will see: those of the training loss, unscaled. Call it outside of `jax.jit`.

    Args:
        gradients: for each of a few mini-batches, about 10, a tree of gradients, as `jax.grad` returns it. None is skipped. A
            tree of gradients that `jax.vmap` or `jax.lax.scan` stacked counts as one mini-batch; the mean is the same.
        scale: {scale}

    Returns:
        A number for `prior_strength`.

    Raises:
        ValueError: `scale` is out of its range; the gradients are missing, all zero, not finite or not of numbers; or the
            result is not a valid prior strength.

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
    return prior.prior_strength_from(gradients, scale, _iterate_leaves, lambda magnitudes: float(jnp.sum(magnitudes)))


def _iterate_leaves(name: str, batch: Any) -> Iterator[prior.Gradient]:
    for path, grad in jax.tree_util.tree_leaves_with_path(batch):
        where = name + jax.tree_util.keystr(path)
        if not (hasattr(grad, "dtype") and jnp.issubdtype(grad.dtype, jnp.inexact)):
            found = f"an array of {grad.dtype}" if hasattr(grad, "dtype") else type(grad).__name__
            raise ValueError(f"{where} is {found}, but must be an array of floating or complex numbers")
        array = jnp.asarray(grad, choose_arithmetic_dtype(grad.dtype))
        yield prior.Gradient(where, jnp.abs(array), array.size * (2 if jnp.iscomplexobj(array) else 1))
