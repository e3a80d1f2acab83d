"""Measure the times of several competitors in turns, so that their ratios can be compared."""

from __future__ import annotations

import gc
import math
import random
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

#: Even a slow competitor takes part in this many rounds.
LEAST_ROUNDS = 3
_WARM_UP_STEPS = 2
# Another library's threads may still spin for some milliseconds, waiting for work.
_PAUSE_SECONDS = 0.005

#: Seconds of a step in each round; None where the competitor was skipped.
Samples = Sequence[float | None]


class Limits(NamedTuple):
    """How long to measure.

    Attributes:
        rounds: how often to measure each competitor.
        sample_seconds: short steps are repeated within a measurement until it takes about this long.
        competitor_seconds: a competitor that has used this much is skipped in later rounds.
    """

    rounds: int = 21
    sample_seconds: float = 0.02
    competitor_seconds: float = 10.0


class Spread(NamedTuple):
    """A median and the quartiles around it."""

    median: float
    low: float
    high: float


def compute_spread(values: Sequence[float]) -> Spread:
    """Compute the median and the quartiles."""
    low, median, high = np.quantile(np.asarray(values), [0.25, 0.5, 0.75]).tolist()
    return Spread(median, low, high)


def select_taken(samples: Samples) -> list[float]:
    """Return the times of the rounds that a competitor took part in."""
    return [seconds for seconds in samples if seconds is not None]


def compute_paired_ratio(samples: Samples, baseline: Samples) -> Spread:
    """Divide the times by a baseline's in the same rounds, so that a slow moment of the machine affects both."""
    pairs = zip(samples, baseline, strict=True)
    return compute_spread([seconds / base for seconds, base in pairs if seconds is not None and base is not None])


def compute_seconds_per_byte(memory: Mapping[str, Any]) -> float:
    """Compute the median time to read or write a byte.

    Args:
        memory: "bytes" moved, and "seconds" of each round.

    Returns:
        The seconds.
    """
    return compute_spread(select_taken(memory["seconds"])).median / float(memory["bytes"])


def interleave(
    steps: Mapping[str, Callable[[int], None]],
    limits: Limits,
    before_round: Callable[[], None],
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float | None]]:
    """Measure all competitors in each round, in a new random order.

    Args:
        steps: for each competitor, a function that takes `count` steps and waits until they finish.
        limits: how long to measure.
        before_round: called before each round.
        clock: returns the time in seconds.

    Returns:
        For each competitor, the seconds of a step in each round.
    """
    repeats: dict[str, int] = {}
    for name, step in steps.items():
        print(f"warming up {name}", file=sys.stderr)
        step(_WARM_UP_STEPS)  # creates the state and compiles; some optimizers compile again at the second step
        repeats[name] = max(1, math.ceil(limits.sample_seconds / max(_time_steps(step, 1, clock), 1e-6)))
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
                seconds = _time_steps(steps[name], repeats[name], clock)
                spent[name] += seconds
                samples[name].append(seconds / repeats[name])
    finally:
        gc.enable()
    return samples


def _time_steps(step: Callable[[int], None], count: int, clock: Callable[[], float]) -> float:
    start = clock()
    step(count)
    return clock() - start
