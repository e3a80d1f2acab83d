"""Write the authors' results and, where there are runs, tables and curves; cells of missing runs contain `MISSING`."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from experiments import datasets, paper, records
from experiments.optimizers import OPTIMIZERS
from reporting.pages import format_image, format_table, replace_section
from reporting.plots import drawing, find_colour

#: The file of the records, in the folder of results.
FILE = "paper.jsonl"

#: The text of a cell without runs.
MISSING = "not run yet"

#: The authors' test accuracies at the end of CIFAR-100, in percent, as read off the curves of their figure: to 0.3 points.
PUBLISHED = {
    "vsgd": {"cifar100-vgg16": 70.0, "cifar100-resnext": 71.4, "cifar100-convmixer": 69.8},
    "adamw": {"cifar100-vgg16": 66.5, "cifar100-resnext": 69.7, "cifar100-convmixer": 67.0},
    "sgd": {"cifar100-vgg16": 67.9, "cifar100-resnext": 68.5, "cifar100-convmixer": 65.4},
}

# The records of each backend, experiment and optimizer, by seed.
_Runs: TypeAlias = dict[str, dict[tuple[str, str], dict[int, Mapping[str, Any]]]]


def group_runs(found: Iterable[Mapping[str, Any]]) -> _Runs:
    """Group the runs that have the paper's settings and data, and leave out the others.

    Args:
        found: the records.

    Returns:
        The records by backend, by experiment and optimizer, and by seed.
    """
    runs: _Runs = {}
    for record in found:
        key = record["key"]
        if paper.has_paper_settings(key):
            cells = runs.setdefault(key["backend"], {})
            cells.setdefault((key["experiment"], key["optimizer"]), {})[key["seed"]] = record
    return runs


def format_cell(runs: Mapping[int, Mapping[str, Any]]) -> str:
    """Format the mean of the last test accuracies in percent, the sample standard deviation and the number of seeds.

    Args:
        runs: the records by seed.

    Returns:
        The text of the cell.
    """
    if not runs:
        return MISSING
    last = [100 * record["curve"]["test_accuracy"][-1] for record in runs.values()]
    spread = f" ± {statistics.stdev(last):.2f}" if len(last) > 1 else ""
    return f"{statistics.mean(last):.2f}{spread} ({len(last)} seed{'s' if len(last) > 1 else ''})"


def format_published_table() -> str:
    """Format the authors' test accuracies."""
    names = list(PUBLISHED["vsgd"])
    rows = [[OPTIMIZERS[optimizer].title, *(f"{cells[name]:.1f}" for name in names)] for optimizer, cells in PUBLISHED.items()]
    heads = (paper.MODELS[paper.EXPERIMENTS[name].model] for name in names)
    return format_table(["CIFAR-100, the authors' test accuracy, %", *heads], rows)


def format_tables(cells: Mapping[tuple[str, str], Mapping[int, Mapping[str, Any]]]) -> list[str]:
    """Format a table of test accuracies for each data set.

    Args:
        cells: the runs of each experiment and optimizer, by seed.
    """
    parts = []
    for data, source in datasets.SOURCES.items():
        names = [name for name, each in paper.EXPERIMENTS.items() if each.data == data]
        rows = [
            [OPTIMIZERS[optimizer].title, *(format_cell(cells.get((name, optimizer), {})) for name in names)]
            for optimizer in paper.COMPARED
        ]
        parts.append(
            format_table(
                [f"{source.title}, test accuracy, %", *(paper.MODELS[paper.EXPERIMENTS[name].model] for name in names)], rows
            )
        )
    return parts


def draw_curves(cells: Mapping[tuple[str, str], Mapping[int, Mapping[str, Any]]], data: str, path: Path) -> bool:
    """Draw training loss and test accuracy over the steps: the means over the seeds, and the ranges.

    Args:
        cells: the runs of each experiment and optimizer, by seed.
        data: a key of `datasets.SOURCES`.
        path: of the image file.

    Returns:
        Whether there was anything to draw.
    """
    names = [name for name, each in paper.EXPERIMENTS.items() if each.data == data and any(name == run for run, _ in cells)]
    if not names:
        return False
    with drawing(path, height=1 + 2.8 * len(names)) as figure:
        axes = figure.subplots(len(names), 2, sharex="row", squeeze=False)
        for row, name in zip(axes, names, strict=True):
            row[0].set(ylabel=paper.MODELS[paper.EXPERIMENTS[name].model], yscale="log")
            for optimizer in paper.COMPARED:
                runs = list(cells.get((name, optimizer), {}).values())
                if runs:
                    title = OPTIMIZERS[optimizer].title
                    _draw_mean(row[0], runs, "loss", find_colour(title), title)
                    _draw_mean(row[1], runs, "test_accuracy", find_colour(title), title)
        axes[0, 0].set_title("training loss")
        axes[0, 1].set_title("test accuracy")
        for panel in axes[-1]:
            panel.set_xlabel("step")
        lines = {line.get_label(): line for panel in axes[:, 0] for line in panel.get_lines()}
        figure.legend(lines.values(), lines.keys(), ncols=2, loc="outside lower center")
    return True


def _draw_mean(axes: Any, runs: Sequence[Mapping[str, Any]], metric: str, color: str, label: str) -> None:
    steps = runs[0]["curve"]["step"]  # the same in all, like the settings
    at_each = list(zip(*(run["curve"][metric] for run in runs), strict=True))
    axes.plot(steps, [statistics.mean(each) for each in at_each], color=color, label=label)
    axes.fill_between(steps, list(map(min, at_each)), list(map(max, at_each)), color=color, alpha=0.2)


def _describe_machines(cells: Mapping[tuple[str, str], Mapping[int, Mapping[str, Any]]]) -> str:
    found = [record["environment"] for runs in cells.values() for record in runs.values()]
    texts = [
        f"{each['gpu'] or each['cpu']} with {', '.join(f'{name} {number}' for name, number in each['versions'].items())}"
        for each in found
    ]
    return "; ".join(dict.fromkeys(texts))


def write_page(results: Path, page: Path) -> None:
    """Write tables and curves into the page's section "paper".

    Args:
        results: the folder of the records and of the plots.
        page: the Markdown page; a missing page is created.
    """
    runs = group_runs(records.read_jsonl(results / FILE))
    parts = [format_published_table()]
    for backend, cells in runs.items():
        parts += [f"On Keras' {backend} backend, {_describe_machines(cells)}:", *format_tables(cells)]
        for data, source in datasets.SOURCES.items():
            path = results / f"paper-{data}-{backend}.svg"
            if draw_curves(cells, data, path):
                parts.append(format_image(f"{source.title}: training loss and test accuracy, {backend}", path, page))
    replace_section(page, "paper", parts)
