"""Numbers of JAX as the core takes them: real, and float32 at least."""

from __future__ import annotations

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
