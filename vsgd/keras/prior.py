"""A prior in the units of a Keras model's gradients, on any Keras backend."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import keras
from keras import ops

from vsgd import prior
from vsgd.validation import document_options

Gradients = Iterable[Any] | Mapping[Any, Any]


@document_options()
def prior_strength_from(gradients: Iterable[Gradients], scale: float = 10.0) -> float:
    """Compute a `prior_strength` in the units of a model's gradients, before training: see `docs/calibration.md`.

    The result is `5e-5 * scale` times the mean square of all gradient elements, over all variables and mini-batches. Pass the
    gradients that the optimizer will see: those of the training loss, without Keras' loss scaling. Compute them by the backend:
    `tf.GradientTape`, `jax.grad` or `torch.autograd.grad`.

    Args:
        gradients: for each of a few mini-batches, about 10, the gradients of the model's trainable variables: a list as for
            `optimizer.apply`, or a dict. None is skipped. Rows that `tf.IndexedSlices` leave out count as zero.
        scale: {scale}

    Returns:
        A number for `prior_strength`.

    Raises:
        ValueError: `scale` is out of its range; the gradients are missing, all zero, not finite or not of numbers; or the
            result is not a valid prior strength.

    Example:
        >>> from keras import ops
        >>> from vsgd.keras import VSGD, prior_strength_from
        >>> batches = [[ops.array([3.0, -4.0]), ops.array([0.0])], [ops.array([0.0, 5.0]), None]]
        >>> strength = prior_strength_from(batches)
        >>> round(strength, 6)  # 5e-5 * 10 * (9 + 16 + 25) / 5
        0.005
        >>> optimizer = VSGD(prior_strength=strength)
    """
    return prior.prior_strength_from(
        gradients,
        scale,
        prior.iterate_lists(_make_leaf),
        lambda magnitudes: float(ops.convert_to_numpy(ops.sum(magnitudes))),
    )


def _make_leaf(name: str, grad: Any) -> prior.Gradient:
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
    return prior.Gradient(name, ops.abs(array), int(ops.size(array)) * (2 if dtype.startswith("complex") else 1))
