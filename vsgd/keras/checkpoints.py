"""Check arrays before a Keras optimizer assigns any of them to its variables, and gradients before it takes a step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from vsgd.backends.keras import split_complex


def assign_all(variables: Sequence[Any], positive: Sequence[Any], argument: str, values: Sequence[Any]) -> None:
    """Assign a value to each variable, or to none.

    Args:
        variables: the optimizer's variables.
        positive: those whose values are above zero.
        argument: the name of the values in errors.
        values: arrays, one for each variable.

    Raises:
        ValueError: a value does not fit its variable. Nothing has changed.
    """
    pairs = list(zip(variables, values, strict=True))
    arrays = [_convert(f"{argument}[{number}]", variable, value) for number, (variable, value) in enumerate(pairs)]
    checked = {*map(id, positive)}
    for number, (variable, array) in enumerate(zip(variables, arrays, strict=True)):
        if id(variable) in checked and any(bool(ops.any(part <= 0)) for part in split_complex(array)):
            raise ValueError(f"{argument}[{number}] has numbers <= 0, but {variable.path} must be above zero")
    for variable, array in zip(variables, arrays, strict=True):
        variable.assign(array)


def _convert(name: str, variable: Any, value: Any) -> Any:
    """Return a value as an array of the backend in the variable's dtype, or raise an error if it does not fit."""
    try:
        array = keras.ops.convert_to_numpy(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} is {type(value).__name__}, but must be an array") from error
    if array.shape != tuple(variable.shape):
        raise ValueError(f"{name} has shape {array.shape}, but {variable.path} has {tuple(variable.shape)}")
    is_complex = keras.backend.standardize_dtype(variable.dtype).startswith("complex")
    # By name, because NumPy gives bfloat16 no kind.
    if not any(word in array.dtype.name for word in ("float", "int", *(["complex"] if is_complex else []))):
        raise ValueError(f"{name} is of {array.dtype}, but must be of numbers that fit {variable.path} of {variable.dtype}")
    return ops.convert_to_tensor(array, dtype=variable.dtype)


def check_dtype(variable: Any) -> None:
    """Check that a variable has floating or complex numbers: others would be cut to integers at each step.

    Raises:
        ValueError: it has other numbers.
    """
    dtype = keras.backend.standardize_dtype(variable.dtype)
    if not dtype.startswith(("float", "bfloat", "complex")):
        raise ValueError(f"variable {get_name(variable)} is of {dtype}, but must be of floating or complex numbers")


def check_shapes(grads: Sequence[Any], variables: Sequence[Any]) -> None:
    """Check that each gradient has the shape of its variable.

    Raises:
        ValueError: a gradient has another shape, which would broadcast.
    """
    for grad, variable in zip(grads, variables, strict=False):  # the base class compares their numbers
        if grad is None:
            continue
        # A shape of TensorFlow may be partly unknown.
        knows_part = hasattr(grad.shape, "is_compatible_with")
        fits = grad.shape.is_compatible_with(variable.shape) if knows_part else tuple(grad.shape) == tuple(variable.shape)
        if not fits:
            shapes = f"has shape {tuple(grad.shape)}, but must have {tuple(variable.shape)}"
            raise ValueError(f"the gradient of {get_name(variable)} {shapes}")


def get_name(variable: Any) -> str:
    """Return a variable's name for an error."""
    return getattr(variable, "path", getattr(variable, "name", type(variable).__name__))
