"""A prior in the gradients' own units, from the gradients of a few mini-batches.

`prior_strength`, gamma, has the unit of a squared gradient, so what is right for one loss is wrong for a multiple of it. It
acts through the posterior variance that a run starts with, near `2 gamma / 1e-4`. Here gamma is such that this is `scale` times
the mean squared gradient. Adapters say what their gradients are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from vsgd import core


class Leaf(NamedTuple):
    """One gradient of one mini-batch.

    Attributes:
        name: for an error.
        sizes: absolute values of its elements, an array of any library, float32 at least.
        numbers: how many real numbers it has; a complex one is two.
    """

    name: str
    sizes: Any
    numbers: int


def prior_strength_from(
    gradients: Iterable[Any],
    scale: float,
    leaves: Callable[[str, Any], Iterator[Leaf]],
    total: Callable[[Any], float],
) -> float:
    """The prior strength for gradients like these: `5e-5 * scale` times the mean of the squares of all their elements.

    Args:
        gradients: those of each mini-batch, taken one after the other.
        scale: the variance that a run is to start with, over the mean squared gradient.
        leaves: the gradients of one mini-batch, given its name and itself.
        total: the sum of an array.

    Returns:
        A number for `prior_strength`.

    Raises:
        ValueError: `scale` is out of its range, there are no gradients, all are zero or one is not finite, or what would be
            returned is no prior strength.

    Example:
        >>> import numpy as np
        >>> def leaves(name, batch):
        ...     yield Leaf(name, abs(batch), batch.size)
        >>> round(prior_strength_from([np.array([3.0, -4.0]), np.array([0.0, 5.0])], 10.0, leaves, np.sum), 5)
        0.00625
    """
    core.validate(scale=scale)
    if not isinstance(gradients, Iterable):
        raise ValueError(f"gradients is {type(gradients).__name__}, but must be an iterable over mini-batches")
    found, number = _Sums(0.0, 0.0, 0), 0
    for batch in gradients:
        found, number = _added(found, leaves(f"gradients[{number}]", batch), total), number + 1
        del batch  # before the next one is computed
    if not found.numbers:
        raise ValueError("gradients has no elements, but must have those of one mini-batch at least")
    if not found.sizes:
        raise ValueError(f"gradients has {found.numbers} elements, all zero, but must have some that are not")
    return _checked(5e-5 * float(scale) * (found.squares / found.numbers), scale)


def of_list(leaf: Callable[[str, Any], Leaf]) -> Callable[[str, Any], Iterator[Leaf]]:
    """How to take the gradients of a mini-batch that is a list or a dict of them, None among them.

    Args:
        leaf: `leaf(name, grad)` makes a `Leaf` of one gradient, or raises a `ValueError` that names it.

    Returns:
        `leaves(name, batch)` for `prior_strength_from`, which raises a `ValueError` where the batch is neither.
    """

    def leaves(name: str, batch: Any) -> Iterator[Leaf]:
        if not isinstance(batch, Iterable) or hasattr(batch, "shape"):
            raise ValueError(f"{name} is {type(batch).__name__}, but must be a list of gradients, one for each parameter")
        pairs = batch.items() if isinstance(batch, Mapping) else enumerate(batch)
        return (leaf(f"{name}[{key!r}]", grad) for key, grad in pairs if grad is not None)

    return leaves


class _Sums(NamedTuple):
    """Over all elements so far: of absolute values, of squares, and how many."""

    sizes: float
    squares: float
    numbers: int


def _added(sums: _Sums, leaves: Iterator[Leaf], total: Callable[[Any], float]) -> _Sums:
    for leaf in leaves:
        size = float(total(leaf.sizes))
        if not math.isfinite(size):
            raise ValueError(f"{leaf.name} has elements or a sum of {size}, but must have finite ones")
        squares = _sum_of_squares(leaf.sizes, size, total) if size else 0.0
        sums = _Sums(sums.sizes + size, sums.squares + squares, sums.numbers + leaf.numbers)
    return sums


def _sum_of_squares(sizes: Any, size: float, total: Callable[[Any], float]) -> float:
    # Of shares: in float32, squares overflow from 2e19 on and vanish below 1e-23.
    shares = sizes / size
    return float(total(shares * shares)) * size * size


def _checked(strength: float, scale: float) -> float:
    try:
        core.validate(prior_strength=strength)
    except ValueError as error:
        unfit = f"gradients and a scale of {scale!r} give a prior_strength of {strength:.3g}"
        raise ValueError(f"{unfit}, but it must be a finite number >= 1e-30") from error
    return strength
