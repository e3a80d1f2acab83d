"""The array operations that the core runs on.

A backend passes an object or a module that implements one of these protocols. `numpy`, `torch`, `jax.numpy`, `mlx.core` and
`keras.ops` implement `ArrayOps` as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

_Function = TypeVar("_Function", bound=Callable[..., Any])


class Array(Protocol):
    """An array, a scalar or a list of arrays, with elementwise arithmetic that keeps its dtype next to Python numbers."""

    def __add__(self, other: Any, /) -> Any:
        """Return `self + other`."""

    def __radd__(self, other: Any, /) -> Any:
        """Return `other + self`."""

    def __sub__(self, other: Any, /) -> Any:
        """Return `self - other`."""

    def __rsub__(self, other: Any, /) -> Any:
        """Return `other - self`."""

    def __mul__(self, other: Any, /) -> Any:
        """Return `self * other`."""

    def __rmul__(self, other: Any, /) -> Any:
        """Return `other * self`."""

    def __truediv__(self, other: Any, /) -> Any:
        """Return `self / other`."""


class ArrayOps(Protocol):
    """The functions that `rule.make_update` needs in addition to the operators of `Array`."""

    def sqrt(self, x: Any, /) -> Any:
        """Return the square root of each element."""

    def minimum(self, x: Any, y: Any, /) -> Any:
        """Return the smaller element of each pair, NaN where one is NaN. Only `vsgd.outliers` calls it."""

    def maximum(self, x: Any, y: Any, /) -> Any:
        """Return the larger element of each pair, NaN where one is NaN. Only `vsgd.outliers` calls it."""


class IntegerOps(Protocol):
    """Arithmetic modulo 2**32 on int32, for the random numbers of `vsgd.rounding`.

    Integers also have the operators `+`, `^` and `&`. The default methods suit a library whose int32 wraps around.
    """

    def wrap(self, i: Any, /) -> Any:
        """Return an integer modulo 2**32, as int32."""
        return i

    def multiply(self, i: Any, factor: int, /) -> Any:
        """Return `wrap(i * factor)`."""
        return i * factor

    def shift_right(self, i: Any, places: int, /) -> Any:
        """Return the 32 bits moved down by at least one place, with zeros above."""
        # The mask turns the arithmetic shift of a signed integer into a logical one.
        return (i >> places) & (0xFFFFFFFF >> places)


class BitOps(IntegerOps, Protocol):
    """The functions that `vsgd.rounding` needs to round float32 to bfloat16."""

    def view_as_int32(self, x: Any, /) -> Any:
        """Return the bits of a float32 as int32."""

    def view_as_float32(self, i: Any, /) -> Any:
        """Return the bits of an int32 as float32."""

    def where(self, condition: Any, x: Any, y: Any, /) -> Any:
        """Return `x` where the condition holds, else `y`."""


def inline_function(xp: ArrayOps, function: _Function) -> _Function:
    """Return `function` in the form in which an update over `xp` can call it.

    A compiler such as numba cannot call plain Python from compiled code; its operations have an attribute `inline`, a
    decorator.

    Args:
        xp: the operations of the update.
        function: a function on arrays.
    """
    decorate: Callable[[_Function], _Function] | None = getattr(xp, "inline", None)
    return function if decorate is None else decorate(function)
