"""Measure a suite and return the results as plain data for a JSON file."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from benchmarks import machine, shapes, timing
from benchmarks.shapes import Shape
from benchmarks.suite import Suite, load, state_bytes_per_parameter, traffic_bytes

_IMPORT_RUNS = 3
# VSGD's arrays per parameter: the parameter, its gradient and three arrays of state.
_WORKING_SET = 5
# Memory is timed in the same rounds as the competitors because its speed varies on a shared machine.
_MEMORY = "memory"


def select_competitors(suite: Suite, names: Iterable[str] | None, device: str) -> list[str]:
    """Return the competitors to run: the baselines and the named ones, except those that lack a package or the device.

    Args:
        suite: the suite.
        names: the competitors besides the baselines, or None for all.
        device: "cpu" or "cuda".

    Returns:
        Their names, in the suite's order.

    Raises:
        ValueError: the suite has no competitor of such a name.
    """
    names = list(suite.competitors if names is None else names)
    unknown = [name for name in names if name not in suite.competitors]
    if unknown:
        raise ValueError(f"competitors has {', '.join(unknown)}, but must be among {', '.join(suite.competitors)}")
    return [
        name
        for name, competitor in suite.competitors.items()
        if (name in names or name in suite.baselines) and not competitor.missing(device)
    ]


def time_steps(suite: Suite, shape: Shape, names: Iterable[str], device: str, limits: timing.Limits) -> dict[str, Any]:
    """Time all competitors' steps on one shape, and moving memory in the same rounds.

    Args:
        suite: the suite.
        shape: the shape of the parameters.
        names: the competitors.
        device: "cpu" or "cuda".
        limits: how long to measure.

    Returns:
        The results as plain data.
    """
    problem = suite.problem(shape, device)
    memory = problem.memory(4 * _WORKING_SET * shape.parameters)
    arms = {name: suite.competitors[name].make(problem) for name in names}
    steps = {name: arm.step for name, arm in arms.items()}
    samples = timing.interleave({**steps, _MEMORY: memory.step}, limits, problem.turn)
    against = {name: samples[name] for name in suite.baselines}
    return {
        "environment": suite.environment(device),
        "memory": {"bytes": memory.moved, "seconds": samples[_MEMORY]},
        "competitors": {
            name: {
                "seconds": samples[name],
                "against": against,
                "state_bytes_per_parameter": state_bytes_per_parameter(arm, shape),
                "traffic_bytes": traffic_bytes(arm, shape),
            }
            for name, arm in arms.items()
        },
    }


def probe(suite: Suite, shape: Shape, name: str, device: str) -> dict[str, Any]:
    """Measure the first step's time and a later step's memory in this process, for one competitor.

    Args:
        suite: the suite.
        shape: the shape of the parameters.
        name: the competitor.
        device: "cpu" or "cuda".

    Returns:
        "first_step_seconds" and "transient_bytes".
    """
    problem = suite.problem(shape, device)
    start = time.perf_counter()
    arm = suite.competitors[name].make(problem)
    arm.step(1)
    first = time.perf_counter() - start
    arm.step(2)
    return {"first_step_seconds": first, "transient_bytes": arm.transient_bytes()}


def run_probes(suite_name: str, suite: Suite, shape: Shape, names: Iterable[str], device: str) -> dict[str, Any]:
    """Run `probe` for each competitor, each in a new process with empty compiler caches.

    Args:
        suite_name: the suite's name on the command line.
        suite: the suite.
        shape: the shape of the parameters.
        names: the competitors.
        device: "cpu" or "cuda".

    Returns:
        The results as plain data.
    """
    found = {}
    for name in names:
        print(f"{shape.name}: first steps of {name}", file=sys.stderr)
        with tempfile.TemporaryDirectory() as cache:
            arguments = ("probe", suite_name, shape.name, name, "--device", device)
            caches = {"NUMBA_CACHE_DIR": cache, "TORCHINDUCTOR_CACHE_DIR": cache}
            found[name] = json.loads(_run_python("-m", "benchmarks", *arguments, **caches, **machine.RETURN_MEMORY))
    return {"environment": suite.environment(device), "memory": suite.memory, "competitors": found}


def time_imports(suite: Suite, device: str) -> dict[str, Any]:
    """Time the import of each module after the imports that users have anyway, each time in a new process.

    Args:
        suite: the suite.
        device: "cpu" or "cuda".

    Returns:
        The results as plain data.
    """
    return {
        "environment": suite.environment(device),
        "seconds": {
            module: statistics.median(_time_import(module, before) for _ in range(_IMPORT_RUNS))
            for module, before in suite.imports.items()
        },
    }


def _time_import(module: str, before: Sequence[str]) -> float:
    code = [f"import {each}" for each in before]
    code += ["import time", "start = time.perf_counter()", f"import {module}", "print(time.perf_counter() - start)"]
    return float(_run_python("-c", "\n".join(code)))


def _run_python(*arguments: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments], env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True, check=True
    )
    # Frameworks may print lines before the result.
    return done.stdout.splitlines()[-1]


def merge(old: dict[str, Any] | None, new: dict[str, Any]) -> dict[str, Any]:
    """Merge new results into old ones of the same machine and versions; discard old ones of others.

    Args:
        old: earlier results, or None.
        new: new results, which replace earlier ones of the same competitor.

    Returns:
        The merged results.
    """
    if old is None or old["environment"] != new["environment"]:
        return new
    return {**new, "competitors": {**old["competitors"], **new["competitors"]}}


def run(
    suite_name: str,
    results: dict[str, Any],
    words: Iterable[str],
    parts: Iterable[str],
    names: Iterable[str] | None,
    device: str,
    limits: timing.Limits,
) -> Iterator[dict[str, Any]]:
    """Measure a suite.

    Args:
        suite_name: the suite's name on the command line.
        results: the results of earlier runs; new ones replace them competitor by competitor.
        words: the shapes, in the form that `shapes.parse` reads.
        parts: any of "times", "probes" and "imports".
        names: the competitors besides the baselines; None selects all, in a sweep all that are plotted.
        device: "cpu" or "cuda".
        limits: how long to measure times.

    Yields:
        The results so far, in the form that `benchmarks.report` reads: after each shape, and at the end.
    """
    suite = load(suite_name)
    head = {"suite": suite_name, "title": suite.title, "device": device, "baselines": list(suite.baselines)}
    cells = dict(results.get("cells", {}))
    plotted = [name for name, competitor in suite.competitors.items() if competitor.plotted]
    for shape, swept in [(shape, word in shapes.SWEEPS) for word in words for shape in shapes.parse(word)]:
        competitors = select_competitors(suite, plotted if names is None and swept else names, device)
        cell = {**cells.get(shape.name, {}), "tensors": len(shape.tensors), "parameters": shape.parameters}
        if "times" in parts:
            cell["times"] = merge(cell.get("times"), time_steps(suite, shape, competitors, device, limits))
        if "probes" in parts:
            cell["probes"] = merge(cell.get("probes"), run_probes(suite_name, suite, shape, competitors, device))
        cells[shape.name] = cell
        yield {**results, **head, "cells": cells}
    if "imports" in parts:
        yield {**results, **head, "cells": cells, "imports": time_imports(suite, device)}
