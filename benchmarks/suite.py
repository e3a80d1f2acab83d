"""Define suites: competitors that step the same parameters in one framework."""

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
#: Of every competitor with decoupled weight decay, because the decay may need another pass over the parameters.
WEIGHT_DECAY = 0.01
#: A competitor's need for a C++ compiler, among its packages.
COMPILER = "C++ compiler"


class Arm(Protocol):
    """An optimizer with its state, on the parameters of a problem."""

    def step(self, count: int) -> None:
        """Take `count` steps and wait until they finish."""

    def measure_state(self) -> list[tuple[int, int]]:
        """Return the numbers of elements and bytes of each array of state."""

    def measure_transient_bytes(self) -> int | None:
        """Return the bytes that a step allocates temporarily; None where the system does not report them."""


class Memory(Protocol):
    """Moves memory, to measure the bandwidth."""

    moved: int

    def step(self, count: int) -> None:
        """Move `moved` bytes `count` times and wait until that finishes."""


class Problem(Protocol):
    """Parameters of a shape with gradients; all competitors step them in turn."""

    def flip_gradients(self) -> None:
        """Negate all gradients: with constant ones an optimizer has nothing to filter."""

    def make_memory(self, size: int) -> Memory:
        """Return arrays of `size` bytes in total, on the device of the parameters."""


@dataclass(frozen=True)
class Competitor:
    """One row of a suite.

    Attributes:
        make: makes the optimizer's arm for a problem.
        needs: required packages, or COMPILER; a competitor without them is skipped.
        devices: the devices that it supports.
        plotted: whether the plots include it.
    """

    make: Callable[[Any], Arm]
    needs: tuple[str, ...] = ()
    devices: tuple[str, ...] = ("cpu", "cuda")
    plotted: bool = False

    def find_missing(self, device: str) -> list[str]:
        """Return the missing needs, and the device if it is not supported."""
        lacks = [need for need in self.needs if not _is_available(need)]
        return lacks if device in self.devices else [*lacks, f"not on {device}"]


def _is_available(need: str) -> bool:
    if need == COMPILER:
        return any(map(shutil.which, ("c++", "g++", "clang++")))
    return find_spec(need) is not None


@dataclass(frozen=True)
class Suite:
    """Competitors to compare with each other.

    Attributes:
        title: what the suite measures, in a few words.
        baselines: the competitors that the tables compare the others with.
        competitors: all competitors, by name.
        make_problem: makes the parameters of a shape on a device.
        packages: distributions to report the versions of, where they are installed.
        imports: modules to time the import of, each with the modules that users import anyway.
        memory: how the suite measures transient memory.
        count_threads: returns how many threads the framework uses.
        find_gpu: returns the GPU's name.
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
        """Describe the machine and the versions."""
        return describe_environment(self.packages, self.count_threads(), None if device == "cpu" else self.find_gpu())


def compute_state_bytes(arm: Arm, shape: Shape) -> float:
    """Compute the bytes of optimizer state per parameter."""
    return sum(size for _, size in arm.measure_state()) / shape.parameters


def compute_traffic_bytes(arm: Arm, shape: Shape) -> int:
    """Compute the bytes that a step on float32 parameters must move: gradient, parameter and state.

    A step reads the gradient, and reads and writes the parameter and its state. Only arrays of state as large as the smallest
    tensor count: smaller ones, such as a count of steps, stay in the processor's caches.

    """
    smallest = min(map(math.prod, shape.tensors))
    state = sum(size for elements, size in arm.measure_state() if elements >= smallest)
    return (4 + 2 * 4) * shape.parameters + 2 * state
