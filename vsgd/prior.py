"""A prior in the gradients' own units: computed from a few mini-batches before training, or from the first gradient of a run.

`prior_strength`, gamma, has the unit of a squared gradient, so a value that suits one loss does not suit a multiple of that
loss. A run starts with a posterior variance near `2 gamma / 1e-4`. `prior_strength_from` returns the gamma that makes this
variance `scale` times the mean squared gradient.

With `prior_strength="auto"` a run calibrates itself. Its unit is the root mean square of all elements of its first gradient.
Adapters divide gradients by the unit, so that state, prior and `eps` are in that unit, and nothing in the run depends on the
loss's scale. In gradients of any size that is the prior of `prior_strength_from(first_gradient)` with a `prior_shape` of 0.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from vsgd import validation

#: The `prior_strength` of a run that calibrates itself.
AUTO = "auto"
# The variance at the start of a run over the mean squared gradient, of "auto" and by default in `prior_strength_from`.
_SCALE = 10.0
# Half the offset of the shape (see `vsgd.core`): gamma over the variance at the start of a run.
_STRENGTH_PER_VARIANCE = 5e-5


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


def resolve_prior(options: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the options with numbers in place of "auto", for gradients in the run's unit.

    Args:
        options: options by name, at least `prior_strength` and `prior_shape`. They are not changed.

    Example:
        >>> resolve_prior({"prior_strength": "auto", "prior_shape": None})
        {'prior_strength': 0.0005, 'prior_shape': 0.0}
    """
    if not is_auto(options["prior_strength"]):
        return options
    shape = options["prior_shape"]
    return {**options, "prior_strength": _STRENGTH_PER_VARIANCE * _SCALE, "prior_shape": 0.0 if shape is None else shape}


def is_auto(prior_strength: Any) -> bool:
    """Return whether a run with this prior strength calibrates itself."""
    return isinstance(prior_strength, str) and prior_strength == AUTO


def _keep(value: Any) -> Any:
    return value


class Shards(NamedTuple):
    """Arrays of this process, and how to combine numbers of all processes that have a part of them.

    Attributes:
        arrays: real arrays; a complex array as two.
        widen: returns an array in float32 or wider.
        combine_largest: returns the largest of a 0-d array over all processes; of the number 0 on a process without elements.
        combine_sums: returns its sum over all processes.
    """

    arrays: Sequence[Any]
    widen: Callable[[Any], Any] = _keep
    combine_largest: Callable[[Any], Any] = _keep
    combine_sums: Callable[[Any], Any] = _keep

    def iterate(self) -> Iterator[Any]:
        """Yield the arrays that have elements, widened."""
        return (self.widen(array) for array in self.arrays if math.prod(array.shape))


def measure_unit(xp: Any, gradients: Sequence[Shards], numbers: Any) -> Any:
    """Return the root mean square of all elements of a gradient, or 0 if it is all zero or not finite.

    It scales exactly with the loss: if a power of two multiplies the loss, it also multiplies the result.

    Args:
        xp: `numpy`, `torch`, `jax.numpy`, `mlx.core` or `keras.ops`.
        gradients: all arrays of the gradient.
        numbers: how many numbers they have, over all processes.

    Returns:
        A 0-d array; a Python number if there is no element.

    Example:
        >>> import numpy as np
        >>> float(measure_unit(np, [Shards([np.array([1.0, -1.0]), np.array([5.0, 3.0])])], 4))
        3.0
        >>> float(measure_unit(np, [Shards([np.array([1.0, np.nan])])], 2))
        0.0
    """
    if not numbers:
        return 0.0
    maxima = (functools.reduce(xp.maximum, [xp.max(abs(array)) for array in each.iterate()] or [0.0]) for each in gradients)
    largest = functools.reduce(
        xp.maximum, [each.combine_largest(maximum) for each, maximum in zip(gradients, maxima, strict=True)]
    )
    # Squares of fractions: in float32, squares of gradients overflow from 2e19 on and vanish below 1e-23.
    fractions = ((array / largest for array in each.iterate()) for each in gradients)
    sums = (sum(xp.sum(part * part) for part in parts) for parts in fractions)
    total = sum(each.combine_sums(of_each) for each, of_each in zip(gradients, sums, strict=True))
    unit = largest * xp.sqrt(total / numbers)
    return xp.where((unit > 0) & (unit < math.inf), unit, 0.0)


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
    strength = _STRENGTH_PER_VARIANCE * float(scale) * (sums.squares / sums.numbers)
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
