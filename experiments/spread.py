"""Distribute runs over processes of one thread each; interrupted work keeps the finished runs."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from experiments import comparison, records, tasks
from experiments.comparison import Setting

#: The folder of the records, in the folder of results.
FOLDER = "small"

#: Environment variables for one thread in each process, so that parallel runs do not compete.
THREADS = {
    **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS"), "1"),
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false",
    "CUDA_VISIBLE_DEVICES": "",
    "JAX_PLATFORMS": "cpu",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}


class Run(Protocol):
    """A run with a record."""

    @property
    def task(self) -> str:
        """The name of its task."""
        ...

    @property
    def key(self) -> dict[str, Any]:
        """The key of its record."""
        ...


class Store:
    """The records of a folder: a file for each task, and a file of the environments of the runs.

    Args:
        folder: of the files; a missing folder is created.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[str, records.Records] = {}

    def open_records(self, task: str) -> records.Records:
        """Open the records of a task.

        Args:
            task: its name.
        """
        if task not in self._files:
            self._files[task] = records.Records(self.folder / f"{task}.jsonl")
        return self._files[task]

    def list_tasks(self) -> list[str]:
        """List the names of the tasks with records, in order."""
        return sorted({path.name.partition(".jsonl")[0] for path in self.folder.glob("*.jsonl*")} - {"environments"})

    def pack(self) -> None:
        """Compress all records."""
        for path in list(self.folder.glob("*.jsonl")):
            records.pack_records(path)

    def find(self, setting: Run) -> dict[str, Any] | None:
        """Find the record of a run; None where the run is not finished.

        Args:
            setting: the run.
        """
        finished, key = self.open_records(setting.task), setting.key
        if key not in finished:
            return None
        return finished[key]

    def add(self, setting: Run, found: Mapping[str, Any], environment: Mapping[str, Any]) -> None:
        """Append the record of a run.

        Args:
            setting: the run.
            found: the results of the run.
            environment: of the run; each environment is written once, and the record has the start of its hash.
        """
        digest = hashlib.sha256(json.dumps(environment, sort_keys=True).encode()).hexdigest()[:8]
        environments = self.open_records("environments")
        if (key := {"environment": digest}) not in environments:
            environments.append(key, **environment)
        self.open_records(setting.task).append(setting.key, **found, environment=digest)


def round_numbers(value: Any) -> Any:
    """Round numbers to four digits, to keep the files small.

    Args:
        value: numbers, in lists and mappings.
    """
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, Mapping):
        return {name: round_numbers(each) for name, each in value.items()}
    return [round_numbers(each) for each in value] if isinstance(value, Sequence) else value


@functools.lru_cache(maxsize=1)
def _make_bench(task: str, entrant: str) -> Any:
    from experiments import bench  # late: it imports Keras, which the first process does not need

    return bench.Bench(tasks.find_task(task), comparison.find_entrant(entrant).make())


@functools.cache
def describe_environment() -> dict[str, Any]:
    """Describe the machine and the packages of this process's runs."""
    return {**records.describe_run_environment(), "threads": 1}


def perform_run(setting: Setting) -> tuple[dict[str, Any], dict[str, Any]]:
    """Do a run, and return its results and its environment.

    Args:
        setting: the run.
    """
    bench = _make_bench(setting.task, setting.entrant)
    start = time.perf_counter()
    outcome = bench.run(setting.seed, setting.rates)
    seconds = time.perf_counter() - start
    return round_numbers({**outcome._asdict(), "seconds": seconds}), describe_environment()


def _follow_parent() -> None:
    """Ignore interruptions, which the first process handles, and exit when that process ends in any way."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def run_comparison(names: Sequence[str], entrants: Sequence[str], store: Store, workers: int, backend: str) -> None:
    """Do all missing runs of the comparison, task by task: first for tuning, then for the tests.

    Args:
        names: the names of the tasks.
        entrants: the names of the entrants.
        store: the records, which the new ones join.
        workers: how many processes run side by side.
        backend: of Keras.

    Raises:
        ValueError: a task or an entrant is unknown, or `workers` is less than 1.
    """
    chosen = [tasks.find_task(name) for name in names]
    for name in entrants:
        comparison.find_entrant(name)
    with start_processes(workers, backend) as pool:
        for task in chosen:
            found = comparison.Comparison(task, store.find, backend)
            for title, list_settings in (("tuning", found.list_tuning_settings), ("tests", found.list_test_settings)):
                settings = itertools.chain.from_iterable(map(list_settings, entrants))
                _perform_missing(pool, settings, store, f"{task.name}, {title}")


def perform_runs(settings: Sequence[Setting], store: Store, workers: int, title: str) -> None:
    """Do all of the given runs that have no records.

    Args:
        settings: the runs, all of one Keras backend.
        store: the records, which the new ones join.
        workers: how many processes run side by side.
        title: of the progress bar.

    Raises:
        ValueError: `workers` is less than 1.
    """
    with start_processes(workers, settings[0].backend) as pool:
        _perform_missing(pool, settings, store, title)


@contextlib.contextmanager
def start_processes(workers: int, backend: str) -> Iterator[ProcessPoolExecutor]:
    """Start processes of one thread each, which end with this one.

    Args:
        workers: how many.
        backend: of Keras.

    Raises:
        ValueError: `workers` is less than 1.
    """
    if workers < 1:
        raise ValueError(f"workers is {workers}, but must be at least 1")
    # A spawned process inherits environment variables, and libraries read them on import: there is no other way to set them.
    variables = {**THREADS, "KERAS_BACKEND": backend}
    before = {name: os.environ[name] for name in variables if name in os.environ}
    os.environ.update(variables)
    try:
        with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"), initializer=_follow_parent) as pool:
            yield pool
    finally:
        for name in variables:
            del os.environ[name]
        os.environ.update(before)


def _perform_missing(pool: ProcessPoolExecutor, settings: Iterable[Setting], store: Store, title: str) -> None:
    missing = [each for each in dict.fromkeys(settings) if store.find(each) is None]
    # In order, so that a process mostly keeps its compiled model.
    futures = {pool.submit(perform_run, setting): setting for setting in missing}
    try:
        for done in tqdm(as_completed(futures), title, len(futures), disable=not futures):
            store.add(futures[done], *done.result())
    except BaseException:
        pool.shutdown(cancel_futures=True)
        raise
