"""Run all that one framework contributes to the matrix, in a separate process, by `main`.

The arguments are NAME DATA RESULT. DATA holds the pickled `Training`, or None if no training can run. RESULT gets a pickled
`Outcome`.
"""

from __future__ import annotations

import importlib
import pickle
import sys
import time
import traceback
from pathlib import Path
from typing import NamedTuple

from matrix.experiments import EXPERIMENTS, RUNNERS, Run, Training, cells, missing, run

#: Runner, device, experiment, dtype.
Cell = tuple[str, str, str, str]


class Outcome(NamedTuple):
    """The result of a worker.

    Attributes:
        runs: each cell's run, or the text of its exception.
        versions: the frameworks' versions, by name.
        gpu: the name of the GPU, or None.
        seconds: the duration of each runner.
    """

    runs: dict[Cell, Run | str]
    versions: dict[str, str]
    gpu: str | None
    seconds: dict[str, float]


def work(worker: str, data: Training | None) -> Outcome:
    """Run all runners of this worker whose frameworks are installed, on all devices present."""
    module = importlib.import_module(f"matrix.{worker.partition('-')[0]}_runners")
    outcome = Outcome({}, module.versions(), module.gpu(), {})
    for name, spec in RUNNERS.items():
        if spec.worker != worker or missing(spec.needs):
            continue
        start = time.perf_counter()
        for device in RUNNERS[name].devices:
            if device == "gpu" and outcome.gpu is None:
                continue
            for experiment, dtype in cells(name):
                if EXPERIMENTS[experiment].case is None and data is None:
                    continue
                try:
                    with module.scope(device, dtype):
                        result = run(module.RUNNERS[name], EXPERIMENTS[experiment], dtype, data)
                except Exception:  # shown by this cell's test; the other cells continue
                    result = traceback.format_exc()
                outcome.runs[name, device, experiment, dtype] = result
        outcome.seconds[name] = time.perf_counter() - start
    return outcome


def main() -> None:
    """Run the worker that the command's arguments name."""
    name, data, result = sys.argv[1:]
    Path(result).write_bytes(pickle.dumps(work(name, pickle.loads(Path(data).read_bytes()))))
