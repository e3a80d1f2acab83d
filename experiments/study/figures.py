"""Draw the study: paired differences, budgets, learning rates, and performance profiles."""

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
SHOWN = ("calibrated", "vsgd", "adamw-warm", "adamw", "schedule-free-adamw", "muon", "sgd")


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
        axes.set_xlabel(f"gap of {ENTRANTS['calibrated'].title}\nminus the other's, % of the way (left: better)")
        figure.legend(loc="outside upper center", ncols=1)


def draw_budgets(budgets: Mapping[str, Budget], path: Path) -> None:
    """Draw the expected gap over the number of random trials, with the intervals of two optimizers.

    Args:
        budgets: by entrant.
        path: of the image.
    """
    with drawing(path, height=4.2) as figure:
        axes = figure.subplots()
        for name, style in _style(SHOWN).items():
            trials = range(1, len(budgets[name].mean) + 1)
            axes.plot(trials, 100 * np.asarray(budgets[name].mean), label=ENTRANTS[name].title, **style)
            if name in ("calibrated", "adamw"):
                low, high = (100 * np.asarray(each) for each in (budgets[name].low, budgets[name].high))
                axes.fill_between(trials, low, high, color=style["color"], alpha=0.15, linewidth=0)
        axes.set_yscale("log")
        axes.set_xlabel("random trials")
        axes.set_ylabel("expected test gap, % of the way")
        figure.legend(loc="outside lower center", ncols=1)


def draw_sensitivity(gaps: Mapping[str, Mapping[float, float]], path: Path) -> None:
    """Draw the mean gap over the learning rate, relative to the chosen one.

    Args:
        gaps: by entrant, the mean gap of each learning rate relative to the chosen rate.
        path: of the image.
    """
    with drawing(path, height=4.2) as figure:
        axes = figure.subplots()
        for name, style in _style([each for each in SHOWN if each in gaps]).items():
            places = sorted(gaps[name])
            axes.plot(places, [100 * gaps[name][each] for each in places], label=ENTRANTS[name].title, marker="o", **style)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel("learning rate / the chosen one")
        axes.set_ylabel("mean validation gap, % of the way")
        figure.legend(loc="outside lower center", ncols=1)


def draw_profiles(gaps: Mapping[str, Sequence[float]], path: Path) -> None:
    """Draw performance profiles: the share of the conditions in which an optimizer's gap is within a tolerance.

    Args:
        gaps: by entrant, the gap of each condition.
        path: of the image.
    """
    with drawing(path, height=4.6) as figure:
        axes = figure.subplots()
        for name, style in _style(SHOWN).items():
            shares = compute_profile(gaps[name], [each / 100 for each in TOLERANCES])
            axes.plot(TOLERANCES, [100 * share for share in shares], label=ENTRANTS[name].title, **style)
        axes.set_xscale("log")
        axes.set_xlim(TOLERANCES[0], TOLERANCES[-1])
        axes.set_ylim(0, 101)
        axes.set_xlabel("gap to the best optimizer, % of the way")
        axes.set_ylabel("conditions within that gap, %")
        figure.legend(loc="outside lower center", ncols=1)


def format_percent(part: float) -> str:
    """Format a part as a percentage with two significant digits.

    Args:
        part: of one; infinite for never.
    """
    return "never" if math.isinf(part) else f"{100 * part:.2g}"
