"""Do the runs of the study over processes of one thread each; interrupted work keeps the finished runs."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import as_completed
from typing import Any

from tqdm import tqdm

from experiments import spread, tasks
from experiments.study.entrants import ENTRANTS
from experiments.study.protocol import Run

#: Runs that a process does at once: compiling a model takes as long as many runs, and a process that is killed loses its group.
_GROUP = 40


@functools.lru_cache(maxsize=1)
def _make_bench(task: str, entrant: str) -> Any:
    from experiments.study import bench  # late: it imports Keras, which the first process does not need

    return bench.Bench(tasks.find_task(task), ENTRANTS[entrant])


def perform_group(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Do runs of one task and entrant, and return their results.

    Args:
        runs: the runs.
    """
    found = []
    for run in runs:
        bench = _make_bench(run.task, run.entrant)
        start = time.perf_counter()
        outcome = bench.run(run.setting, run.seed)
        seconds = time.perf_counter() - start
        found.append(spread.round_numbers({"final": outcome.final, "curve": outcome.curve, "seconds": seconds}))
    return found


def perform_missing(runs: Iterable[Run], store: spread.Store, workers: int, title: str) -> None:
    """Do all of the given runs that have no records.

    Args:
        runs: the runs.
        store: the records, which the new ones join.
        workers: how many processes run side by side.
        title: of the progress bar.

    Raises:
        ValueError: `workers` is less than 1.
    """
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in dict.fromkeys(runs):
        if store.find(run) is None:
            groups.setdefault((run.task, run.entrant), []).append(run)
    parts = [each[start : start + _GROUP] for each in groups.values() for start in range(0, len(each), _GROUP)]
    with spread.start_processes(workers, "jax") as pool, tqdm(total=sum(map(len, parts)), desc=title) as bar:
        described = pool.submit(spread.describe_environment)
        futures = {pool.submit(perform_group, part): part for part in parts}
        try:
            environment = described.result()
            for done in as_completed(futures):
                for run, found in zip(futures[done], done.result(), strict=True):
                    store.add(run, found, environment)
                    bar.update()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
