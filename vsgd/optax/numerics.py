"""Numbers of JAX as the core takes them: arrays real and float32 at least, hyperparameters in the arithmetic's dtype."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from numbers import Real
from typing import Any

import jax
import jax.numpy as jnp


def parts(array: jax.Array) -> tuple[jax.Array, ...]:
    """The real arrays that are updated: a complex one is two."""
    return (jnp.real(array), jnp.imag(array)) if jnp.iscomplexobj(array) else (array,)


def join(*parts: jax.Array) -> jax.Array:
    """The array of these parts."""
    return jax.lax.complex(*parts) if len(parts) == 2 else parts[0]


def arithmetic_dtype(dtype: Any) -> Any:
    """Half precision holds neither b_g (it falls to 1e-8) nor its small changes: the arithmetic is in float32 or more."""
    # Not `promote_types`, which knows no common type of float32 and the 8-bit floats.
    double = jnp.issubdtype(dtype, jnp.inexact) and jnp.finfo(dtype).bits == 64
    if jnp.issubdtype(dtype, jnp.complexfloating):
        return jnp.dtype(jnp.complex128 if double else jnp.complex64)
    return jnp.dtype(jnp.float64 if double else jnp.float32)


def dtype_of(array: Any) -> Any:
    """The dtype of an array, of what only describes one, or of a number."""
    return array.dtype if hasattr(array, "dtype") else jnp.result_type(array)


def weakly_typed(*values: Any) -> tuple[Any, ...]:
    """Numbers as Python's own floats, which take on an array's dtype; NumPy's would widen it, and a large integer overflow."""
    return tuple(float(value) if isinstance(value, Real) and _is_foreign(value) else value for value in values)


def _is_foreign(value: Any) -> bool:
    return hasattr(value, "dtype") or (isinstance(value, int) and 2**31 <= abs(value) <= sys.float_info.max)


def in_dtype(hyper: Any, dtype: Any) -> Any:
    """Hyperparameters that are arrays in the dtype of the arithmetic; numbers take it on by themselves."""
    return hyper._replace(
        **{
            name: _array_in_dtype(name, value, dtype)
            for name, value in hyper._asdict().items()
            if not (value is None or isinstance(value, Real))
        }
    )


def _array_in_dtype(name: str, value: Any, dtype: Any) -> jax.Array:
    value = jnp.asarray(value)
    if name == "prior_strength" and value.dtype == jnp.float16:
        # `inject_hyperparams` rounds to the parameters' dtype: 1e-8 to 0, at which all is NaN.
        return jnp.maximum(value.astype(dtype), float(jnp.finfo(value.dtype).smallest_subnormal))
    return value.astype(dtype)


def check_gradient(name: str, path: Any, grad: Any, arrays: Iterable[Any]) -> None:
    """Check that a gradient of the argument of this name fits the state's arrays.

    Raises:
        ValueError: it does not.
    """
    where = f" at {jax.tree_util.keystr(path)}" if path else ""
    shapes = {jnp.shape(array) for array in arrays}
    if shapes != {jnp.shape(grad)}:  # it would broadcast
        raise ValueError(f"state has arrays of shapes {sorted(shapes)}{where}, but {name} has {jnp.shape(grad)}")
    if not jnp.issubdtype(dtype_of(grad), jnp.inexact):
        raise ValueError(f"{name} has an array of {dtype_of(grad)}{where}, but must have floating or complex numbers")
