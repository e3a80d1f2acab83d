"""Plot a step's time over a sweep of shapes, with the lower bound that the memory bandwidth sets."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import shapes
from benchmarks.timing import compute_seconds_per_byte, compute_spread, select_taken
from reporting.plots import INK, drawing, style_optimizers

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
    return [_draw_sweep(results, name, cells, stem.with_name(f"{stem.name}-{name}.svg")) for name, cells in swept.items()]


def _draw_sweep(results: Mapping[str, Any], name: str, cells: list[Mapping[str, Any]], path: Path) -> Plot:
    label, count = _AXES[name]
    title = results["title"].replace("`", "")
    with drawing(path, height=5) as figure:
        axes = figure.subplots()
        competitors = dict.fromkeys(each for cell in cells for each in cell["times"]["competitors"])
        for competitor, style in style_optimizers(competitors).items():
            points = [(cell[count], cell["times"]["competitors"].get(competitor)) for cell in cells]
            points = [(x, compute_spread(select_taken(found["seconds"]))) for x, found in points if found is not None]
            xs, spreads = zip(*points, strict=True)
            axes.plot(xs, [1e3 * each.median for each in spreads], marker="o", label=competitor, **style)
            low, high = (
                [1e3 * each for each in ends] for ends in zip(*((each.low, each.high) for each in spreads), strict=True)
            )
            axes.fill_between(xs, low, high, color=style["color"], alpha=0.2, linewidth=0)
        most = max((each["traffic_bytes"], name) for name, each in cells[-1]["times"]["competitors"].items())[1]
        least = [1e3 * compute_floor(cell["times"], most) for cell in cells]
        floor = "floor of VSGD: its bytes at the measured bandwidth"
        axes.plot([cell[count] for cell in cells], least, color=INK, linestyle="dashed", label=floor)
        framework, _, _ = title.partition(",")
        axes.set(xscale="log", yscale="log", xlabel=label, ylabel="ms", title=f"{framework}: time of a step")
        figure.legend(loc="outside lower center")
    return Plot(f"{title}: time of a step against the number of {count}", path)


def compute_floor(times: Mapping[str, Any], competitor: str) -> float:
    """Compute the seconds that moving a competitor's memory takes, a lower bound on its step.

    Args:
        times: the results on a shape.
        competitor: its name.

    Returns:
        The seconds.
    """
    return float(times["competitors"][competitor]["traffic_bytes"]) * compute_seconds_per_byte(times["memory"])
