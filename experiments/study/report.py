"""Write the study's tables and figures into the pages of results and of the appendix."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from experiments.statistics import Difference, compare_pairs, correct_holm
from experiments.study import figures
from experiments.study.analysis import (
    TARGET_ENTRANT,
    Results,
    compute_budgets,
    count_target_steps,
    list_conditions,
)
from experiments.study.entrants import ENTRANTS, SCHEDULES, Setting
from experiments.study.figures import format_percent
from experiments.study.protocol import Find, compute_grid_gaps
from experiments.study.rates import format_rates_table
from reporting.pages import format_image, format_table, replace_section

#: The optimizer and the baselines of the primary comparison.
SUBJECT = "calibrated"
BASELINES = ("adamw-warm", "adamw")

Settings = Mapping[str, Mapping[str, Setting]]


def _format_setting(setting: Setting) -> str:
    warm_up = f", warm-up {setting.warm_up:.0%}" if setting.warm_up else ""
    return f"{setting.learning_rate:g}{warm_up}"


def format_one_setting_table(every: list[Results], settings: Settings) -> str:
    """Format each optimizer's one setting and its gaps over all conditions.

    Args:
        every: the results of all conditions.
        settings: each optimizer's one setting, by schedule.
    """
    steps = [count_target_steps(results) for results in every]
    rows = []
    for name, entrant in ENTRANTS.items():
        gaps = [results.compute_mean_gap(name) for results in every]
        worst = max(range(len(gaps)), key=gaps.__getitem__)
        chosen = [_format_setting(settings[name][way]) if way in settings[name] else "" for way in SCHEDULES]
        lost = sum(results.count_lost(name) for results in every)
        ratios = [
            each[name] / each[TARGET_ENTRANT]
            for each in steps
            if all(math.isfinite(each[key]) for key in (name, TARGET_ENTRANT))
        ]
        reached = sum(math.isfinite(each[name]) for each in steps)
        where = every[worst].condition
        rows.append(
            [
                entrant.title,
                *chosen,
                format_percent(statistics.fmean(gaps)),
                format_percent(statistics.median(gaps)),
                f"{format_percent(gaps[worst])} ({where.task}, {where.schedule})",
                f"{lost} of {sum(len(results.values[name]) for results in every)}",
                f"{f'{statistics.geometric_mean(ratios):.2f}' if ratios else 'none'} ({reached} of {len(steps)})",
            ]
        )
    rows.sort(key=lambda row: float(row[3]))
    heads = ["optimizer", "rate with cosine", "constant rate", "mean gap, %", "median", "worst (where)", "runs lost"]
    return format_table([*heads, "steps to the target / AdamW's (reached in)"], rows)


def compute_forest(every: list[Results]) -> dict[str, dict[str, Difference]]:
    """Compute the paired differences of the subject from each baseline, in percent of the way.

    Args:
        every: the results of all conditions.

    Returns:
        By the title of each task, and for all of them last; by baseline.
    """
    groups: dict[str, list[Results]] = {}
    for results in every:
        groups.setdefault(results.task.title.partition(", batches")[0], []).append(results)

    def average(name: str, group: list[Results]) -> Any:
        return 100 * np.mean([results.compute_gaps(name) for results in group], axis=0)

    forest = {
        title: {name: compare_pairs(average(SUBJECT, group), average(name, group)) for name in BASELINES}
        for title, group in groups.items()
    }
    return {
        **forest,
        "all tasks": {
            name: compare_pairs([row[name].mean for row in forest.values()], np.zeros(len(forest))) for name in BASELINES
        },
    }


def format_forest_table(forest: Mapping[str, Mapping[str, Difference]]) -> str:
    """Format the differences with raw and corrected verdicts.

    Args:
        forest: by the title of each task, and for all of them; by baseline.
    """
    tasks_alone = {title: row for title, row in forest.items() if title != "all tasks"}
    pairs = [(title, name) for title, row in tasks_alone.items() for name in row]
    corrected = dict(zip(pairs, correct_holm([forest[title][name].p for title, name in pairs]), strict=True))

    def judge(found: Difference, p: float) -> str:
        return "level" if p > 0.05 else "better" if found.mean < 0 else "worse"

    rows = []
    for title, row in forest.items():
        for name, found in row.items():
            holm = judge(found, corrected[title, name]) if (title, name) in corrected else ""
            effect = "" if math.isnan(found.effect) else f"{found.effect:+.1f}"
            interval = f"{found.mean:+.2f} ({found.low:+.2f} to {found.high:+.2f})"
            rows.append([title, ENTRANTS[name].title, interval, judge(found, found.p), holm, effect])
    return format_table(["task", "minus", "difference of gaps, %", "verdict", "after Holm", "in seeds' deviations"], rows)


def format_metric_tables(every: list[Results]) -> Iterator[str]:
    """Format the test metric of each optimizer in each condition, a table for each schedule.

    Args:
        every: the results of all conditions.
    """
    for schedule in SCHEDULES:
        rows = []
        for results in every:
            if results.condition.schedule == schedule:
                task = results.task
                scale = -100 if task.metric == "accuracy" else 1
                means = {name: scale * float(values.mean()) for name, values in results.values.items()}
                best = (max if scale < 0 else min)(means.values())
                cells = [f"**{mean:.4g}**" if mean == best else f"{mean:.4g}" for mean in means.values()]
                unit = "accuracy, %" if task.metric == "accuracy" else task.unit
                rows.append([results.condition.task, unit, *cells])
        heads = [entrant.title for entrant in ENTRANTS.values()]
        yield f"With a {schedule} learning rate:\n\n{format_table(['task', 'test metric', *heads], rows)}"


def compute_sensitivity(find: Find, settings: Settings) -> dict[str, dict[float, float]]:
    """Compute the mean gap of the selection at each learning rate of the cosine, relative to the chosen rate.

    Args:
        find: returns the record of a run of the selection.
        settings: each optimizer's one setting, by schedule.
    """
    gaps = compute_grid_gaps(find)
    found: dict[str, dict[float, float]] = {}
    for name, entrant in ENTRANTS.items():
        chosen = settings[name][entrant.schedules[0]]
        for setting in entrant.list_grid(entrant.schedules[0]):
            if setting.warm_up == chosen.warm_up:
                place = 2.0 ** round(math.log2(setting.learning_rate / chosen.learning_rate))
                found.setdefault(name, {})[place] = statistics.fmean(gaps[name, setting])
    return found


def write_pages(finds: Mapping[str, Find], settings: Settings, results_page: Path, appendix: Path, folder: Path) -> None:
    """Write the figures, and the sections of the study into the pages.

    Args:
        finds: by part of the study, returns the record of a run.
        settings: each optimizer's one setting, by schedule.
        results_page: the page of results.
        appendix: the page of all tables.
        folder: of the figures.

    Raises:
        ValueError: a run is missing.
    """
    every = [Results(condition, settings, finds["one-setting"]) for condition in list_conditions()]
    forest = compute_forest(every)
    budgets = compute_budgets(finds["budget"])
    profiles = {name: [results.compute_mean_gap(name) for results in every] for name in ENTRANTS}
    sensitivity = compute_sensitivity(finds["selection"], settings)
    drawn = {
        "forest": lambda path: figures.draw_forest(forest, path),
        "curves": lambda path: figures.draw_curves(budgets, sensitivity, profiles, path),
    }
    titles = {
        "forest": "Differences of the gap on each task, with 95% intervals",
        "curves": "Conditions within a gap, with one setting; gap over the number of random trials; gap over the learning rate",
    }
    for name, draw in drawn.items():
        draw(folder / f"{name}.svg")
        replace_section(results_page, f"study-{name}", [format_image(titles[name], folder / f"{name}.svg", results_page)])
    replace_section(results_page, "study-table", [format_one_setting_table(every, settings)])
    replace_section(appendix, "study-forest", [format_forest_table(forest)])
    replace_section(appendix, "study-budgets", [_format_budget_table(budgets)])
    replace_section(appendix, "study-metrics", format_metric_tables(every))
    replace_section(appendix, "study-rates", [format_rates_table(finds["rates"])])


def _format_budget_table(budgets: Mapping[str, Any]) -> str:
    shown = (1, 2, 3, 5, 10, 20)
    rows = [
        [ENTRANTS[name].title, *(_format_budget(budget, trials - 1) for trials in shown)] for name, budget in budgets.items()
    ]
    return format_table(["expected test gap, %, after", *(f"{trials} trials" for trials in shown)], rows)


def _format_budget(budget: Any, place: int) -> str:
    mean, low, high = (100 * each[place] for each in (budget.mean, budget.low, budget.high))
    return f"{mean:.1f} ({low:.1f} to {high:.1f})"
