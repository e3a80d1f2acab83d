"""Run a comparison of a few short runs in one process: `python -m research.small_comparison FOLDER [--die-after RECORDS]`."""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
import time
from pathlib import Path
from threading import Thread

from experiments import comparison, records, spread, tasks

#: AdamW's runs: 2 trials on 1 seed for tuning, then its defaults and the chosen trial on 3 seeds.
RUNS = 2 * 1 + 2 * 3


def shrink() -> None:
    """Make the protocol small, in this process only."""
    comparison.TUNING_SEEDS, comparison.TEST_SEEDS = (0,), (100, 101, 102)
    comparison.ARMS.pop("5 trials", None)
    comparison.ARMS["20 trials"] = lambda entrant: [comparison.Trial(rate, "cosine") for rate in (0.02, 0.05)]
    tasks.TASKS["quadratic"] = dataclasses.replace(tasks.TASKS["quadratic"], steps=200)


def die_after(count: int, path: Path) -> None:
    """Kill this process once a file has `count` records."""
    while len(records.read_jsonl(path)) < count:
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    shrink()
    folder = Path(sys.argv[1])
    if sys.argv[2:]:
        Thread(target=die_after, args=(int(sys.argv[3]), folder / "quadratic.jsonl"), daemon=True).start()
    spread.run_comparison(["quadratic"], ["adamw"], spread.Store(folder), workers=1, backend=os.environ["KERAS_BACKEND"])
