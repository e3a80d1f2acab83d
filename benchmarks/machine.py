"""The machine: what it is, what memory a process uses on it, and how fast it moves memory."""

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
    """Whether the system tells the peak of a process's memory, and lets it start anew."""
    return os.access("/proc/self/clear_refs", os.W_OK)


def measure_peak_growth(action: Callable[[], None]) -> int | None:
    """By how many bytes this process's resident memory grew, at its highest, while an action ran.

    Memory that was freed before must have gone back to the system, or the action could use it unseen; `RETURN_MEMORY` has
    glibc's allocator do so.

    Returns:
        The bytes; None on systems that do not tell.
    """
    if not can_measure_peak():
        return None
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _read_resident_bytes("VmRSS")
    action()
    return max(0, _read_resident_bytes("VmHWM") - before)


#: An environment in which freed memory of any size that matters goes back to the system at once.
RETURN_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def _read_resident_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(name))
    return int(line.split()[1]) * 1024


class Memory:
    """Two float32 arrays, one added to the other by one thread or by all, whichever is faster.

    Each byte is written where one was read, as an optimizer does it: no line of memory is fetched only to be overwritten.

    Attributes:
        moved: the bytes that an addition reads or writes.

    Args:
        size: bytes of the two arrays together.
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
        """Add so many times."""
        for _ in range(count):
            self._move()


def time_fastest(action: Callable[[], object]) -> float:
    """The seconds of the fastest of several runs."""
    action()
    times = []
    for _ in range(_REPETITIONS):
        start = time.perf_counter()
        action()
        times.append(time.perf_counter() - start)
    return min(times)
