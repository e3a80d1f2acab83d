"""Stochastic rounding by JAX."""

from __future__ import annotations

import functools
from collections.abc import Callable
from numbers import Integral
from typing import Any

import jax
import jax.numpy as jnp

from vsgd import rounding
from vsgd.ops import BitOps


class _JaxIntegers(BitOps):
    def view_as_int32(self, x: jax.Array) -> jax.Array:
        return jax.lax.bitcast_convert_type(x, jnp.int32)

    def view_as_float32(self, i: jax.Array) -> jax.Array:
        return jax.lax.bitcast_convert_type(i, jnp.float32)

    def where(self, condition: jax.Array, x: Any, y: Any) -> jax.Array:
        return jnp.where(condition, x, y)


_OPS = _JaxIntegers()
_compute_step_key = rounding.make_key(_OPS)
_compute_word = rounding.make_word(_OPS)
#: `to_bfloat16(value, word, multiplier)`: see `vsgd.rounding.make_round`.
to_bfloat16 = rounding.make_round(_OPS)


def make_key(seed: Any) -> Callable[[int, jax.Array], jax.Array]:
    """Return `compute_key(number, count)`, which computes the key of a leaf at a step.

    Args:
        seed: the user's seed, an integer or an array of one.
    """
    if isinstance(seed, Integral):
        base_key, seed = rounding.base_key, int(seed)
    else:  # `inject_hyperparams` makes it an array
        base_key, seed = rounding.make_base_key(_OPS), jnp.asarray(seed).astype(jnp.int32)
    return lambda number, count: _compute_step_key(base_key(seed, number), count)


def list_varying_axes(value: Any) -> frozenset[str]:
    """Return the axes of `jax.shard_map` over which an abstract value varies, as far as JAX tracks that."""
    # Newer versions of JAX keep it with more that concerns manual axes.
    return frozenset(getattr(getattr(value, "manual_axis_type", None), "varying", getattr(value, "vma", ())))


def vary_over(value: Any, axes: frozenset[str]) -> Any:
    """Return an abstract value that varies over these axes."""
    if not axes:
        return value
    if hasattr(value, "manual_axis_type"):
        return value.update(manual_axis_type=value.manual_axis_type.update(varying=axes))
    return value.update(vma=axes)


def compute_words(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Return the random bits of the elements of an array of this shape.

    Args:
        key: the key of the array and the step; one for each array, if it has dimensions in front of those of the shape.
        shape: the array's shape.
    """
    return _compute_word(rounding.compute_indices(shape, functools.partial(jax.lax.broadcasted_iota, jnp.int32)), key)
