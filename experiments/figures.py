"""Plot the comparison on small tasks: curves of the tuned entrants, and the metric at each learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.comparison import ENTRANTS, WIDEST, Comparison
from reporting.plots import INK, drawing, style_optimizers

_STYLES = dict(zip(ENTRANTS, style_optimizers(each.title for each in ENTRANTS.values()).values(), strict=True))


def _draw_panels(found: Sequence[Comparison], path: Path, draw: Callable[[Any, Comparison], bool]) -> None:
    """Draw a panel for each task; a panel without data gets the text "not run yet"."""
    rows = math.ceil(len(found) / 2)
    with drawing(path, height=2.6 * rows + 1.7) as figure:
        grid = figure.subplots(rows, 2, squeeze=False)
        for axes, comparison in zip(grid.flat, found, strict=False):
            task = comparison.task
            unit = "accuracy, %" if task.metric == "accuracy" else f"loss, {task.unit}"
            axes.set_title(f"{task.title.partition(', 4 times')[0]}:\n{unit}")
            if not draw(axes, comparison):
                axes.text(0.5, 0.5, "not run yet", transform=axes.transAxes, ha="center")
        for axes in grid.flat[len(found) :]:
            axes.axis("off")
        lines = {line.get_label(): line for axes in grid.flat for line in axes.get_lines() if line.get_label()[0] != "_"}
        if lines:
            figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=2, handlelength=1.4, columnspacing=1)


def _choose_scale(comparison: Comparison) -> float:
    return 100.0 if comparison.task.metric == "accuracy" else 1.0


def _limit_axis(axes: Any, comparison: Comparison, shown: Sequence[float]) -> None:
    """Limit the axis to the given heights and the target, because the start and failures would hide their differences."""
    target = comparison.compute_target()
    finite = [
        each for each in (*shown, *([] if target is None else [_choose_scale(comparison) * target])) if math.isfinite(each)
    ]
    if len(finite) > 1:
        low, high = min(finite), max(finite)
        margin = 0.2 * (high - low) or 1e-3
        axes.set_ylim(low - margin, high + margin)


def _draw_task_curves(axes: Any, comparison: Comparison) -> bool:
    ends = []
    for name, style in _STYLES.items():
        trial = comparison.choose_trial(name, WIDEST)
        records = None if trial is None else comparison.find_results(name, trial)
        if records is None:
            continue
        curves = _choose_scale(comparison) * np.array([record["curve"] for record in records], dtype=np.float64)
        low, middle, high = np.quantile(curves, [0.25, 0.5, 0.75], axis=0)
        steps = comparison.task.every * np.arange(len(middle))
        axes.plot(steps, middle, label=ENTRANTS[name].title, **style)
        axes.fill_between(steps, low, high, color=style["color"], alpha=0.15, linewidth=0)
        ends.append(float(middle[-1]))
    target = comparison.compute_target()
    if target is not None:
        axes.axhline(_choose_scale(comparison) * target, color=INK, linestyle=":", label="target")
    axes.set(xlabel="step")
    _limit_axis(axes, comparison, ends)
    return bool(ends)


def draw_curves(found: Sequence[Comparison], path: Path) -> None:
    """Draw the validation metric over the steps: medians and quartiles of the test seeds, everyone tuned by 20 trials.

    Args:
        found: the comparisons; each gets a panel.
        path: of the image file.
    """
    _draw_panels(found, path, _draw_task_curves)


def _draw_task_rates(axes: Any, comparison: Comparison) -> bool:
    best = []
    for name, style in _STYLES.items():
        tried = comparison.list_tried(name)
        if tried is None:
            continue
        rates, values = tried
        heights = _choose_scale(comparison) * comparison.task.sign * np.array(values)
        axes.plot(rates, heights, marker="o", label=ENTRANTS[name].title, **style)
        best += sorted(heights, key=lambda height: comparison.task.sign * height)[:3]
    axes.set(xlabel="learning rate", xscale="log")
    _limit_axis(axes, comparison, best)
    return bool(best)


def draw_rates(found: Sequence[Comparison], path: Path) -> None:
    """Draw the validation metric at the end over the learning rate: means of the tuning seeds, with the best schedules.

    Args:
        found: the comparisons; each gets a panel.
        path: of the image file.
    """
    _draw_panels(found, path, _draw_task_rates)
