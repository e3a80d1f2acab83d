"""Define the shapes of the parameters that the benchmarks step."""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple


class Shape(NamedTuple):
    """Parameters by the shapes of their tensors.

    Attributes:
        name: a word that `parse` reads.
        tensors: the shape of each tensor.
    """

    name: str
    tensors: tuple[tuple[int, ...], ...]

    @property
    def parameters(self) -> int:
        """The number of elements of all tensors."""
        return sum(math.prod(tensor) for tensor in self.tensors)


def _make_convolutions() -> tuple[tuple[int, ...], ...]:
    """Return the shapes of a residual network: convolutions, each with its norm's scale and bias, and a head."""
    widths = (3, 64, 64, 128, 128, 256, 256, 512, 512, 512, 512)
    stages = [((3, 3, narrow, wide), (wide,), (wide,)) for narrow, wide in itertools.pairwise(widths)]
    return (*(tensor for stage in stages for tensor in stage), (512,), (512,), (512, 10), (10,))


NAMED = {
    "conv": Shape("conv", _make_convolutions()),
    "many": Shape("many", ((64,),) * 300),
    "large": Shape("large", ((4096, 4096),) * 4),
}

#: The sweeps of the plots, and their values.
SWEEPS = {
    "parameters": (10_000, 30_000, 100_000, 300_000, 1_000_000, 3_000_000, 10_000_000, 30_000_000, 100_000_000),
    "tensors": (1, 3, 10, 30, 100, 300, 1000, 3000),
}


def parse(text: str) -> list[Shape]:
    """Return the shapes that a word of the command line names.

    Args:
        text: a name ("conv"), a sweep ("parameters", "tensors"), or one point of it: "parameters=1000" for four square matrices
            with about 1000 elements in total, "tensors=30" for 30 vectors of 64.

    Raises:
        ValueError: the word is not one of these.
    """
    if text in NAMED:
        return [NAMED[text]]
    sweep, equals, number = text.partition("=")
    if sweep not in SWEEPS or (equals and not (number.isdecimal() and int(number))):
        choices = ", ".join((*NAMED, *SWEEPS))
        raise ValueError(f"shape is {text!r}, but must be one of {choices}, or a point such as parameters=1000")
    values = (int(number),) if number else SWEEPS[sweep]
    return [_make_point(sweep, value) for value in values]


def _make_point(sweep: str, value: int) -> Shape:
    if sweep == "tensors":
        return Shape(f"tensors={value}", ((64,),) * value)
    side = round(math.sqrt(value / 4))
    return Shape(f"parameters={value}", ((side, side),) * 4)
