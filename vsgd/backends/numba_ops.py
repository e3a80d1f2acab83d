"""The core's operations for numba, on single numbers: `vsgd.ops.ArrayOps` and `vsgd.ops.BitOps` in one module."""

from __future__ import annotations

import numpy as np
from numba import types
from numba.extending import intrinsic, register_jitable
from numpy import maximum, minimum, sqrt

__all__ = [
    "OPTIONS",
    "inline",
    "maximum",
    "minimum",
    "multiply",
    "shift_right",
    "sqrt",
    "view_as_float32",
    "view_as_int32",
    "where",
    "wrap",
]

#: Compiler options. Never nnan or ninf: a NaN gradient must show.
OPTIONS = {"fastmath": {"contract", "arcp", "nsz"}, "error_model": "numpy"}

#: A decorator for functions that compiled functions call.
inline = register_jitable(**OPTIONS)


@intrinsic
def _view_as(typing_context, value, like):
    """Return the bits of a number as the dtype of the scalar `like`, which has the same size."""

    def codegen(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], context.get_value_type(like))

    return like(value, like), codegen


@intrinsic
def _multiply_int32(typing_context, a, b):
    """Return the 32-bit product of two int32. Numba's own has 64 bits, which vector units multiply slowly."""

    def codegen(context, builder, signature, arguments):
        return builder.mul(*arguments)

    return types.int32(types.int32, types.int32), codegen


@register_jitable
def wrap(i):
    """Return an integer modulo 2**32, as int32."""
    return np.int32(i)


@register_jitable
def multiply(i, factor):
    """Return a product modulo 2**32, as int32."""
    return _multiply_int32(np.int32(i), np.int32(factor))


@register_jitable
def shift_right(i, places):
    """Return the 32 bits moved down by at least one place, with zeros above."""
    return (i >> places) & (0xFFFFFFFF >> places)


@register_jitable
def view_as_int32(x):
    """Return the bits of a float32 as int32."""
    return _view_as(x, np.int32(0))


@register_jitable
def view_as_float32(i):
    """Return the bits of an int32 as float32."""
    return _view_as(i, np.float32(0))


@register_jitable
def where(condition, x, y):
    """Return `x` if the condition holds, else `y`."""
    return x if condition else y
