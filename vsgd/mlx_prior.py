"""A prior in the units of gradients of MLX."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from vsgd import prior


def prior_strength_from(gradients: Iterable[Any], scale: float = 10.0) -> float:
    """A `prior_strength` in the units of a model's gradients, to be taken before training: see `docs/tuning.md`.

    It is `5e-5 * scale` times the mean of the squares of all elements, over all parameters and mini-batches together. So the
    first steps expect a variance of about `scale` times what a squared gradient is.

    The mini-batches are taken one after the other: a generator need not hold the gradients of more than one. Gradients are to
    be those that the optimizer will see, of the loss that is trained on.

    Args:
        gradients: for each of a few mini-batches, 10 are advised, a tree of gradients, as `mlx.nn.value_and_grad` returns it.
            None is left out.
        scale: the variance to start with, over the mean squared gradient. Larger starts slower, far smaller is unsafe.

    Returns:
        A number for `VSGD` or `ConstantVSGD`.

    Raises:
        ValueError: `scale` is out of its range; there are no gradients, all are zero, one is not finite or none of numbers; or
            they are so small or large that what would be returned is no prior strength.

    Example:
        >>> import mlx.core as mx
        >>> from vsgd.mlx import VSGD, prior_strength_from
        >>> def loss(params, x):
        ...     return ((x @ params["weight"] - 1.0) ** 2).mean()
        >>> params = {"weight": mx.zeros(2)}
        >>> batches = [mx.array([[1.0, 0.0]]), mx.array([[0.0, 2.0]])]
        >>> strength = prior_strength_from(mx.grad(loss)(params, x) for x in batches)
        >>> round(strength, 6)  # 5e-5 * 10 * (2**2 + 4**2) / 4
        0.0025
        >>> optimizer = VSGD(prior_strength=strength)
    """
    return prior.prior_strength_from(gradients, scale, _leaves, lambda sizes: sizes.sum().item())


def _leaves(name: str, batch: Any) -> Iterator[prior.Leaf]:
    for path, grad in tree_flatten(batch):
        if grad is not None:
            yield _leaf(f"{name}[{path!r}]" if path else name, grad)


def _leaf(name: str, grad: Any) -> prior.Leaf:
    if not (isinstance(grad, mx.array) and mx.issubdtype(grad.dtype, mx.inexact)):
        kind = f"an array of {grad.dtype}" if isinstance(grad, mx.array) else type(grad).__name__
        raise ValueError(f"{name} is {kind}, but must be an array of floating or complex numbers")
    is_complex = mx.issubdtype(grad.dtype, mx.complexfloating)
    wide = grad if is_complex or grad.dtype == mx.float64 else grad.astype(mx.float32)
    return prior.Leaf(name, mx.abs(wide), grad.size * (2 if is_complex else 1))
