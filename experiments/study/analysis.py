"""Analyse the study: gaps, performance profiles, paired differences, budgets of random trials, and steps to a target."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from experiments import tasks
from experiments.statistics import count_steps_to_target
from experiments.study.entrants import ENTRANTS, SCHEDULES, Setting
from experiments.study.protocol import (
    TEST_SEEDS,
    TEST_TASKS,
    TRIAL_SEED,
    TRIALS,
    Find,
    Run,
    compute_gap,
    compute_untrained,
    get_metric,
    get_record,
    list_budget_runs,
)

#: The target is this part of the way from AdamW's first validation metric to its last, the median over the seeds.
TARGET_PART = 0.95
TARGET_ENTRANT = "adamw"
#: Random orders of the trials for the intervals of a budget.
_ORDERS = 2000


class Condition(NamedTuple):
    """The circumstances under which optimizers are compared.

    Attributes:
        task: the name of the task, with "@4" if it is four times as long.
        schedule: of the learning rate; a schedule-free optimizer's run counts under both schedules.
    """

    task: str
    schedule: str

    def list_runs(self, entrant: str, settings: Mapping[str, Mapping[str, Setting]]) -> list[Run]:
        """List an optimizer's runs, one for each seed.

        Args:
            entrant: a key of `ENTRANTS`.
            settings: each optimizer's one setting, by schedule.
        """
        schedule = self.schedule if self.schedule in ENTRANTS[entrant].schedules else ENTRANTS[entrant].schedules[0]
        return [Run(self.task, entrant, settings[entrant][schedule], seed) for seed in TEST_SEEDS]


def list_conditions() -> list[Condition]:
    """List the conditions: each new task, length and schedule."""
    return [Condition(name, schedule) for name in TEST_TASKS for schedule in SCHEDULES]


class Results:
    """The test metrics of all optimizers under one condition; low is better.

    Args:
        condition: the condition.
        settings: each optimizer's one setting, by schedule.
        finds: by part of the study, returns the record of a run.

    Raises:
        MissingRunError: a run is missing.
    """

    def __init__(self, condition: Condition, settings: Mapping[str, Mapping[str, Setting]], finds: Mapping[str, Find]) -> None:
        self.condition = condition
        self.task = tasks.find_task(condition.task)
        self.records = {
            name: [get_record(finds["one-setting"], run) for run in condition.list_runs(name, settings)] for name in ENTRANTS
        }
        self.untrained = compute_untrained(condition.task, TEST_SEEDS, finds["untrained"])
        #: A run that ends worse than no training, or diverges, counts as no training.
        self.values = {
            name: np.array([min(get_metric(self.task, each, "test"), self.untrained) for each in records])
            for name, records in self.records.items()
        }
        self.best = min(float(each.mean()) for each in self.values.values())

    def compute_gaps(self, entrant: str) -> NDArray[np.float64]:
        """Compute the gap of each seed, which may be negative where a run is better than the best mean.

        Args:
            entrant: a key of `ENTRANTS`.
        """
        return (self.values[entrant] - self.best) / (self.untrained - self.best)

    def compute_mean_gap(self, entrant: str) -> float:
        """Compute the gap of the mean metric, at most 1.

        Args:
            entrant: a key of `ENTRANTS`.
        """
        return compute_gap(float(self.values[entrant].mean()), self.untrained, self.best)

    def count_lost(self, entrant: str) -> int:
        """Count the runs that diverged or ended no better than untrained.

        Args:
            entrant: a key of `ENTRANTS`.
        """
        return int(np.sum(self.values[entrant] >= self.untrained))


def compute_profile(gaps: Sequence[float], tolerances: Sequence[float]) -> list[float]:
    """Compute a performance profile: the share of the conditions in which the gap is within each tolerance.

    Args:
        gaps: of an optimizer, one for each condition.
        tolerances: in rising order.
    """
    return [sum(gap <= tolerance for gap in gaps) / len(gaps) for tolerance in tolerances]


class Budget(NamedTuple):
    """The expected gap of the best of some random trials, by their number.

    Attributes:
        mean: over the tasks, exact over all subsets of the trials.
        low: the 2.5% quantile over random orders of the trials.
        high: the 97.5% quantile.
    """

    mean: list[float]
    low: list[float]
    high: list[float]


def compute_budgets(finds: Mapping[str, Find], most: int = 20) -> dict[str, Budget]:
    """Compute what random search finds with 1 to `most` trials: the test gap of the trial with the best validation metric.

    The gap of a task refers to the best test metric of all trials of all optimizers.

    Args:
        finds: by part of the study, returns the record of a run.
        most: the largest number of trials.

    Raises:
        MissingRunError: a run is missing.
    """
    found: dict[str, dict[str, list[Mapping[str, Any]]]] = {}
    for name in ENTRANTS:
        for run in list_budget_runs(name):
            found.setdefault(run.task, {}).setdefault(name, []).append(get_record(finds["budget"], run))
    curves: dict[str, list[tuple[list[float], NDArray[np.float64]]]] = {name: [] for name in ENTRANTS}
    for place, (task_name, entrants) in enumerate(found.items()):
        task = tasks.find_task(task_name)
        untrained = compute_untrained(task_name, range(TRIAL_SEED, TRIAL_SEED + TRIALS), finds["untrained"])
        tests = {name: [get_metric(task, each, "test") for each in records] for name, records in entrants.items()}
        best = min(min(each) for each in tests.values())
        for name, records in entrants.items():
            gaps = np.array([compute_gap(each, untrained, best) for each in tests[name]])
            ranked = np.argsort([get_metric(task, each, "validation") for each in records], kind="stable")
            curves[name].append((compute_expected_best(gaps[ranked], most), _draw_best(gaps[ranked], most, place)))
    budgets = {}
    for name, parts in curves.items():
        drawn = np.mean([each for _, each in parts], axis=0)
        low, high = np.quantile(drawn, (0.025, 0.975), axis=0)
        mean = np.mean([each for each, _ in parts], axis=0)
        budgets[name] = Budget(mean.tolist(), low.tolist(), high.tolist())
    return budgets


def compute_expected_best(gaps: NDArray[np.float64], most: int) -> list[float]:
    """Compute the mean gap of the best trial of a subset, over all subsets of each size.

    Args:
        gaps: of the trials, ranked from the best validation metric to the worst.
        most: the largest size.
    """
    count = len(gaps)
    # The trial of rank i is the best of a subset of size k if the other k - 1 are from the count - 1 - i worse ones.
    return [
        sum(math.comb(count - 1 - rank, size - 1) * gap for rank, gap in enumerate(gaps.tolist())) / math.comb(count, size)
        for size in range(1, most + 1)
    ]


def _draw_best(ranked: NDArray[np.float64], most: int, seed: int) -> NDArray[np.float64]:
    """Draw random orders, and return the gap of the best trial so far, a row for each order."""
    generator = np.random.default_rng(seed)
    orders = generator.permuted(np.tile(np.arange(len(ranked)), (_ORDERS, 1)), axis=1)[:, :most]
    return ranked[np.minimum.accumulate(orders, axis=1)]


def count_target_steps(results: Results) -> dict[str, float] | None:
    """Count the steps to the target, the median over the seeds as a part of the run; infinite where most runs miss it.

    Args:
        results: of a condition.

    Returns:
        The parts by entrant; None if the target's own optimizer does not improve, so that there is no target.
    """
    task = results.task
    curves = [each["curve"] for each in results.records[TARGET_ENTRANT] if None not in each["curve"]]
    if not curves:
        return None
    first, last = (statistics.median(curve[place] for curve in curves) for place in (0, -1))
    if task.sign * (last - first) >= 0:
        return None
    target = first + TARGET_PART * (last - first)
    found = {}
    for name, records in results.records.items():
        steps = [count_steps_to_target(each["curve"], task.every, target, task.sign) for each in records]
        found[name] = statistics.median(math.inf if each is None else each for each in steps) / task.steps
    return found
