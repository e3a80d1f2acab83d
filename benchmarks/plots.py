"""Plot a step's time over a sweep of shapes, with the lower bound that the memory bandwidth sets."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import shapes
from benchmarks.timing import compute_seconds_per_byte, compute_spread, select_taken

_AXES = {
    "parameters": ("parameters, in 4 tensors", "parameters"),
    "tensors": ("tensors of 64 parameters", "tensors"),
}


class Plot(NamedTuple):
    """A plot.

    Attributes:
        title: what it shows.
        path: of the image file.
    """

    title: str
    path: Path


def _select_sweep(results: Mapping[str, Any], name: str) -> list[Mapping[str, Any]]:
    cells = [cell for key, cell in results["cells"].items() if key.startswith(f"{name}=") and "times" in cell]
    return sorted(cells, key=lambda cell: cell[name])


def draw_sweeps(results: Mapping[str, Any], stem: Path) -> list[Plot]:
    """Draw a plot for each sweep in the results.

    Args:
        results: of a suite.
        stem: the images' path up to the name of the sweep.

    Returns:
        The plots.
    """
    swept = {name: cells for name in shapes.SWEEPS if len(cells := _select_sweep(results, name)) > 1}
    return [_draw_sweep(results, name, cells, stem.with_name(f"{stem.name}-{name}.png")) for name, cells in swept.items()]


def _draw_sweep(results: Mapping[str, Any], name: str, cells: list[Mapping[str, Any]], path: Path) -> Plot:
    from matplotlib.figure import Figure  # not pyplot, which keeps figures and chooses the process's backend

    label, count = _AXES[name]
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for competitor in dict.fromkeys(each for cell in cells for each in cell["times"]["competitors"]):
        points = [(cell[count], cell["times"]["competitors"].get(competitor)) for cell in cells]
        points = [(x, compute_spread(select_taken(found["seconds"]))) for x, found in points if found is not None]
        xs, spreads = zip(*points, strict=True)
        (line,) = axes.plot(xs, [1e3 * each.median for each in spreads], marker="o", markersize=4, label=competitor)
        axes.fill_between(
            xs, [1e3 * each.low for each in spreads], [1e3 * each.high for each in spreads], color=line.get_color(), alpha=0.2
        )
    most = max((each["traffic_bytes"], name) for name, each in cells[-1]["times"]["competitors"].items())[1]
    least = [1e3 * compute_floor(cell["times"], most) for cell in cells]
    axes.plot([cell[count] for cell in cells], least, "k--", label="floor of VSGD: its bytes at the measured bandwidth")
    axes.set(xscale="log", yscale="log", xlabel=label, ylabel="time of a step, ms", title=results["title"].replace("`", ""))
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)
    return Plot(f"{results['title'].replace('`', '')}: time of a step against the number of {count}", path)


def compute_floor(times: Mapping[str, Any], competitor: str) -> float:
    """Compute the seconds that moving a competitor's memory takes, a lower bound on its step.

    Args:
        times: the results on a shape.
        competitor: its name.

    Returns:
        The seconds.
    """
    return float(times["competitors"][competitor]["traffic_bytes"]) * compute_seconds_per_byte(times["memory"])
