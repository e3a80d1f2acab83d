"""Write the matrix' table of agreement as Markdown."""

from __future__ import annotations

import platform
import re
from collections.abc import Iterable, Mapping
from importlib.metadata import version

from matrix.experiments import DTYPES, EXPERIMENTS, TOLERANCE, is_reference
from matrix.worker import Cell, Outcome

from reporting.machine import describe_environment
from reporting.pages import format_table

# The experiments of each column; it shows the worst of them.
_COLUMNS = {
    "golden": [name for name in EXPERIMENTS if name.startswith("golden")],
    "constant fed": ["constant-fed"],
    "posterior": ["posterior", "constant-posterior"],
    "outliers fed": ["outliers-fed"],
    "training": ["training"],
    "constant training": ["constant-training"],
}


def _bound(experiment: str, dtype: str) -> str:
    kind = "training" if EXPERIMENTS[experiment].case is None else "fed"
    return f"{TOLERANCE[kind][dtype]:.0e}"


def _cell(strayed: Mapping[Cell, float], name: str, device: str, experiments: list[str], dtype: str) -> str:
    if any(is_reference(name, experiment, dtype) for experiment in experiments):
        return "reference"
    errors = [strayed[cell] for experiment in experiments if (cell := (name, device, experiment, dtype)) in strayed]
    if not errors:
        return ""
    few = f" ({len(errors)} of {len(experiments)})" if len(errors) < len(experiments) else ""
    return f"{max(errors):.1e}{few}"


def table(strayed: Mapping[Cell, float]) -> str:
    """Return the table with the largest deviation of each runner, device and group of experiments.

    Args:
        strayed: the deviation of each cell.
    """
    header = ["runner", "device", *(f"{column}, {dtype}" for column in _COLUMNS for dtype in DTYPES)]
    rows = [["bound", "", *(_bound(experiments[0], dtype) for experiments in _COLUMNS.values() for dtype in DTYPES)]]
    for name, device in dict.fromkeys((name, device) for name, device, _, _ in strayed):
        worst = [_cell(strayed, name, device, experiments, dtype) for experiments in _COLUMNS.values() for dtype in DTYPES]
        rows.append([name, device, *worst])
    return format_table(header, rows)


def page(before: str, strayed: Mapping[Cell, float], outcomes: Iterable[Outcome]) -> str:
    """Return the page with this run's machine, versions and table in place of the old ones.

    Args:
        before: the page as it was.
        strayed: the deviation of each cell.
        outcomes: the workers' outcomes.
    """
    outcomes = list(outcomes)
    versions = {"Python": platform.python_version()}
    for outcome in outcomes:
        versions.update(outcome.versions)
    if any(name == "torch-fused" for name, *_ in strayed):
        versions["numba"] = version("numba")
    gpus = sorted({outcome.gpu for outcome in outcomes if outcome.gpu is not None})
    processors = describe_environment([], 0, None)
    machine = " and ".join([f"{processors['processors']} processors ({processors['cpu']})", *gpus])
    numbers = ", ".join(f"{name} {number}" for name, number in versions.items())
    gpu = "Float32 products on the GPU are of full precision, not TF32." if gpus else "There was no GPU."
    head = re.sub(r"(?<=wrote this page, on ).*", f"{machine}, with {numbers}.", before.partition("| runner ")[0])
    head = re.sub(r"^(Float32 products on|There was no).*$", gpu, head, flags=re.MULTILINE)
    return f"{head}{table(strayed)}\n"
