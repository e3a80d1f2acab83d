"""Write the README's numbers, which summarize the pages on agreement, performance and results.

Reads the pages on agreement, results and their appendix and the records in `performance`, and writes the README's sections:

    pip install '.[experiments,optax]'
    python docs/readme.py
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))

from benchmarks.timing import compute_paired_ratio
from experiments.study.entrants import ENTRANTS
from reporting.pages import format_table, replace_section

DOCS = Path(__file__).parent

#: By file: what the suite measures, its baseline, and the names of VSGD and Constant VSGD in it.
SUITES = {
    "torch": ("PyTorch, a fused step", "AdamW(fused=True)", ("VSGD(fused=True)", "ConstantVSGD(fused=True)")),
    "optax": ("JAX, a jitted step on given gradients", "optax.adamw", ("vsgd", "constant_vsgd")),
    "optax-inside": ("JAX, gradients and step jitted", "optax.adamw", ("vsgd", "constant_vsgd")),
    "keras-train-tensorflow": ("Keras on TensorFlow, a train step", "keras AdamW", ("VSGD", "ConstantVSGD")),
    "keras-train-jax": ("Keras on JAX, a train step", "keras AdamW", ("VSGD", "ConstantVSGD")),
    "keras-train-torch": ("Keras on PyTorch, a train step", "keras AdamW", ("VSGD", "ConstantVSGD")),
}
SHAPES = ("conv", "many", "large")

#: The optimizers of the table of results: the recommended one, the closest baseline, and the best one at one setting.
SHOWN = ("constant-vsgd", "adamw-warm", "schedule-free-adamw")


def read_rows(page: Path, section: str = "") -> list[dict[str, str]]:
    """Read the rows of a page's first table, by the heads of its columns.

    Args:
        page: the Markdown page.
        section: where to look for the table; empty: on the whole page.

    Returns:
        A dictionary for each row.
    """
    text = page.read_text(encoding="utf-8")
    if section:
        text = text.partition(f"<!-- {section} -->")[2].partition(f"<!-- /{section} -->")[0]
    lines = [line for line in text.splitlines() if line.startswith("|")]
    header, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    return [dict(zip(header, row, strict=True)) for row in rows]


def parse_number(cell: str) -> float | None:
    """Parse the number at the beginning of a cell.

    Args:
        cell: of a table.

    Returns:
        The number; None where the cell does not begin with one.
    """
    try:
        return float(cell.split()[0])
    except (IndexError, ValueError):
        return None


def format_agreement(page: Path) -> str:
    """Format the largest relative errors of all adapters and engines.

    Args:
        page: the page that `tests/matrix` writes.

    Returns:
        Two sentences.
    """
    rows = [row for row in read_rows(page) if row["runner"] != "bound"]

    def find_largest(column: str) -> str:
        return f"{max(value for row in rows if (value := parse_number(row[column])) is not None):.0e}"

    return (
        "All frameworks run the same update code. Their largest relative error against trajectories of the authors' code is "
        f"{find_largest('golden, float64')} in float64 and {find_largest('golden, float32')} in float32. Over 200 steps of "
        f"training a network in float32, they stay within {find_largest('training, float32')} of the reference. "
        "[All engines](docs/agreement.md)"
    )


def _format_ratio(cell: Mapping[str, Any], name: str, baseline: str) -> str:
    found = cell["times"]["competitors"][name]
    return f"{compute_paired_ratio(found['seconds'], found['against'][baseline]).median:.2f}"


def format_speed(folder: Path) -> str:
    """Format the ratios of VSGD's and Constant VSGD's times of a step to AdamW's of the same framework.

    Args:
        folder: of the records.

    Returns:
        The Markdown table.
    """
    rows = []
    for name, (title, baseline, names) in SUITES.items():
        cells = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))["cells"]
        rows.append([title, *(_format_ratio(cells[shape], each, baseline) for each in names for shape in SHAPES)])
    heads = [f"{title}: {shape}" for title in ("VSGD", "Constant VSGD") for shape in SHAPES]
    return format_table(["time / AdamW", *heads], rows)


def format_results(results_page: Path, appendix: Path) -> str:
    """Format the gaps of a few optimizers, at one setting and after five random trials.

    Args:
        results_page: has the table of one setting.
        appendix: has the table of budgets.

    Returns:
        The Markdown table.
    """
    settings = {row["optimizer"]: row for row in read_rows(results_page, "study-table")}
    budgets = {next(iter(row.values())): row for row in read_rows(appendix, "study-budgets")}
    rows = []
    for name in SHOWN:
        title = ENTRANTS[name].title
        setting, budget = settings[title], budgets[title]
        worst = setting["worst (where)"].split()[0]
        rows.append([title, setting["mean gap, %"], worst, setting["runs lost"], budget["5 trials"].split()[0]])
    heads = ["mean gap with one setting, %", "worst gap, %", "runs lost", "mean gap after 5 trials, %"]
    return format_table(["optimizer", *heads], rows)


def write_tables(page: Path, docs: Path = DOCS) -> None:
    """Write the tables into the page's sections.

    Args:
        page: the README.
        docs: the folder of the pages and records.
    """
    replace_section(page, "agreement", [format_agreement(docs / "agreement.md")])
    replace_section(page, "speed", [format_speed(docs / "performance")])
    replace_section(page, "results", [format_results(docs / "results.md", docs / "appendix.md")])


if __name__ == "__main__":
    write_tables(DOCS.parent / "README.md")
