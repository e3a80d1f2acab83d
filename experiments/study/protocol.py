"""Define the protocol of the study: its seeds, its runs, and the rule that chooses each optimizer's one setting."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from experiments import tasks
from experiments.study.entrants import ENTRANTS, Setting
from experiments.study.tasks import NEW_TASKS

#: Each optimizer's one setting is the best of its grid on these tasks and this seed.
SELECTION_TASKS = tuple(tasks.TASKS)
SELECTION_SEED = 300
#: The new tasks run with these seeds, whose weights and batches no choice has seen.
TEST_SEEDS = tuple(range(400, 410))
#: How many times as long as a task's own length.
LENGTHS = (1, 4)
#: The tasks of the one setting.
TEST_TASKS = tuple(name if length == 1 else f"{name}@{length}" for name in NEW_TASKS for length in LENGTHS)
#: Budgets are for the smaller batches, which come first.
BUDGET_TASKS = tuple(NEW_TASKS)[::2]
#: How many settings random search draws for each optimizer and task, and the seed of the first one.
TRIALS = 40
TRIAL_SEED = 500


class Run(NamedTuple):
    """A run of the study.

    Attributes:
        task: the name of the task, with "@4" if it is four times as long.
        entrant: a key of `ENTRANTS`.
        setting: the hyperparameters.
        seed: of weights and batches.
    """

    task: str
    entrant: str
    setting: Setting
    seed: int

    @property
    def key(self) -> dict[str, Any]:
        """The key of the run's record."""
        task = tasks.find_task(self.task)
        return {
            "task": task.name,
            "edition": task.compute_edition(),
            "steps": task.steps,
            "entrant": self.entrant,
            **self.setting._asdict(),
            "seed": self.seed,
        }


Find = Callable[[Run], Mapping[str, Any] | None]


class MissingRunError(ValueError):
    """A run that the analysis needs has no record."""


def get_record(find: Find, run: Run) -> Mapping[str, Any]:
    """Return the record of a run.

    Args:
        find: returns the record of a run, or None.
        run: the run.

    Raises:
        MissingRunError: the run has no record.
    """
    record = find(run)
    if record is None:
        raise MissingRunError(f"the run {run} is missing, but the analysis needs all runs")
    return record


def list_selection_runs() -> Iterator[Run]:
    """Yield the runs that choose each optimizer's one setting."""
    for task in SELECTION_TASKS:
        for name, entrant in ENTRANTS.items():
            for schedule in entrant.schedules:
                for setting in entrant.list_grid(schedule):
                    yield Run(task, name, setting, SELECTION_SEED)


def list_one_setting_runs(entrant: str, settings: Mapping[str, Setting]) -> Iterator[Run]:
    """Yield an optimizer's runs on the new tasks, each schedule with its one setting.

    Args:
        entrant: a key of `ENTRANTS`.
        settings: by schedule.
    """
    for task in TEST_TASKS:
        for schedule in ENTRANTS[entrant].schedules:
            yield from (Run(task, entrant, settings[schedule], seed) for seed in TEST_SEEDS)


def list_budget_runs(entrant: str) -> Iterator[Run]:
    """Yield an optimizer's random trials. All optimizers' trials come from the same random numbers.

    Args:
        entrant: a key of `ENTRANTS`.
    """
    for place, task in enumerate(BUDGET_TASKS):
        generator = np.random.default_rng((TRIAL_SEED, place))
        for trial in range(TRIALS):
            yield Run(task, entrant, ENTRANTS[entrant].draw_setting(generator), TRIAL_SEED + trial)


def make_untrained_run(task: str, seed: int) -> Run:
    """Return the run that takes no step, whose metrics are those of the untrained model.

    Args:
        task: a key of `NEW_TASKS`, with or without a length.
        seed: of the weights.
    """
    return Run(f"{task.partition('@')[0]}@0", "sgd", Setting(0.0, "constant", 0.0, 0.0, 0.0), seed)


def list_untrained_runs() -> Iterator[Run]:
    """Yield the runs that take no step, of all tasks and seeds."""
    for task in NEW_TASKS:
        yield from (make_untrained_run(task, seed) for seed in TEST_SEEDS)
    for task in BUDGET_TASKS:
        yield from (make_untrained_run(task, TRIAL_SEED + trial) for trial in range(TRIALS))


def compute_untrained(task_name: str, seeds: Iterable[int], find: Find) -> float:
    """Compute the mean test metric of untrained models, negated where a high one is better.

    Args:
        task_name: a key of `NEW_TASKS`, with or without a length.
        seeds: of the weights.
        find: returns the record of a run.

    Raises:
        MissingRunError: a run is missing.
    """
    task = tasks.find_task(task_name)
    runs = (make_untrained_run(task_name, seed) for seed in seeds)
    return statistics.fmean(get_metric(task, get_record(find, run), "test") for run in runs)


def get_metric(task: tasks.Task, record: Mapping[str, Any], split: str) -> float:
    """Return the metric at the end of a run, negated where a high one is better; infinite if the run diverged.

    Args:
        task: the task.
        record: of the run.
        split: "train", "validation" or "test".
    """
    return math.inf if record["final"] is None else task.sign * record["final"][split][task.metric]


def compute_gap(value: float, untrained: float, best: float) -> float:
    """Compute the share of the way from the untrained model to the best result that a result misses.

    Args:
        value: the metric, where low is better; infinite if the run diverged.
        untrained: the metric before training.
        best: the best mean metric of any optimizer under the same conditions.

    Returns:
        0 for the best, 1 for a result that is no better than no training.
    """
    return min(1.0, (value - best) / (untrained - best))


def compute_grid_gaps(find: Find) -> dict[tuple[str, Setting], list[float]]:
    """Compute the gaps of the selection's runs, in validation metrics; a task's best is that of all optimizers and settings.

    Args:
        find: returns the record of a run.

    Returns:
        The gap of each task, by entrant and setting.

    Raises:
        MissingRunError: a run of the selection is missing.
    """
    gaps: dict[tuple[str, Setting], list[float]] = {}
    for name in SELECTION_TASKS:
        task, untrained, best = _measure_way(name, find)
        for run in list_selection_runs():
            if run.task == name:
                end = get_metric(task, get_record(find, run), "validation")
                gaps.setdefault((run.entrant, run.setting), []).append(compute_gap(end, untrained, best))
    return gaps


def _measure_way(name: str, find: Find) -> tuple[tasks.Task, float, float]:
    """Return a task of the selection, its untrained validation metric, and the best one of all optimizers and settings."""
    task = tasks.find_task(name)
    found = [get_record(find, run) for run in list_selection_runs() if run.task == name]
    untrained = statistics.fmean(task.sign * each["curve"][0] for each in found)
    return task, untrained, min(get_metric(task, each, "validation") for each in found)


def step_beyond_edge(entrant: str, setting: Setting) -> Setting | None:
    """Return the setting one step beyond the grid if a setting is at its edge, else None.

    Args:
        entrant: a key of `ENTRANTS`.
        setting: one of its grid.
    """
    rates = sorted(each.learning_rate for each in ENTRANTS[entrant].list_grid(setting.schedule))
    beyond = {rates[0]: rates[0] / 2, rates[-1]: 2 * rates[-1]}.get(setting.learning_rate)
    return None if beyond is None else setting._replace(learning_rate=beyond)


def list_edge_runs(settings: Mapping[str, Mapping[str, Setting]]) -> Iterator[Run]:
    """Yield the runs one step beyond the grid, for settings that were chosen at its edge. They change no choice.

    Args:
        settings: each optimizer's one setting, by schedule.
    """
    for name, chosen in settings.items():
        for setting in chosen.values():
            if (beyond := step_beyond_edge(name, setting)) is not None:
                yield from (Run(task, name, beyond, SELECTION_SEED) for task in SELECTION_TASKS)


def compute_edge_gap(entrant: str, beyond: Setting, find: Find, find_edge: Find) -> float:
    """Compute the mean gap of a setting one step beyond the grid.

    Args:
        entrant: a key of `ENTRANTS`.
        beyond: the setting.
        find: returns the record of a run of the selection.
        find_edge: returns the record of a run beyond the grid.

    Raises:
        MissingRunError: a run is missing.
    """
    gaps = []
    for name in SELECTION_TASKS:
        task, untrained, best = _measure_way(name, find)
        record = get_record(find_edge, Run(name, entrant, beyond, SELECTION_SEED))
        gaps.append(compute_gap(get_metric(task, record, "validation"), untrained, best))
    return statistics.fmean(gaps)


def choose_settings(find: Find) -> dict[str, dict[str, Setting]]:
    """Choose each optimizer's one setting for each schedule: the one of its grid with the least mean gap over the tasks.

    Args:
        find: returns the record of a run.

    Returns:
        The settings by entrant and schedule.

    Raises:
        MissingRunError: a run of the selection is missing.
    """
    gaps = compute_grid_gaps(find)
    return {
        name: {
            schedule: min(entrant.list_grid(schedule), key=lambda setting, name=name: statistics.fmean(gaps[name, setting]))
            for schedule in entrant.schedules
        }
        for name, entrant in ENTRANTS.items()
    }
