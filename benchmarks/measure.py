"""Measure a suite, and return the results as plain data for a JSON file."""

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
from benchmarks.catalogue import load_suite
from benchmarks.shapes import Shape
from benchmarks.suite import Suite, compute_state_bytes, compute_traffic_bytes

_IMPORTS = 3
# A step of VSGD accesses five numbers for each parameter: itself, its gradient, and three arrays of state.
_WORKING_SET = 5
# The memory's bandwidth is measured among the competitors, because it varies on a machine that others use.
_MEMORY = "memory"


def choose_competitors(suite: Suite, names: Iterable[str] | None, device: str) -> list[str]:
    """Return the available competitors among the baselines and the named ones, or among all.

    Raises:
        ValueError: a name is unknown.
    """
    names = list(suite.competitors if names is None else names)
    unknown = [name for name in names if name not in suite.competitors]
    if unknown:
        raise ValueError(f"--competitors has {', '.join(unknown)}, but must name some of {', '.join(suite.competitors)}")
    return [
        name
        for name, competitor in suite.competitors.items()
        if (name in names or name in suite.baselines) and not competitor.find_missing(device)
    ]


def measure_times(suite: Suite, shape: Shape, names: Iterable[str], device: str, limits: timing.Limits) -> dict[str, Any]:
    """Measure the times of all competitors' steps on one shape, and of moving memory in the same rounds."""
    problem = suite.make_problem(shape, device)
    memory = problem.make_memory(4 * _WORKING_SET * shape.parameters)
    arms = {name: suite.competitors[name].make(problem) for name in names}
    steps = {name: arm.step for name, arm in arms.items()}
    samples = timing.interleave({**steps, _MEMORY: memory.step}, limits, problem.flip_gradients)
    against = {name: samples[name] for name in suite.baselines}
    return {
        "environment": suite.describe_environment(device),
        "memory": {"bytes": memory.moved, "seconds": samples[_MEMORY]},
        "competitors": {
            name: {
                "seconds": samples[name],
                "against": against,
                "state_bytes_per_parameter": compute_state_bytes(arm, shape),
                "traffic_bytes": compute_traffic_bytes(arm, shape),
            }
            for name, arm in arms.items()
        },
    }


def probe_competitor(suite: Suite, shape: Shape, name: str, device: str) -> dict[str, Any]:
    """Measure the time of one competitor's first step in this process, and the memory of a later one."""
    problem = suite.make_problem(shape, device)
    start = time.perf_counter()
    arm = suite.competitors[name].make(problem)
    arm.step(1)
    first = time.perf_counter() - start
    arm.step(2)
    return {"first_step_seconds": first, "transient_bytes": arm.measure_transient_bytes()}


def probe_competitors(suite_name: str, suite: Suite, shape: Shape, names: Iterable[str], device: str) -> dict[str, Any]:
    """Run `probe_competitor` in a fresh process for each competitor, with empty compiler caches."""
    found = {}
    for name in names:
        print(f"{shape.name}: first steps of {name}", file=sys.stderr)
        with tempfile.TemporaryDirectory() as cache:
            arguments = ("probe", suite_name, shape.name, name, "--device", device)
            caches = {"NUMBA_CACHE_DIR": cache, "TORCHINDUCTOR_CACHE_DIR": cache}
            found[name] = json.loads(_run_python("-m", "benchmarks", *arguments, **caches, **machine.RETURN_MEMORY))
    return {"environment": suite.describe_environment(device), "memory": suite.memory, "competitors": found}


def measure_imports(suite: Suite, device: str) -> dict[str, Any]:
    """Measure the seconds that importing a module adds to the imports that users need anyway, in fresh processes."""
    return {
        "environment": suite.describe_environment(device),
        "seconds": {
            module: statistics.median(_time_import(module, before) for _ in range(_IMPORTS))
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
    # Frameworks may print other lines first.
    return done.stdout.splitlines()[-1]


def merge_results(old: dict[str, Any] | None, new: dict[str, Any]) -> dict[str, Any]:
    """Return the new results, with other competitors' old ones where machine and versions are the same."""
    if old is None or old["environment"] != new["environment"]:
        return new
    return {**new, "competitors": {**old["competitors"], **new["competitors"]}}


def run_suite(
    suite_name: str,
    results: dict[str, Any],
    words: Iterable[str],
    parts: Iterable[str],
    names: Iterable[str] | None,
    device: str,
    limits: timing.Limits,
) -> Iterator[dict[str, Any]]:
    """Measure a suite on some shapes.

    Args:
        suite_name: its name.
        results: of earlier runs; new results replace them competitor by competitor.
        words: the shapes, as `shapes.parse` takes them.
        parts: which of "times", "probes", "imports" to measure.
        names: the competitors; None: all of them, or in a sweep those that are plotted. The baselines always run.
        device: "cpu" or "cuda".
        limits: how long to measure times.

    Yields:
        The results so far, as `benchmarks.report` reads them, after each shape and at the end.
    """
    suite = load_suite(suite_name)
    head = {"suite": suite_name, "title": suite.title, "device": device, "baselines": list(suite.baselines)}
    cells = dict(results.get("cells", {}))
    wanted = [(shape, word in shapes.SWEEPS) for word in words for shape in shapes.parse(word)]
    for shape, swept in wanted:
        plotted = [name for name, competitor in suite.competitors.items() if competitor.plotted]
        competitors = choose_competitors(suite, plotted if names is None and swept else names, device)
        cell = {**cells.get(shape.name, {}), "tensors": len(shape.tensors), "parameters": shape.parameters}
        if "times" in parts:
            cell["times"] = merge_results(cell.get("times"), measure_times(suite, shape, competitors, device, limits))
        if "probes" in parts:
            cell["probes"] = merge_results(cell.get("probes"), probe_competitors(suite_name, suite, shape, competitors, device))
        cells[shape.name] = cell
        yield {**results, **head, "cells": cells}
    if "imports" in parts:
        yield {**results, **head, "cells": cells, "imports": measure_imports(suite, device)}
