"""A prior in the units of a Keras model's gradients, on whichever backend Keras runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import keras
from keras import ops

from vsgd import prior

Gradients = Iterable[Any] | Mapping[Any, Any]


def prior_strength_from(gradients: Iterable[Gradients], scale: float = 10.0) -> float:
    """A `prior_strength` in the units of a model's gradients, to be taken before training: see `docs/tuning.md`.

    It is `5e-5 * scale` times the mean of the squares of all elements, over all variables and mini-batches together. So the
    first steps expect a variance of about `scale` times what a squared gradient is.

    The mini-batches are taken one after the other: a generator need not hold the gradients of more than one. Gradients are to
    be those that the optimizer will see, of the loss that is trained on, without Keras' loss scaling. How they are computed is
    the backend's: `tf.GradientTape`, `jax.grad` or `torch.autograd.grad`.

    Args:
        gradients: for each of a few mini-batches, 10 are advised, the gradients of the model's trainable variables, a list as
            for `optimizer.apply`, or a dict. None is left out, and a row that `tf.IndexedSlices` leaves out is zero.
        scale: the variance to start with, over the mean squared gradient. Larger starts slower, far smaller is unsafe.

    Returns:
        A number for `VSGD` or `ConstantVSGD`.

    Raises:
        ValueError: `scale` is out of its range; there are no gradients, all are zero, one is not finite or none of numbers; or
            they are so small or large that what would be returned is no prior strength.

    Example:
        >>> from keras import ops
        >>> from vsgd.keras import VSGD, prior_strength_from
        >>> batches = [[ops.array([3.0, -4.0]), ops.array([0.0])], [ops.array([0.0, 5.0]), None]]
        >>> strength = prior_strength_from(batches)
        >>> round(strength, 6)  # 5e-5 * 10 * (9 + 16 + 25) / 5
        0.005
        >>> optimizer = VSGD(prior_strength=strength)
    """
    return prior.prior_strength_from(gradients, scale, prior.of_list(_leaf), _total)


def _total(sizes: Any) -> float:
    return float(ops.convert_to_numpy(ops.sum(sizes)))


def _leaf(name: str, grad: Any) -> prior.Leaf:
    try:
        array = ops.stop_gradient(ops.convert_to_tensor(grad))
        dtype = keras.backend.standardize_dtype(array.dtype)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} is {type(grad).__name__}, but must be a tensor") from error
    if not dtype.startswith(("bfloat", "complex", "float")):
        raise ValueError(f"{name} is of {dtype}, but must be of floating or complex numbers")
    if dtype not in ("float64", "complex64", "complex128"):
        array = ops.cast(array, dtype := "float32")
    if hasattr(array, "dense_shape"):
        array = ops.add(ops.zeros(array.dense_shape, dtype), array)
    return prior.Leaf(name, ops.abs(array), int(ops.size(array)) * (2 if dtype.startswith("complex") else 1))
