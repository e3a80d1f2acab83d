"""What a suite is: competitors that step the same parameters in one framework, and what is measured of them."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Protocol

from benchmarks.shapes import Shape
from reporting.machine import count_processors, describe_environment

LEARNING_RATE = 1e-4
#: The same for every competitor that decays weights apart from the gradient, for it may cost a pass over them.
WEIGHT_DECAY = 0.01
#: Stands among a competitor's needs for a C++ compiler.
COMPILER = "C++ compiler"


class Arm(Protocol):
    """An optimizer with its state, on the parameters of a problem."""

    def step(self, count: int) -> None:
        """Take so many steps and wait for their end."""

    def measure_state(self) -> list[tuple[int, int]]:
        """The number of elements and of bytes of each array of state."""

    def measure_transient_bytes(self) -> int | None:
        """Memory that a step takes beyond what lives before it; None where it cannot be told."""


class Memory(Protocol):
    """What moves memory, to tell how fast that can be."""

    moved: int

    def step(self, count: int) -> None:
        """Move `moved` bytes so many times and wait for the end."""


class Problem(Protocol):
    """Parameters of a shape, with gradients, which all competitors step in turn."""

    def flip_gradients(self) -> None:
        """Change the gradients, all to their opposite: constant ones would leave nothing to filter."""

    def make_memory(self, size: int) -> Memory:
        """Arrays of so many bytes together, to be moved where the parameters are."""


@dataclass(frozen=True)
class Competitor:
    """One row of a suite.

    Attributes:
        make: makes the optimizer's arm on a problem.
        needs: packages without which it sits out, or COMPILER.
        devices: on which it runs.
        plotted: whether it is in the plots.
    """

    make: Callable[[Any], Arm]
    needs: tuple[str, ...] = ()
    devices: tuple[str, ...] = ("cpu", "cuda")
    plotted: bool = False

    def find_missing(self, device: str) -> list[str]:
        """What it lacks here."""
        lacks = [need for need in self.needs if not _is_available(need)]
        return lacks if device in self.devices else [*lacks, f"not on {device}"]


def _is_available(need: str) -> bool:
    if need == COMPILER:
        return any(map(shutil.which, ("c++", "g++", "clang++")))
    return find_spec(need) is not None


@dataclass(frozen=True)
class Suite:
    """Competitors that are compared with each other.

    Attributes:
        title: what is measured, in a few words.
        baselines: the competitors that the others are told in ratios to.
        competitors: all, by name.
        problem: makes the parameters of a shape on a device.
        packages: distributions whose versions count, where they are installed.
        imports: modules whose import is timed, and for each the modules that a user has anyway.
        memory: how transient memory is measured.
        threads: tells how many the framework uses.
        gpu: tells the GPU's name.
    """

    title: str
    baselines: tuple[str, ...]
    competitors: Mapping[str, Competitor]
    make_problem: Callable[[Shape, str], Problem]
    packages: tuple[str, ...]
    imports: Mapping[str, tuple[str, ...]]
    memory: str
    count_threads: Callable[[], int] = count_processors
    find_gpu: Callable[[], str | None] = lambda: None

    def describe_environment(self, device: str) -> dict[str, Any]:
        """The machine and the versions."""
        return describe_environment(self.packages, self.count_threads(), None if device == "cpu" else self.find_gpu())


def compute_state_bytes(arm: Arm, shape: Shape) -> float:
    """All of an optimizer's state, shared out among the parameters."""
    return sum(size for _, size in arm.measure_state()) / shape.parameters


def compute_traffic_bytes(arm: Arm, shape: Shape) -> int:
    """The bytes that a step on float32 parameters must move: read the gradient, read and write the parameter and its state.

    Of the state, only arrays as large as a parameter count: a count of steps stays in the processor's caches.
    """
    least = min(map(math.prod, shape.tensors))
    state = sum(size for elements, size in arm.measure_state() if elements >= least)
    return (4 + 2 * 4) * shape.parameters + 2 * state
