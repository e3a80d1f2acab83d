"""Stochastic rounding by JAX."""

from __future__ import annotations

import functools
from collections.abc import Callable
from numbers import Integral
from typing import Any

import jax
import jax.numpy as jnp

from vsgd import rounding


class _Integers(rounding.Wrapping):
    """JAX's integer namespace, as `vsgd.rounding` wants one."""

    where = staticmethod(jnp.where)

    @staticmethod
    def bits(x: jax.Array) -> jax.Array:
        return jax.lax.bitcast_convert_type(x, jnp.int32)

    @staticmethod
    def floats(i: jax.Array) -> jax.Array:
        return jax.lax.bitcast_convert_type(i, jnp.float32)


_make_key = rounding.make_key(_Integers)
_make_word = rounding.make_word(_Integers)
to_bfloat16 = rounding.make_round(_Integers)


def make_words(seed: Any) -> Callable[[int, jax.Array, tuple[int, ...]], jax.Array]:
    """Build `words(number, count, shape)`, the random bits of a leaf's elements at a step."""
    if isinstance(seed, Integral):
        base_key, seed = rounding.base_key, int(seed)
    else:  # an array, as `inject_hyperparams` makes of it
        base_key, seed = rounding.make_base_key(_Integers), jnp.asarray(seed).astype(jnp.int32)

    def words(number: int, count: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        places = rounding.places(shape, functools.partial(jax.lax.broadcasted_iota, jnp.int32))
        return _make_word(places, _make_key(base_key(seed, number), count))

    return words
