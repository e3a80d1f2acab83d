"""A prior in the gradients' own units, computed from the gradients of a few mini-batches.

`prior_strength`, gamma, has the unit of a squared gradient, so a value that suits one loss does not suit a multiple of that
loss. A run starts with a posterior variance near `2 gamma / 1e-4`. The gamma computed here makes that variance `scale` times
the mean squared gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from vsgd import validation


class Gradient(NamedTuple):
    """One gradient of one mini-batch.

    Attributes:
        name: the gradient's name in errors.
        magnitudes: absolute values of its elements, an array of any library, float32 or wider.
        numbers: how many real numbers it has; a complex number counts as two.
    """

    name: str
    magnitudes: Any
    numbers: int


class _Sums(NamedTuple):
    """Sums over all elements so far: absolute values, squares, and the number of elements."""

    magnitudes: float
    squares: float
    numbers: int


def prior_strength_from(
    gradients: Iterable[Any],
    scale: float,
    iterate_leaves: Callable[[str, Any], Iterator[Gradient]],
    total: Callable[[Any], float],
) -> float:
    """Compute the prior strength, `5e-5 * scale` times the mean square of all gradient elements.

    The first steps of a run then expect a variance of about `scale` times a squared gradient. The mini-batches are taken one
    after the other, so a generator needs the memory of one.

    Args:
        gradients: the gradients of each mini-batch.
        scale: the variance at the start of the run over the mean squared gradient.
        iterate_leaves: a function that yields the leaves of one mini-batch, given its name and its gradients.
        total: a function that sums an array.

    Returns:
        A number for `prior_strength`.

    Raises:
        ValueError: `scale` is out of its range; the gradients are missing, all zero or not finite; or the result is not a
            valid prior strength.

    Example:
        >>> import numpy as np
        >>> def iterate_leaves(name, batch):
        ...     yield Gradient(name, abs(batch), batch.size)
        >>> round(prior_strength_from([np.array([3.0, -4.0]), np.array([0.0, 5.0])], 10.0, iterate_leaves, np.sum), 5)
        0.00625
    """
    validation.validate_numbers(scale=scale)
    if not isinstance(gradients, Iterable):
        raise ValueError(f"gradients is {type(gradients).__name__}, but must be an iterable over mini-batches")
    sums, number = _Sums(0.0, 0.0, 0), 0
    for batch in gradients:
        sums, number = _add(sums, iterate_leaves(f"gradients[{number}]", batch), total), number + 1
        del batch  # free it before the generator computes the next one
    if not sums.numbers:
        raise ValueError("gradients has no elements, but must have those of one mini-batch at least")
    if not sums.magnitudes:
        raise ValueError(f"gradients has {sums.numbers} elements, all zero, but must have some that are not")
    strength = 5e-5 * float(scale) * (sums.squares / sums.numbers)
    try:
        validation.validate_numbers(prior_strength=strength)
    except ValueError as error:
        unfit = f"gradients and a scale of {scale!r} give a prior_strength of {strength:.3g}"
        raise ValueError(f"{unfit}, but it must be a finite number >= 1e-30") from error
    return strength


def iterate_lists(make_leaf: Callable[[str, Any], Gradient]) -> Callable[[str, Any], Iterator[Gradient]]:
    """Return an `iterate_leaves` for mini-batches that are lists or dicts of gradients, in which None is skipped.

    Args:
        make_leaf: `make_leaf(name, grad)` returns the `Gradient` of one gradient, or raises a `ValueError` that names it.

    Returns:
        `iterate_leaves(name, batch)` for `prior_strength_from`. It raises a `ValueError` if the batch is neither list nor dict.
    """

    def iterate_leaves(name: str, batch: Any) -> Iterator[Gradient]:
        if not isinstance(batch, Iterable) or hasattr(batch, "shape"):
            raise ValueError(f"{name} is {type(batch).__name__}, but must be a list of gradients, one for each parameter")
        pairs = batch.items() if isinstance(batch, Mapping) else enumerate(batch)
        return (make_leaf(f"{name}[{key!r}]", grad) for key, grad in pairs if grad is not None)

    return iterate_leaves


def _add(sums: _Sums, leaves: Iterator[Gradient], total: Callable[[Any], float]) -> _Sums:
    for leaf in leaves:
        magnitude = float(total(leaf.magnitudes))
        if not math.isfinite(magnitude):
            raise ValueError(f"{leaf.name} has elements or a sum of {magnitude}, but must have finite ones")
        squares = 0.0
        if magnitude:
            # Squares of shares: in float32, squares of gradients overflow from 2e19 on and vanish below 1e-23.
            shares = leaf.magnitudes / magnitude
            squares = float(total(shares * shares)) * magnitude * magnitude
        sums = _Sums(sums.magnitudes + magnitude, sums.squares + squares, sums.numbers + leaf.numbers)
    return sums
