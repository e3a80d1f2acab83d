"""Write the study's tables and figures into the pages of results and of the appendix."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.statistics import Difference, compare_pairs, correct_holm
from experiments.study import figures
from experiments.study.analysis import (
    Results,
    compute_budgets,
    compute_profile,
    count_target_steps,
    list_conditions,
)
from experiments.study.entrants import ENTRANTS, SCHEDULES, Setting
from experiments.study.figures import format_percent
from experiments.study.protocol import Find, compute_edge_gap, compute_grid_gaps, step_beyond_edge
from experiments.study.rates import format_rates_table, list_rate_runs
from reporting.pages import format_image, format_table, replace_section

#: The optimizer and the baselines of the primary comparison.
SUBJECT = "calibrated"
BASELINES = ("adamw-warm", "adamw")
#: The optimizer that the pages recommend; its comparison was not preregistered.
ALSO_COMPARED = "constant-vsgd"

Settings = Mapping[str, Mapping[str, Setting]]


def _format_setting(setting: Setting) -> str:
    return f"{setting.learning_rate:g}{f', warm-up {setting.warm_up:.0%}' if setting.warm_up else ''}"


def format_edges_table(finds: Mapping[str, Find], settings: Settings) -> str:
    """Format the choices at an edge of the grid, with the gaps of the selection there and one step beyond.

    Args:
        finds: by part of the study, returns the record of a run.
        settings: each optimizer's one setting, by schedule.
    """
    gaps = compute_grid_gaps(finds["selection"])
    rows = []
    for name, chosen in settings.items():
        for way, setting in chosen.items():
            if (beyond := step_beyond_edge(name, setting)) is not None:
                further = compute_edge_gap(name, beyond, finds["selection"], finds["edges"])
                here = format_percent(statistics.fmean(gaps[name, setting]))
                rows.append([ENTRANTS[name].title, way, _format_setting(setting), here, format_percent(further)])
    return format_table(["optimizer", "rate", "chosen", "mean gap, %", "one step beyond"], rows)


def format_one_setting_table(every: list[Results], settings: Settings) -> str:
    """Format each optimizer's one setting, its gaps over all conditions, and its steps to the target.

    Args:
        every: the results of all conditions.
        settings: each optimizer's one setting, by schedule.
    """
    steps = [found for found in map(count_target_steps, every) if found is not None]
    rows = []
    for name, entrant in ENTRANTS.items():
        gaps = [results.compute_mean_gap(name) for results in every]
        worst = max(range(len(gaps)), key=gaps.__getitem__)
        chosen = [_format_setting(settings[name][way]) if way in settings[name] else "" for way in SCHEDULES]
        lost = sum(results.count_lost(name) for results in every)
        parts = [each[name] for each in steps]
        where = every[worst].condition
        rows.append(
            [
                entrant.title,
                *chosen,
                format_percent(statistics.fmean(gaps)),
                format_percent(statistics.median(gaps)),
                f"{format_percent(gaps[worst])} ({where.task}, {where.schedule})",
                f"{lost} of {sum(len(results.values[name]) for results in every)}",
                f"{format_percent(statistics.median(parts))} ({sum(map(math.isfinite, parts))} of {len(parts)})",
            ]
        )
    rows.sort(key=lambda row: float(row[3]))
    heads = ["optimizer", "rate with cosine", "constant rate", "mean gap, %", "median", "worst (where)", "runs lost"]
    return format_table([*heads, "median steps to the target, % of the run (reached in)"], rows)


def compute_forest(every: list[Results], baselines: Sequence[str], subject: str = SUBJECT) -> dict[str, dict[str, Difference]]:
    """Compute the paired differences of an optimizer from each baseline, in percent of the way.

    Args:
        every: the results of all conditions.
        baselines: keys of `ENTRANTS`.
        subject: a key of `ENTRANTS`.

    Returns:
        By the title of each task, and for all of them last; by baseline.
    """
    groups: dict[str, list[Results]] = {}
    for results in every:
        groups.setdefault(results.task.title.partition(", batches")[0], []).append(results)

    def average(name: str, group: list[Results]) -> Any:
        return 100 * np.mean([results.compute_gaps(name) for results in group], axis=0)

    forest = {
        title: {name: compare_pairs(average(subject, group), average(name, group)) for name in baselines}
        for title, group in groups.items()
    }
    return {
        **forest,
        "all tasks": {
            name: compare_pairs([row[name].mean for row in forest.values()], np.zeros(len(forest))) for name in baselines
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

    rows = []
    for title, row in forest.items():
        for name, found in row.items():
            holm = _judge(found, corrected[title, name]) if (title, name) in corrected else ""
            effect = "" if math.isnan(found.effect) else f"{found.effect:+.1f}"
            rows.append([title, ENTRANTS[name].title, _format_interval(found), _judge(found, found.p), holm, effect])
    return format_table(["task", "minus", "difference of gaps, %", "verdict", "after Holm", "in seeds' deviations"], rows)


def _judge(found: Difference, p: float) -> str:
    return "level" if p > 0.05 else "better" if found.mean < 0 else "worse"


def _format_interval(found: Difference) -> str:
    return f"{found.mean:+.2f} ({found.low:+.2f} to {found.high:+.2f})"


def format_comparisons_table(every: list[Results], subject: str) -> str:
    """Format the comparison of an optimizer with every other one, over all tasks.

    Args:
        every: the results of all conditions.
        subject: a key of `ENTRANTS`.
    """
    others = [name for name in ENTRANTS if name != subject]
    forest = compute_forest(every, others, subject)
    total = forest.pop("all tasks")
    rows = []
    for name in others:
        better = sum(row[name].mean < 0 for row in forest.values())
        verdict = _judge(total[name], total[name].p)
        rows.append([ENTRANTS[name].title, _format_interval(total[name]), verdict, f"{better} of {len(forest)}"])
    return format_table([f"{ENTRANTS[subject].title} minus", "mean difference of gaps, %", "verdict", "better on tasks"], rows)


def format_profiles_table(every: list[Results]) -> str:
    """Format the share of the conditions within some gaps of the best optimizer.

    Args:
        every: the results of all conditions.
    """
    within = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
    rows = []
    for name, entrant in ENTRANTS.items():
        shares = compute_profile([results.compute_mean_gap(name) for results in every], within)
        rows.append([entrant.title, *(f"{share:.0%}" for share in shares)])
    return format_table(["conditions within a gap of", *(f"{each:.0%}" for each in within)], rows)


def format_sensitivity_table(find: Find, settings: Settings) -> str:
    """Format the mean gap of the selection at each learning rate, relative to the chosen one.

    Args:
        find: returns the record of a run of the selection.
        settings: each optimizer's one setting, by schedule.
    """
    found = {way: compute_sensitivity(find, settings, way) for way in SCHEDULES}
    places = sorted({place for gaps in found.values() for each in gaps.values() for place in each})
    rows = [
        [ENTRANTS[name].title, way, *(format_percent(gaps[place]) if place in gaps else "" for place in places)]
        for way, curves in found.items()
        for name, gaps in curves.items()
    ]
    return format_table(["mean gap, % at rate / chosen rate", "rate", *(f"{place:g}" for place in places)], rows)


def format_warm_ups_table(find: Find) -> str:
    """Format the mean gap of the selection at the best learning rate, without a warm-up and with one.

    Args:
        find: returns the record of a run of the selection.
    """
    gaps = compute_grid_gaps(find)
    rows = []
    for name, entrant in ENTRANTS.items():
        for way in entrant.schedules:
            best = {
                part: min(statistics.fmean(gaps[name, each]) for each in entrant.list_grid(way) if each.warm_up == part)
                for part in entrant.warm_ups
            }
            rows.append([entrant.title, way, *(format_percent(best[part]) if part in best else "" for part in (0.0, 0.2))])
    return format_table(["mean gap at the best rate, %", "rate", "no warm-up", "20% warm-up"], rows)


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


def compute_sensitivity(find: Find, settings: Settings, schedule: str) -> dict[str, dict[float, float]]:
    """Compute the mean gap of the selection at each learning rate, relative to the chosen rate, with the chosen warm-up.

    Args:
        find: returns the record of a run of the selection.
        settings: each optimizer's one setting, by schedule.
        schedule: of the learning rate; schedule-free optimizers have one of their own.

    Returns:
        The gaps by entrant and relative rate; schedule-free optimizers are under "constant" alone.
    """
    gaps = compute_grid_gaps(find)
    found: dict[str, dict[float, float]] = {}
    for name, entrant in ENTRANTS.items():
        if schedule in entrant.schedules:
            chosen = settings[name][schedule]
            for setting in entrant.list_grid(schedule):
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
        MissingRunError: a run of the preregistered parts is missing.
    """
    every = [Results(condition, settings, finds) for condition in list_conditions()]
    forest = compute_forest(every, BASELINES)
    budgets = compute_budgets(finds)
    profiles = {name: [results.compute_mean_gap(name) for results in every] for name in ENTRANTS}
    free, cosine = (compute_sensitivity(finds["selection"], settings, way) for way in ("constant", "cosine"))
    sensitivity = free | cosine  # the cosine's, but for schedule-free optimizers
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
    replace_section(appendix, "study-edges", [format_edges_table(finds, settings)])
    replace_section(appendix, "study-comparisons", [format_comparisons_table(every, name) for name in (SUBJECT, ALSO_COMPARED)])
    replace_section(appendix, "study-profiles", [format_profiles_table(every)])
    replace_section(appendix, "study-budgets", [_format_budget_table(budgets)])
    replace_section(appendix, "study-sensitivity", [format_sensitivity_table(finds["selection"], settings)])
    replace_section(appendix, "study-warm-ups", [format_warm_ups_table(finds["selection"])])
    replace_section(appendix, "study-metrics", format_metric_tables(every))
    if any(finds["rates"](run) for run in list_rate_runs(SUBJECT)):
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
