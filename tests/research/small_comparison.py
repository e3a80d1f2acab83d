"""A comparison of a few short runs by one process: `python small_comparison.py FOLDER BACKEND`."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

from experiments import comparison, spread, tasks

#: Of AdamW: for tuning 2 trials on 1 seed, then its defaults and what was chosen on 3 seeds.
RUNS = 2 * 1 + 2 * 3


def shrink() -> None:
    """Make the protocol small, in this process, which alone knows it."""
    comparison.TUNING_SEEDS, comparison.TEST_SEEDS = (0,), (100, 101, 102)
    comparison.ARMS.pop("5 trials", None)
    comparison.ARMS["20 trials"] = lambda entrant: [comparison.Trial(rate, "cosine") for rate in (0.02, 0.05)]
    tasks.TASKS["quadratic"] = dataclasses.replace(tasks.TASKS["quadratic"], steps=200)


if __name__ == "__main__":
    shrink()
    spread.run_comparison(["quadratic"], ["adamw"], spread.Store(Path(sys.argv[1])), workers=1, backend=sys.argv[2])
