"""JAX numbers in the form that the core takes: real arrays in float32 or wider, hyperparameters in the arrays' dtype."""

from __future__ import annotations

from collections.abc import Iterable
from numbers import Real
from typing import Any

import jax
import jax.numpy as jnp

from vsgd.backends.jax import list_varying_axes


def split_complex(array: jax.Array) -> tuple[jax.Array, ...]:
    """Return the real arrays that an update takes: two for a complex array, else the array itself."""
    return (jnp.real(array), jnp.imag(array)) if jnp.iscomplexobj(array) else (array,)


def join_complex(*parts: jax.Array) -> jax.Array:
    """Return the array of these parts, the inverse of `split_complex`."""
    return jax.lax.complex(*parts) if len(parts) == 2 else parts[0]


def choose_arithmetic_dtype(dtype: Any) -> Any:
    """Return the dtype of the arithmetic: float32 or wider, as half precision holds neither b_g nor its small changes."""
    # Not `promote_types`, which has no common type for float32 and the 8-bit floats.
    double = jnp.issubdtype(dtype, jnp.inexact) and jnp.finfo(dtype).bits == 64
    if jnp.issubdtype(dtype, jnp.complexfloating):
        return jnp.dtype(jnp.complex128 if double else jnp.complex64)
    return jnp.dtype(jnp.float64 if double else jnp.float32)


def get_dtype(array: Any) -> Any:
    """Return the dtype of an array, of a description of an array, or of a number."""
    return array.dtype if hasattr(array, "dtype") else jnp.result_type(array)


def cast_hyperparameters(hyper: Any, dtype: Any) -> Any:
    """Return hyperparameters whose arrays have the dtype of the arithmetic; Python numbers adopt it by themselves."""
    return hyper._replace(
        **{
            name: _cast(name, value, dtype)
            for name, value in hyper._asdict().items()
            if not (value is None or isinstance(value, Real))
        }
    )


def _cast(name: str, value: Any, dtype: Any) -> jax.Array:
    value = jnp.real(jnp.asarray(value))
    if name == "prior_strength" and value.dtype == jnp.float16:
        # `inject_hyperparams` rounds to the parameters' dtype: 1e-8 becomes 0, which would make everything NaN.
        return jnp.maximum(value.astype(dtype), float(jnp.finfo(value.dtype).smallest_subnormal))
    return value.astype(dtype)


def check_tracking() -> None:
    """Check that JAX tracks, inside `jax.shard_map`, over which axes an array varies.

    Raises:
        ValueError: it does not, with `check_vma=False` or in an old version.
    """
    mesh = getattr(jax.sharding, "get_abstract_mesh", lambda: None)()
    for axis in getattr(mesh, "manual_axes", ()):
        # Where it is tracked, the index of a device varies.
        if axis not in list_varying_axes(jax.typeof(jax.lax.axis_index(axis))):
            raise ValueError(
                "prior_strength is 'auto', but inside shard_map with check_vma=False the gradient cannot be measured over all "
                "devices: leave check_vma on, or compute a number with prior_strength_from"
            )


def check_gradient(name: str, path: Any, grad: Any, arrays: Iterable[Any]) -> None:
    """Check that a gradient in the argument `name` fits the state's arrays.

    Raises:
        ValueError: its shape or dtype does not fit.
    """
    where = f" at {jax.tree_util.keystr(path)}" if path else ""
    shapes = {jnp.shape(array) for array in arrays}
    if shapes != {jnp.shape(grad)}:  # it would broadcast
        raise ValueError(f"state has arrays of shapes {sorted(shapes)}{where}, but {name} has {jnp.shape(grad)}")
    if not jnp.issubdtype(get_dtype(grad), jnp.inexact):
        raise ValueError(f"{name} has an array of {get_dtype(grad)}{where}, but must have floating or complex numbers")
