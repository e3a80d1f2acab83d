"""Numba's array and integer namespaces, for the update and for `vsgd.rounding`: each function on one number, inlined."""

from __future__ import annotations

import numpy as np
from numba import types
from numba.extending import intrinsic, register_jitable
from numpy import maximum, minimum, sqrt

from vsgd import rounding

__all__ = ["OPTIONS", "bits", "floats", "inline", "maximum", "minimum", "shift", "sqrt", "times", "where", "wrap"]

#: What functions are compiled with. Never nnan or ninf: a NaN gradient must show.
OPTIONS = {"fastmath": {"contract", "arcp", "nsz"}, "error_model": "numpy"}

#: Makes a function one that a compiled function may call.
inline = register_jitable(**OPTIONS)


@intrinsic
def _seen_as(typing_context, value, like):
    """The bits of a number as one of the dtype of the scalar `like`, of the same size."""

    def codegen(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], context.get_value_type(like))

    return like(value, like), codegen


@intrinsic
def _product(typing_context, a, b):
    """The product of two int32 in 32 bits: numba's own has 64, which no vector unit multiplies fast."""

    def codegen(context, builder, signature, arguments):
        return builder.mul(*arguments)

    return types.int32(types.int32, types.int32), codegen


@register_jitable
def times(i, factor):
    """A product modulo 2**32, as int32."""
    return _product(np.int32(i), np.int32(factor))


@register_jitable
def wrap(i):
    """An integer modulo 2**32, as int32."""
    return np.int32(i)


#: The bits moved down by so many places, at least one.
shift = register_jitable(rounding.Wrapping.shift)


@register_jitable
def bits(x):
    """A float32 seen as int32."""
    return _seen_as(x, np.int32(0))


@register_jitable
def floats(i):
    """An int32 seen as float32."""
    return _seen_as(i, np.float32(0))


@register_jitable
def where(condition, a, b):
    """One of two numbers."""
    return a if condition else b
