"""Stochastic rounding of float32 to bfloat16, written once for all array libraries.

A value is rounded to one of its two neighbours in bfloat16, to the nearer one with the higher probability, so that the mean
is kept. A change too small for bfloat16 then happens sometimes, instead of never. Rounding to the nearest would freeze the
state of VSGD, whose rates b change by less than a part in 512 after many steps.

The random bits are a hash of (seed, array, step, element), not a sequence: they are the same on every engine, after a
checkpoint is loaded, and for an element in any shard.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from vsgd.ops import BitOps, IntegerOps

#: An int32 array or scalar of any library.
Integer = Any
#: A float32 array or scalar of any library.
Float = Any

#: Odd factors, one for each array that a step may round: an element's word times the factor gives that array's random bits.
MULTIPLIERS = (1, 0x2C1B3C6D, 0x297A2D39, 0x21F0AAAD)


class _PythonIntegers(IntegerOps):
    """Operations of Python's integers and NumPy's int64 arrays, which do not wrap around."""

    def wrap(self, i: int) -> int:
        return (i + 2**31) % 2**32 - 2**31

    def multiply(self, i: int, factor: int) -> int:
        return self.wrap(i * factor)


def make_word(xp: IntegerOps) -> Callable[[Integer, Integer], Integer]:
    """Return `word(index, key) -> word`, which computes 32 random bits for each element at one step.

    Args:
        xp: the integer operations.

    Returns:
        A function of the elements' indices in their array, int32, and of the key of the step.
    """

    # Wellons' lowbias32 (public domain). The second factor is written as a negative number to fit into int32.
    def word(index: Integer, key: Integer) -> Integer:
        i = index ^ key
        i = xp.wrap(i ^ xp.shift_right(i, 16))
        i = xp.multiply(i, 0x7FEB352D)
        i = xp.wrap(i ^ xp.shift_right(i, 15))
        i = xp.multiply(i, -0x7B935975)
        return xp.wrap(i ^ xp.shift_right(i, 16))

    return word


def make_key(xp: IntegerOps) -> Callable[[Integer, Integer], Integer]:
    """Return `key(base, step) -> key`, which computes an int32 scalar for one parameter at one step.

    Args:
        xp: the integer operations.

    Returns:
        A function of `base_key(...)` and the parameter's step count, int32.
    """
    word = make_word(xp)

    def key(base: Integer, step: Integer) -> Integer:
        return word(xp.wrap(step + base), 0)

    return key


#: `key(base, step)` for Python's integers and for int64 arrays.
host_key = make_key(_PythonIntegers())


def make_base_key(xp: IntegerOps) -> Callable[[Integer, int], Integer]:
    """Return `base_key(seed, number) -> base`, which computes the base of the keys of one parameter's steps.

    Args:
        xp: the integer operations.

    Returns:
        A function of the user's seed and of the parameter's index in the optimizer.

    Example:
        >>> base_key(0, 1) != base_key(1, 0)
        True
    """
    key = make_key(xp)

    def base_key(seed: Integer, number: int) -> Integer:
        return key(key(0, xp.wrap(seed)), number)

    return base_key


#: `base_key(seed, number)` for Python's integers of any size, as int32.
base_key = make_base_key(_PythonIntegers())


def compute_indices(shape: Sequence[int], iota: Callable[[Sequence[int], int], Integer]) -> Integer:
    """Return each element's index in row-major order.

    The indices come from one range per dimension. A compiler makes such ranges on each device for its own shard, whereas it
    might make one reshaped range whole on every device.

    Args:
        shape: the shape of the whole array.
        iota: `iota(shape, dimension)` returns the indices along a dimension, int32, in a shape that broadcasts to `shape`.
    """
    indices: Integer = 0
    for dimension, size in enumerate(shape):
        indices = indices * size + iota(shape, dimension)
    return indices


def make_round(xp: BitOps) -> Callable[[Float, Integer, int], Float]:
    """Return `to_bfloat16(value, word, multiplier) -> value`, which rounds a float32 to a value that bfloat16 holds exactly.

    Args:
        xp: the integer operations.

    Returns:
        A function of float32 values, their elements' words, and one of `MULTIPLIERS`. Its result is float32. Infinities and NaN
        stay.
    """

    def to_bfloat16(value: Float, word: Integer, multiplier: int) -> Float:
        noise = xp.shift_right(xp.multiply(word, multiplier), 16)
        bits = xp.view_as_int32(value)
        # A NaN with all bits set would wrap around to zero.
        noise = xp.where((bits & 0x7F800000) == 0x7F800000, 0, noise)
        return xp.view_as_float32(xp.wrap((bits + noise) & -0x10000))

    return to_bfloat16
