"""Write the README's tables, which summarize the pages on agreement, performance and results.

The script reads `docs/agreement.md` and the measurements in `docs/performance` and `docs/results`:

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

from benchmarks.report import replace_section, table
from benchmarks.timing import paired_ratio
from experiments.comparison import ENTRANTS, WIDEST, Comparison
from experiments.paper_report import MISSING
from experiments.report import in_a_word, told
from experiments.spread import FOLDER, Store
from experiments.tasks import TASKS

DOCS = Path(__file__).parent

#: Framework of the runners of `tests/matrix`, by the prefix of their names.
FRAMEWORKS = {
    "numpy": "NumPy",
    "torch-": "PyTorch",
    "optax-": "JAX, optax",
    "keras-tensorflow": "Keras on TensorFlow",
    "keras-jax": "Keras on JAX",
    "keras-torch": "Keras on PyTorch",
    "mlx": "MLX",
}
#: Columns of the page on agreement that the README shows.
COLUMNS = ("golden, float64", "golden, float32", "training, float64", "training, float32")

#: By file: the measurement, its baseline, and the names of VSGD and Constant VSGD in the file.
SUITES = {
    "torch": ("PyTorch, a fused step", "AdamW(fused=True)", ("VSGD(fused=True)", "ConstantVSGD(fused=True)")),
    "optax": ("JAX, a step under `jit`", "optax.adamw", ("vsgd", "constant_vsgd")),
    "keras-train-tensorflow": ("Keras on TensorFlow, a train step", "keras AdamW", ("VSGD", "ConstantVSGD")),
    "keras-train-jax": ("Keras on JAX, a train step", "keras AdamW", ("VSGD", "ConstantVSGD")),
    "keras-train-torch": ("Keras on PyTorch, a train step", "keras AdamW", ("VSGD", "ConstantVSGD")),
}
SHAPES = ("conv", "many", "large")

#: Entrants that the README compares with VSGD.
OTHERS = ("adamw", "adamw-warm", "sgd")


def read_rows(page: Path) -> list[dict[str, str]]:
    """Read the rows of a page's first table.

    Args:
        page: page in Markdown.

    Returns:
        For each row, its cells by the heads of the columns.
    """
    lines = [line for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    header, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    return [dict(zip(header, row, strict=True)) for row in rows]


def parse_number(cell: str) -> float | None:
    """Return the number at the start of a table's cell, or None if there is no number.

    Args:
        cell: the cell's text.
    """
    try:
        return float(cell.split()[0])
    except (IndexError, ValueError):
        return None


def format_agreement(page: Path) -> str:
    """Format the largest error of any runner of each framework.

    Args:
        page: page that `tests/matrix` wrote.

    Returns:
        A table in Markdown.
    """
    found = read_rows(page)
    (bound,) = (row for row in found if row["runner"] == "bound")
    rows = [["bound of the tests", *(bound[column] for column in COLUMNS)]]
    for prefix, title in FRAMEWORKS.items():
        runners = [row for row in found if row["runner"].startswith(prefix)]
        columns = [[value for row in runners if (value := parse_number(row[column])) is not None] for column in COLUMNS]
        if runners:
            rows.append([title, *(f"{max(column):.0e}" if column else "reference" for column in columns)])
    return table(["", *COLUMNS], rows)


def _format_ratio(cell: Mapping[str, Any], name: str, baseline: str) -> str:
    found = cell["times"]["competitors"][name]
    return f"{paired_ratio(found['seconds'], found['against'][baseline]).median:.2f}"


def format_speed(folder: Path) -> str:
    """Format the ratio of VSGD's and Constant VSGD's step time to AdamW's in the same framework.

    Args:
        folder: folder of the measurements.

    Returns:
        A table in Markdown.
    """
    rows = []
    for name, (title, baseline, optimizers) in SUITES.items():
        cells = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))["cells"]
        rows.append(
            [title, *(_format_ratio(cells[shape], optimizer, baseline) for optimizer in optimizers for shape in SHAPES)]
        )
    heads = [f"{title}: {shape}" for title in ("VSGD", "Constant VSGD") for shape in SHAPES]
    return table(["time / AdamW", *heads], rows)


def _compare_others(comparison: Comparison) -> Iterator[str]:
    metric = comparison.task.metric
    vsgd = told(comparison, WIDEST, "vsgd")
    for name in OTHERS:
        other = told(comparison, WIDEST, name)
        if vsgd is None or other is None:
            yield MISSING
            continue
        words = [in_a_word(vsgd, other, *which) for which in (("train", "loss"), ("test", metric))]
        yield f"{other.mean('test', metric)} ({', '.join(words)})"


def format_results(store: Store) -> str:
    """Format the test metrics of VSGD and others on the small tasks, all tuned by twenty trials.

    Parentheses after another optimizer's metric compare VSGD's train loss and test metric with it.

    Args:
        store: the comparison's records.

    Returns:
        A table in Markdown.
    """
    rows = []
    for task in TASKS.values():
        comparison = Comparison(task, store.find)
        vsgd = told(comparison, WIDEST, "vsgd")
        unit = "accuracy, %" if task.metric == "accuracy" else "loss"
        mean = MISSING if vsgd is None else vsgd.mean("test", task.metric)
        rows.append([f"{task.title}, {unit}", mean, *_compare_others(comparison)])
    return table(["test", *(ENTRANTS[name].title for name in ("vsgd", *OTHERS))], rows)


def write(page: Path, docs: Path = DOCS) -> None:
    """Write the tables into the page's sections.

    Args:
        page: the README.
        docs: folder of the tables' sources.
    """
    replace_section(page, "agreement", [format_agreement(docs / "agreement.md")])
    replace_section(page, "speed", [format_speed(docs / "performance")])
    replace_section(page, "results", [format_results(Store(docs / "results" / FOLDER))])


if __name__ == "__main__":
    write(DOCS.parent / "README.md")
