"""What a run measures, as plain data for a JSON file."""

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
# Numbers that a step of VSGD holds for each parameter: itself, its gradient, and three arrays of state.
_WORKING_SET = 5
# Runs among the competitors, for a machine that others use moves memory now faster, now slower.
_MEMORY = "memory"


def chosen(suite: Suite, names: Iterable[str] | None, device: str) -> list[str]:
    """The competitors that run: the baselines and those that are named, or all; without those that lack something.

    Raises:
        ValueError: there is no such competitor.
    """
    names = list(suite.competitors if names is None else names)
    unknown = [name for name in names if name not in suite.competitors]
    if unknown:
        raise ValueError(f"no such competitor: {', '.join(unknown)}; there are {', '.join(suite.competitors)}")
    return [
        name
        for name, competitor in suite.competitors.items()
        if (name in names or name in suite.baselines) and not competitor.find_missing(device)
    ]


def _plotted(suite: Suite) -> list[str]:
    return [name for name, competitor in suite.competitors.items() if competitor.plotted]


def times(suite: Suite, shape: Shape, names: Iterable[str], device: str, limits: timing.Limits) -> dict[str, Any]:
    """The times of all competitors' steps on one shape, and of moving memory in the same rounds."""
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


def probe(suite: Suite, shape: Shape, name: str, device: str) -> dict[str, Any]:
    """What the first steps of a process tell of one competitor."""
    problem = suite.make_problem(shape, device)
    start = time.perf_counter()
    arm = suite.competitors[name].make(problem)
    arm.step(1)
    first = time.perf_counter() - start
    arm.step(2)
    return {"first_step_seconds": first, "transient_bytes": arm.measure_transient_bytes()}


def probes(suite_name: str, suite: Suite, shape: Shape, names: Iterable[str], device: str) -> dict[str, Any]:
    """`probe`, in a fresh process for each competitor, whose compilers find nothing in their caches."""
    found = {}
    for name in names:
        print(f"{shape.name}: first steps of {name}", file=sys.stderr)
        with tempfile.TemporaryDirectory() as cache:
            arguments = ("probe", suite_name, shape.name, name, "--device", device)
            caches = {"NUMBA_CACHE_DIR": cache, "TORCHINDUCTOR_CACHE_DIR": cache}
            found[name] = json.loads(_python("-m", "benchmarks", *arguments, **caches, **machine.RETURN_MEMORY))
    return {"environment": suite.describe_environment(device), "memory": suite.memory, "competitors": found}


def imports(suite: Suite, device: str) -> dict[str, Any]:
    """The seconds that importing a module adds to what is imported anyway, each time in a fresh process."""
    return {
        "environment": suite.describe_environment(device),
        "seconds": {
            module: statistics.median(_import_seconds(module, before) for _ in range(_IMPORTS))
            for module, before in suite.imports.items()
        },
    }


def _import_seconds(module: str, before: Sequence[str]) -> float:
    code = [f"import {each}" for each in before]
    code += ["import time", "start = time.perf_counter()", f"import {module}", "print(time.perf_counter() - start)"]
    return float(_python("-c", "\n".join(code)))


def _python(*arguments: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments], env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True, check=True
    )
    # Frameworks may print before.
    return done.stdout.splitlines()[-1]


def merge(old: dict[str, Any] | None, new: dict[str, Any]) -> dict[str, Any]:
    """What was measured anew, with other competitors' earlier results where machine and versions are the same."""
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
        suite_name: which.
        results: what earlier runs found; what is measured anew replaces it, competitor by competitor.
        words: the shapes, as `shapes.parse` takes them.
        parts: which of "times", "probes", "imports" to measure.
        names: the competitors, or None for all, and in a sweep for those that are plotted; the baselines run in any case.
        device: "cpu" or "cuda".
        limits: how long to measure times.

    Yields:
        The results so far, as `benchmarks.report` reads them: after each shape, and at the end.
    """
    suite = load_suite(suite_name)
    head = {"suite": suite_name, "title": suite.title, "device": device, "baselines": list(suite.baselines)}
    cells = dict(results.get("cells", {}))
    wanted = [(shape, word in shapes.SWEEPS) for word in words for shape in shapes.parse(word)]
    for shape, swept in wanted:
        competitors = chosen(suite, _plotted(suite) if names is None and swept else names, device)
        cell = {**cells.get(shape.name, {}), "tensors": len(shape.tensors), "parameters": shape.parameters}
        if "times" in parts:
            cell["times"] = merge(cell.get("times"), times(suite, shape, competitors, device, limits))
        if "probes" in parts:
            cell["probes"] = merge(cell.get("probes"), probes(suite_name, suite, shape, competitors, device))
        cells[shape.name] = cell
        yield {**results, **head, "cells": cells}
    if "imports" in parts:
        yield {**results, **head, "cells": cells, "imports": imports(suite, device)}
