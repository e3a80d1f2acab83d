"""Stochastic rounding of float32 to bfloat16, stated once for every array library.

A value goes to one of its two neighbours in bfloat16, to the nearer with the higher probability, so that its mean is kept: a
change too small for bfloat16 is made now and then, instead of never. Round-to-nearest would freeze the state of VSGD, whose
rates b change by less than a part in 512 once the steps are many.

The noise is a hash of (seed, array, step, element), not a sequence: the same on every engine, after a checkpoint is
loaded, and for an element wherever its shard lies.

An integer namespace `xp` has int32 arrays with operators but for shifts, which TensorFlow lacks, and

- `wrap(i)`: an integer modulo 2**32, as int32; the identity where the library's own int32 wraps around (`Wrapping`),
- `times(i, factor)`: `wrap(i * factor)`,
- `shift(i, places)`: an int32's bits moved down by so many places, at least one, zeros above,
- `bits(x)` and `floats(i)`: float32 seen as int32, and back,
- `where(condition, a, b)`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

#: An int32 array or scalar of any library.
Integer = Any
#: A float32 array or scalar of any library.
Float = Any

#: One for each array that may be rounded at a step: what turns an element's word into that array's noise. Odd numbers.
MULTIPLIERS = (1, 0x2C1B3C6D, 0x297A2D39, 0x21F0AAAD)


class Wrapping:
    """What the integer namespaces share whose library's own int32 wraps around."""

    @staticmethod
    def wrap(i: Integer) -> Integer:
        """An integer modulo 2**32."""
        return i

    @staticmethod
    def times(i: Integer, factor: int) -> Integer:
        """A product modulo 2**32."""
        return i * factor

    @staticmethod
    def shift(i: Integer, places: int) -> Integer:
        """The bits moved down by so many places, at least one."""
        # The mask makes a shift of a signed number one of an unsigned.
        return (i >> places) & (0xFFFFFFFF >> places)


class _Numbers(Wrapping):
    """The integer namespace of Python's integers (and of NumPy's int64 arrays), as far as keys need it."""

    @staticmethod
    def wrap(i: int) -> int:
        return (i + 2**31) % 2**32 - 2**31

    @staticmethod
    def times(i: int, factor: int) -> int:
        return _Numbers.wrap(i * factor)


def make_word(xp: Any) -> Callable[[Integer, Integer], Integer]:
    """Build `word(index, key) -> word`, 32 random bits for each element at one step.

    Args:
        xp: an integer namespace.

    Returns:
        A function of the elements' places in their array, int32, and of the key of the step.
    """

    # Wellons' lowbias32 (public domain), its second factor as a negative number, for int32 holds no other.
    def word(index: Integer, key: Integer) -> Integer:
        i = index ^ key
        i = xp.wrap(i ^ xp.shift(i, 16))
        i = xp.times(i, 0x7FEB352D)
        i = xp.wrap(i ^ xp.shift(i, 15))
        i = xp.times(i, -0x7B935975)
        return xp.wrap(i ^ xp.shift(i, 16))

    return word


def make_key(xp: Any) -> Callable[[Integer, Integer], Integer]:
    """Build `key(base, step) -> key`, an int32 scalar for one parameter at one step.

    Args:
        xp: an integer namespace.

    Returns:
        A function of `base_key(...)` and the parameter's count of steps, int32.
    """
    word = make_word(xp)

    def key(base: Integer, step: Integer) -> Integer:
        return word(xp.wrap(step + base), 0)

    return key


#: `key(base, step)` for Python's integers, and for int64 arrays.
host_key = make_key(_Numbers)


def make_base_key(xp: Any) -> Callable[[Integer, int], Integer]:
    """Build `base_key(seed, number) -> base`, which the keys of an array's steps are made of.

    Args:
        xp: an integer namespace.

    Returns:
        A function of the user's seed, and of which parameter it is, 0 for the first.

    Example:
        >>> base_key(0, 1) != base_key(1, 0)
        True
    """
    key = make_key(xp)

    def base_key(seed: Integer, number: int) -> Integer:
        return key(key(0, xp.wrap(seed)), number)

    return base_key


#: `base_key(seed, number)` for Python's integers, any of them, in the range of int32.
base_key = make_base_key(_Numbers)


def places(shape: Sequence[int], iota: Callable[[Sequence[int], int], Integer]) -> Integer:
    """Where the elements are in an array of a shape, in row-major order.

    From one range for each dimension, which a compiler makes on each device for its own shard, and not from one reshaped range,
    which it might first make whole on each of them.

    Args:
        shape: of the whole array.
        iota: `iota(shape, dimension)` gives the places along a dimension, int32, in a shape that broadcasts to `shape`.
    """
    result: Integer = 0
    for dimension, size in enumerate(shape):
        result = result * size + iota(shape, dimension)
    return result


def make_round(xp: Any) -> Callable[[Float, Integer, int], Float]:
    """Build `to_bfloat16(value, word, multiplier) -> value`, which keeps of a float32 what bfloat16 can hold.

    Args:
        xp: an integer namespace.

    Returns:
        A function of float32 values, their elements' words, and one of `MULTIPLIERS`. Its result is float32 and goes to
        bfloat16 without a further rounding. Infinities and NaN stay.
    """

    def to_bfloat16(value: Float, word: Integer, multiplier: int) -> Float:
        noise = xp.shift(xp.times(word, multiplier), 16)
        bits = xp.bits(value)
        # A NaN with all bits set would wrap around to a zero.
        noise = xp.where((bits & 0x7F800000) == 0x7F800000, 0, noise)
        return xp.floats(xp.wrap((bits + noise) & -0x10000))

    return to_bfloat16
