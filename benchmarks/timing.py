"""Times of several competitors that can be compared: taken in turns, and told as ratios of what ran side by side."""

from __future__ import annotations

import gc
import math
import random
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

#: Rounds that even a slow competitor takes part in.
LEAST_ROUNDS = 3
_WARM_UP_STEPS = 2
# Another library's threads may still spin, waiting for work, for some milliseconds.
_PAUSE_SECONDS = 0.005

#: Seconds of a step in each round; None where the competitor sat out.
Samples = Sequence[float | None]


class Limits(NamedTuple):
    """How long to measure.

    Attributes:
        rounds: how often each competitor is measured.
        sample_seconds: short steps are repeated within a measurement until it takes about so long.
        competitor_seconds: one that has used up so much sits out the later rounds.
    """

    rounds: int = 21
    sample_seconds: float = 0.02
    competitor_seconds: float = 10.0


class Spread(NamedTuple):
    """A median with the quartiles about it."""

    median: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    """The median and the quartiles of some values."""
    low, median, high = np.quantile(np.asarray(values), [0.25, 0.5, 0.75]).tolist()
    return Spread(median, low, high)


def taken(samples: Samples) -> list[float]:
    """The times of the rounds that a competitor took part in."""
    return [seconds for seconds in samples if seconds is not None]


def paired_ratio(samples: Samples, baseline: Samples) -> Spread:
    """The times over those of a baseline in the same rounds, so that a slow moment of the machine weighs on both."""
    pairs = zip(samples, baseline, strict=True)
    return spread([seconds / base for seconds, base in pairs if seconds is not None and base is not None])


def seconds_per_byte(memory: Mapping[str, Any]) -> float:
    """How long a byte takes to be read or written, by the median.

    Args:
        memory: "bytes" that were moved, and "seconds" that it took in each round.
    """
    return spread(taken(memory["seconds"])).median / float(memory["bytes"])


def interleave(
    steps: Mapping[str, Callable[[int], None]],
    limits: Limits,
    before_round: Callable[[], None],
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float | None]]:
    """Measure all competitors in each round, in an order shuffled anew.

    Args:
        steps: for each competitor, what takes as many steps as told and waits for their end.
        limits: how long to measure.
        before_round: is called before each round.
        clock: gives the time in seconds.

    Returns:
        For each competitor, the seconds of a step in each round.
    """
    repeats: dict[str, int] = {}
    for name, step in steps.items():
        print(f"warming up {name}", file=sys.stderr)
        step(_WARM_UP_STEPS)  # makes the state, and compiles, for some once more at the second step
        repeats[name] = max(1, math.ceil(limits.sample_seconds / max(_timed(step, 1, clock), 1e-6)))
    samples: dict[str, list[float | None]] = {name: [] for name in steps}
    spent = dict.fromkeys(steps, 0.0)
    names = list(steps)
    shuffle = random.Random(0).shuffle
    gc.collect()
    gc.disable()
    try:
        for number in range(limits.rounds):
            before_round()
            shuffle(names)
            for name in names:
                if number >= LEAST_ROUNDS and spent[name] > limits.competitor_seconds:
                    samples[name].append(None)
                    continue
                if repeats[name] > 1:
                    time.sleep(_PAUSE_SECONDS)
                    steps[name](1)
                seconds = _timed(steps[name], repeats[name], clock)
                spent[name] += seconds
                samples[name].append(seconds / repeats[name])
    finally:
        gc.enable()
    return samples


def _timed(step: Callable[[int], None], count: int, clock: Callable[[], float]) -> float:
    start = clock()
    step(count)
    return clock() - start
