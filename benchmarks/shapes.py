"""The shapes of the parameters that are stepped."""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple


class Shape(NamedTuple):
    """Parameters by the shapes of their tensors.

    Attributes:
        name: as `parse` reads it.
        tensors: the shape of each tensor.
    """

    name: str
    tensors: tuple[tuple[int, ...], ...]

    @property
    def parameters(self) -> int:
        """How many numbers the tensors hold."""
        return sum(math.prod(tensor) for tensor in self.tensors)


def _convolutions() -> tuple[tuple[int, ...], ...]:
    """A residual network's: convolutions with the scale and bias of the norm that follows, and a head."""
    widths = (3, 64, 64, 128, 128, 256, 256, 512, 512, 512, 512)
    stages = [((3, 3, narrow, wide), (wide,), (wide,)) for narrow, wide in itertools.pairwise(widths)]
    return (*(tensor for stage in stages for tensor in stage), (512,), (512,), (512, 10), (10,))


NAMED = {
    "conv": Shape("conv", _convolutions()),
    "many": Shape("many", ((64,),) * 300),
    "large": Shape("large", ((4096, 4096),) * 4),
}

#: What is swept for the plots, and over which values.
SWEEPS = {
    "parameters": (10_000, 30_000, 100_000, 300_000, 1_000_000, 3_000_000, 10_000_000, 30_000_000, 100_000_000),
    "tensors": (1, 3, 10, 30, 100, 300, 1000, 3000),
}


def parse(text: str) -> list[Shape]:
    """The shapes that a word of the command line names.

    Args:
        text: a name ("conv"), a sweep ("parameters", "tensors"), or one point of it: "parameters=1000" for four square matrices
            of about so many numbers in all, "tensors=30" for so many vectors of 64.

    Raises:
        ValueError: it is none of these.
    """
    if text in NAMED:
        return [NAMED[text]]
    sweep, equals, number = text.partition("=")
    if sweep not in SWEEPS or (equals and not (number.isdecimal() and int(number))):
        raise ValueError(f"{text!r} is no shape; there are {', '.join((*NAMED, *SWEEPS))} and such as parameters=1000")
    values = (int(number),) if number else SWEEPS[sweep]
    return [_point(sweep, value) for value in values]


def _point(sweep: str, value: int) -> Shape:
    if sweep == "tensors":
        return Shape(f"tensors={value}", ((64,),) * value)
    side = round(math.sqrt(value / 4))
    return Shape(f"parameters={value}", ((side, side),) * 4)
