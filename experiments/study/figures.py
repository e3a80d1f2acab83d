"""Draw the study: paired differences, performance profiles, budgets, and learning rates."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.statistics import Difference
from experiments.study.analysis import Budget, compute_profile
from experiments.study.entrants import ENTRANTS
from reporting.plots import INK, drawing, find_colour, style_optimizers

#: The gaps at which profiles are drawn, in percent.
TOLERANCES = tuple(np.geomspace(0.1, 100, 200).tolist())
#: The optimizers of the crowded plots.
SHOWN = ("constant-vsgd", "calibrated", "vsgd", "adamw-warm", "adamw", "schedule-free-adamw", "muon", "sgd")


def _style(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    styles = style_optimizers(ENTRANTS[name].title for name in names)
    return {name: styles[ENTRANTS[name].title] for name in names}


def draw_forest(rows: Mapping[str, Mapping[str, Difference]], path: Path) -> None:
    """Draw paired differences with their intervals: a row for each task and the last one for all, a colour for each baseline.

    Args:
        rows: by the row's title, the differences by the baseline's entrant, in percent of the way.
        path: of the image.
    """
    with drawing(path, height=0.42 * len(rows) + 1.2) as figure:
        axes = figure.subplots()
        axes.axvline(0, color=INK, linewidth=1)
        for place, (title, differences) in enumerate(rows.items()):
            for offset, (name, found) in enumerate(differences.items()):
                height = place + 0.28 * (offset - (len(differences) - 1) / 2)
                colour = find_colour(ENTRANTS[name].title)
                style = {"color": colour, "marker": "os"[offset % 2], "fillstyle": "full" if title == "all tasks" else "none"}
                label = f"minus {ENTRANTS[name].title}" if place == 0 else None
                axes.errorbar(
                    found.mean, height, xerr=[[found.mean - found.low], [found.high - found.mean]], label=label, **style
                )
        axes.set_yticks(range(len(rows)), list(rows))
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("difference of the gaps, %\n(left: better)")
        figure.legend(loc="outside upper center", ncols=1, title=f"gap of {ENTRANTS['calibrated'].title}")


def draw_curves(
    budgets: Mapping[str, Budget],
    sensitivity: Mapping[str, Mapping[float, float]],
    profiles: Mapping[str, Sequence[float]],
    path: Path,
) -> None:
    """Draw three panels with one legend: profiles of the one setting, budgets of random trials, and learning rates.

    Args:
        budgets: by entrant; the interval of two of them is shaded.
        sensitivity: by entrant, the mean gap of each learning rate relative to the chosen one.
        profiles: by entrant, the gap of each condition.
        path: of the image.
    """
    with drawing(path, height=10.5) as figure:
        profile, budget, rates = figure.subplots(3)
        for name, style in _style(SHOWN).items():
            shares = compute_profile(profiles[name], [each / 100 for each in TOLERANCES])
            profile.plot(TOLERANCES, [100 * share for share in shares], label=ENTRANTS[name].title, **style)
            trials = range(1, len(budgets[name].mean) + 1)
            budget.plot(trials, 100 * np.asarray(budgets[name].mean), **style)
            if name in ("constant-vsgd", "adamw"):
                low, high = (100 * np.asarray(each) for each in (budgets[name].low, budgets[name].high))
                budget.fill_between(trials, low, high, color=style["color"], alpha=0.15, linewidth=0)
            places = sorted(sensitivity[name])
            rates.plot(places, [100 * sensitivity[name][each] for each in places], marker="o", **style)
        profile.set_title("One setting for all tasks")
        profile.set_xscale("log")
        profile.set_xlim(TOLERANCES[0], TOLERANCES[-1])
        profile.set_ylim(0, 101)
        profile.set_xlabel("gap to the best optimizer, %")
        profile.set_ylabel("conditions, %")
        budget.set_title("Random search on each task")
        budget.set_xlabel("trials")
        budget.set_xticks((1, 5, 10, 15, 20))
        budget.set_ylabel("mean test gap, %")
        rates.set_title("Learning rate")
        rates.set_xscale("log", base=2)
        rates.set_xlabel("rate / chosen rate")
        rates.set_ylabel("mean gap, %")
        for axes in (budget, rates):
            axes.set_yscale("log")
            axes.set_yticks((2, 5, 10, 20, 50))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter("")
        figure.legend(loc="outside lower left", ncols=1)


def format_percent(part: float) -> str:
    """Format a part as a percentage with two significant digits.

    Args:
        part: of one; infinite for never.
    """
    return "never" if math.isinf(part) else f"{100 * part:.2g}"
