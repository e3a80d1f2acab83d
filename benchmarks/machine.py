"""Measure a process's peak memory, and the machine's memory bandwidth."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from reporting.machine import count_processors

_REPETITIONS = 5


def can_measure_peak() -> bool:
    """Return whether the system reports a process's peak memory and allows resetting it."""
    return os.access("/proc/self/clear_refs", os.W_OK)


def measure_peak_growth(action: Callable[[], None]) -> int | None:
    """Measure how much this process's resident memory grows, at its peak, while an action runs.

    Memory freed earlier must be back at the system, or the action could reuse it unnoticed; `RETURN_MEMORY` makes glibc's
    allocator return it.

    Args:
        action: what to run.

    Returns:
        The bytes; None on systems that do not report them.
    """
    if not can_measure_peak():
        return None
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _read_resident_bytes("VmRSS")
    action()
    return max(0, _read_resident_bytes("VmHWM") - before)


#: Environment variables that make freed memory of any relevant size go back to the system at once.
RETURN_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def _read_resident_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(name))
    return int(line.split()[1]) * 1024


class Memory:
    """Two float32 arrays: adds one to the other with one thread or with all, whichever is faster.

    The addition reads each byte that it writes, as an optimizer does, so no cache line is fetched only to be overwritten.

    Attributes:
        moved: the bytes that an addition reads and writes.

    Args:
        size: bytes of both arrays together.
    """

    def __init__(self, size: int) -> None:
        self._a, self._b = (np.ones(max(1, size // 8), np.float32) for _ in range(2))
        self.moved = 3 * self._a.nbytes
        bounds = np.linspace(0, self._a.size, count_processors() + 1, dtype=int)
        self._parts = [slice(*pair) for pair in itertools.pairwise(bounds)]
        self._pool = ThreadPoolExecutor(len(self._parts))
        self._move = min((self._add_by_one_thread, self._add_by_all_threads), key=time_fastest)

    def _add(self, part: slice) -> None:
        np.add(self._a[part], self._b[part], out=self._a[part])

    def _add_by_one_thread(self) -> None:
        self._add(slice(None))

    def _add_by_all_threads(self) -> None:
        list(self._pool.map(self._add, self._parts))

    def step(self, count: int) -> None:
        """Add `count` times."""
        for _ in range(count):
            self._move()


def time_fastest(action: Callable[[], object]) -> float:
    """Return the seconds of the fastest of several runs."""
    action()
    times = []
    for _ in range(_REPETITIONS):
        start = time.perf_counter()
        action()
        times.append(time.perf_counter() - start)
    return min(times)
