"""Arrays at raw addresses for functions that numba compiles: their elements, and the cache of the compiled code.

NumPy lacks bfloat16: arrays of it are uint16, the upper halves of float32 numbers.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from numba import types
from numba.extending import intrinsic, overload

from vsgd import rounding
from vsgd.backends import kernels, numba_ops
from vsgd.backends.numba_ops import OPTIONS, inline

if numba.config.DISABLE_JIT:
    raise ImportError("vsgd's fused kernel needs numba's compiler, which NUMBA_DISABLE_JIT turns off")

#: A hash of all that a kernel is compiled from, except its own module.
SOURCES = kernels.hash_sources(numba_ops, sys.modules[__name__])

#: `compute_word(index, key)`: see `vsgd.rounding.make_word`.
compute_word = inline(rounding.make_word(numba_ops))
_to_bfloat16 = inline(rounding.make_round(numba_ops))


@intrinsic
def to_pointer(typing_context, address, like):
    """Return an integer address as a pointer to items of the dtype of the scalar `like`."""
    pointer = types.CPointer(like)

    def codegen(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], context.get_value_type(pointer))

    return pointer(address, like), codegen


def get_element(array, i):
    """Return element `i`, widened if it is bfloat16."""


@overload(get_element, jit_options=OPTIONS)
def _(array, i):
    if array.dtype is types.uint16:
        return lambda array, i: numba_ops.view_as_float32(np.int32(np.int32(array[i]) << 16))
    return lambda array, i: array[i]


def put_element(array, i, value, multiplier, word):
    """Set element `i`. bfloat16 is rounded with the noise `word * multiplier`, or to the nearest if `multiplier` is None."""


@overload(put_element, jit_options=OPTIONS)
def _(array, i, value, multiplier, word):
    if array.dtype is not types.uint16:

        def put_whole(array, i, value, multiplier, word):
            array[i] = value

        return put_whole
    if isinstance(multiplier, types.NoneType):

        def put_nearest(array, i, value, multiplier, word):
            # Less than half a unit goes down, more goes up, and exactly half goes to the even neighbour.
            half = np.int32(0x7FFF + ((numba_ops.view_as_int32(value) >> 16) & 1))
            rounded = _to_bfloat16(value, np.int32(half << 16), 1)
            array[i] = np.uint16(numba_ops.view_as_int32(rounded) >> 16)

        return put_nearest

    def put_at_random(array, i, value, multiplier, word):
        array[i] = np.uint16(numba_ops.view_as_int32(_to_bfloat16(value, word, multiplier)) >> 16)

    return put_at_random


# Numba has no typed loop over a tuple of arrays: these functions recurse at compile time.


def view_arrays(addresses, stored, tensor, start, size):
    """Return one array per role, of `size` elements from element `start` on.

    Args:
        addresses: a table with a row for each role and a column for each tensor, int64.
        stored: for each role a scalar of its dtype.
        tensor: the column.
        start: the index of the first element.
        size: the number of elements.
    """


@overload(view_arrays)
def _(addresses, stored, tensor, start, size):
    if len(stored) == 0:
        return lambda addresses, stored, tensor, start, size: ()
    itemsize, rest = stored[0].bitwidth // 8, len(stored)

    def views(addresses, stored, tensor, start, size):
        address = addresses[addresses.shape[0] - rest, tensor] + start * itemsize
        return (
            numba.carray(to_pointer(address, stored[0]), size),
            *view_arrays(addresses, stored[1:], tensor, start, size),
        )

    return views


def load_elements(arrays, i):
    """Return element `i` of each array."""


@overload(load_elements, jit_options=OPTIONS)
def _(arrays, i):
    if len(arrays) == 0:
        return lambda arrays, i: ()
    return lambda arrays, i: (get_element(arrays[0], i), *load_elements(arrays[1:], i))


def store_elements(arrays, i, values, multipliers, word):
    """Set element `i` of each array to its value."""


@overload(store_elements, jit_options=OPTIONS)
def _(arrays, i, values, multipliers, word):
    if len(arrays) == 0:
        return lambda arrays, i, values, multipliers, word: None

    def store(arrays, i, values, multipliers, word):
        put_element(arrays[0], i, values[0], multipliers[0], word)
        store_elements(arrays[1:], i, values[1:], multipliers[1:], word)

    return store


def compile_cached(decorate: Callable[..., Any], function: Callable[..., Any], **options: Any) -> Any:
    """Compile a function with numba's disk cache, or without it where none of the cache's folders is writeable.

    Args:
        decorate: `numba.njit`, or `numba.cfunc` with its signature.
        function: the function.
        **options: numba's options beyond `OPTIONS`.
    """
    try:
        return decorate(cache=True, **OPTIONS, **options)(function)
    except RuntimeError:
        return decorate(**OPTIONS, **options)(function)
