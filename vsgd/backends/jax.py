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
_compute_key = rounding.make_key(_OPS)
_compute_word = rounding.make_word(_OPS)
#: `to_bfloat16(value, word, multiplier)`: see `vsgd.rounding.make_round`.
to_bfloat16 = rounding.make_round(_OPS)


def make_words(seed: Any) -> Callable[[int, jax.Array, tuple[int, ...]], jax.Array]:
    """Return `compute_words(number, count, shape)`, which computes the random bits of a leaf's elements at a step.

    Args:
        seed: the user's seed, an integer or an array of one.
    """
    if isinstance(seed, Integral):
        base_key, seed = rounding.base_key, int(seed)
    else:  # `inject_hyperparams` makes it an array
        base_key, seed = rounding.make_base_key(_OPS), jnp.asarray(seed).astype(jnp.int32)

    def compute_words(number: int, count: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        indices = rounding.compute_indices(shape, functools.partial(jax.lax.broadcasted_iota, jnp.int32))
        return _compute_word(indices, _compute_key(base_key(seed, number), count))

    return compute_words
