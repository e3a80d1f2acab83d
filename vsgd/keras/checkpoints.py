"""Arrays on their way into a Keras optimizer's variables: all are checked before one is assigned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
from keras import ops


def assign_all(variables: Sequence[Any], where: str, values: Sequence[Any]) -> None:
    """Assign a value to each variable, or to none.

    Args:
        variables: the optimizer's.
        where: what the values are called in errors.
        values: arrays, one for each variable.

    Raises:
        ValueError: a value does not fit its variable.
    """
    pairs = list(zip(variables, values, strict=True))
    arrays = [_checked(f"{where}[{number}]", variable, value) for number, (variable, value) in enumerate(pairs)]
    for variable, array in zip(variables, arrays, strict=True):
        variable.assign(array)


def _checked(what: str, variable: Any, value: Any) -> Any:
    """A value that is to be assigned, as an array of the backend's in the variable's dtype."""
    try:
        array = keras.ops.convert_to_numpy(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{what} is {type(value).__name__}, but must be an array") from error
    if array.shape != tuple(variable.shape):
        raise ValueError(f"{what} has shape {array.shape}, but {variable.path} has {tuple(variable.shape)}")
    is_complex = keras.backend.standardize_dtype(variable.dtype).startswith("complex")
    # Of the name: bfloat16 is of no kind.
    if not any(kind in array.dtype.name for kind in ("float", "int", *(["complex"] if is_complex else []))):
        raise ValueError(f"{what} is of {array.dtype}, but must be of numbers that fit {variable.path} of {variable.dtype}")
    return ops.convert_to_tensor(array, dtype=variable.dtype)
