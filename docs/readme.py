"""The README's tables in short: what the pages on agreement, performance and results tell at length.

Reads `docs/agreement.md`, and the measurements in `docs/performance` and `docs/results`, and writes the README's sections:

    pip install '.[experiments]'
    python docs/readme.py
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))

from benchmarks.timing import compute_paired_ratio
from experiments.comparison import ENTRANTS, WIDEST, Comparison
from experiments.paper_report import MISSING
from experiments.report import find_result, format_verdict
from experiments.spread import FOLDER, Store
from experiments.tasks import TASKS
from reporting.pages import format_table, replace_section

DOCS = Path(__file__).parent

#: What the runners of `tests/matrix` belong to, by how their names begin.
FRAMEWORKS = {
    "numpy": "NumPy",
    "torch-": "PyTorch",
    "optax-": "JAX, optax",
    "keras-tensorflow": "Keras on TensorFlow",
    "keras-jax": "Keras on JAX",
    "keras-torch": "Keras on PyTorch",
    "mlx": "MLX",
}
#: What is told of how they agree: columns of the page.
COLUMNS = ("golden, float64", "golden, float32", "training, float64", "training, float32")

#: By file: what is measured, its baseline, and what VSGD and Constant VSGD are called there.
SUITES = {
    "torch": ("PyTorch, a fused step", "AdamW(fused=True)", ("VSGD(fused=True)", "ConstantVSGD(fused=True)")),
    "optax": ("JAX, a step under `jit`", "optax.adamw", ("vsgd", "constant_vsgd")),
    "keras-train-tensorflow": ("Keras on TensorFlow, a train step", "keras AdamW", ("VSGD", "ConstantVSGD")),
    "keras-train-jax": ("Keras on JAX, a train step", "keras AdamW", ("VSGD", "ConstantVSGD")),
    "keras-train-torch": ("Keras on PyTorch, a train step", "keras AdamW", ("VSGD", "ConstantVSGD")),
}
SHAPES = ("conv", "many", "large")

#: Whose results are told, beside VSGD's.
OTHERS = ("adamw", "adamw-warm", "sgd")


def read_rows(page: Path) -> list[dict[str, str]]:
    """The rows of a page's first table, by the heads of its columns.

    Args:
        page: in Markdown.
    """
    lines = [line for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    header, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    return [dict(zip(header, row, strict=True)) for row in rows]


def parse_number(cell: str) -> float | None:
    """What a cell begins with, or None where that is no number.

    Args:
        cell: of a table.
    """
    try:
        return float(cell.split()[0])
    except (IndexError, ValueError):
        return None


def format_agreement(page: Path) -> str:
    """How far the worst runner of each framework strays.

    Args:
        page: the one that `tests/matrix` wrote.
    """
    found = read_rows(page)
    (bound,) = (row for row in found if row["runner"] == "bound")
    rows = [["bound of the tests", *(bound[column] for column in COLUMNS)]]
    for prefix, title in FRAMEWORKS.items():
        ours = [row for row in found if row["runner"].startswith(prefix)]
        columns = [[value for row in ours if (value := parse_number(row[column])) is not None] for column in COLUMNS]
        if ours:
            rows.append([title, *(f"{max(column):.0e}" if column else "reference" for column in columns)])
    return format_table(["", *COLUMNS], rows)


def _format_ratio(cell: Mapping[str, Any], name: str, baseline: str) -> str:
    found = cell["times"]["competitors"][name]
    return f"{compute_paired_ratio(found['seconds'], found['against'][baseline]).median:.2f}"


def format_speed(folder: Path) -> str:
    """The time of VSGD's and Constant VSGD's steps over AdamW's of the same framework.

    Args:
        folder: of the measurements.
    """
    rows = []
    for name, (title, baseline, ours) in SUITES.items():
        cells = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))["cells"]
        rows.append([title, *(_format_ratio(cells[shape], each, baseline) for each in ours for shape in SHAPES)])
    heads = [f"{title}: {shape}" for title in ("VSGD", "Constant VSGD") for shape in SHAPES]
    return format_table(["time / AdamW", *heads], rows)


def _format_comparisons(comparison: Comparison) -> Iterator[str]:
    metric = comparison.task.metric
    ours = find_result(comparison, WIDEST, "vsgd")
    for other in OTHERS:
        theirs = find_result(comparison, WIDEST, other)
        if ours is None or theirs is None:
            yield MISSING
            continue
        words = [format_verdict(ours, theirs, *which) for which in (("train", "loss"), ("test", metric))]
        yield f"{theirs.format_mean('test', metric)} ({', '.join(words)})"


def format_results(store: Store) -> str:
    """VSGD on the small tasks, beside some others, all tuned by twenty trials; in brackets VSGD's train loss and test metric.

    Args:
        store: of the comparison's records.
    """
    rows = []
    for task in TASKS.values():
        comparison = Comparison(task, store.find)
        ours = find_result(comparison, WIDEST, "vsgd")
        unit = "accuracy, %" if task.metric == "accuracy" else "loss"
        mean = MISSING if ours is None else ours.format_mean("test", task.metric)
        rows.append([f"{task.title}, {unit}", mean, *_format_comparisons(comparison)])
    return format_table(["test", *(ENTRANTS[each].title for each in ("vsgd", *OTHERS))], rows)


def write_tables(page: Path, docs: Path = DOCS) -> None:
    """Write the tables into the page's sections.

    Args:
        page: the README.
        docs: where their sources are.
    """
    replace_section(page, "agreement", [format_agreement(docs / "agreement.md")])
    replace_section(page, "speed", [format_speed(docs / "performance")])
    replace_section(page, "results", [format_results(Store(docs / "results" / FOLDER))])


if __name__ == "__main__":
    write_tables(DOCS.parent / "README.md")
