"""Sweep VSGD's hyperparameters: grids of the prior's strength and of both kappas, each at several learning rates."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments import tasks
from experiments.comparison import Setting, Trial
from experiments.paper_report import MISSING
from experiments.report import ArmResult
from experiments.spread import Store, perform_runs
from reporting.pages import format_table, replace_section

#: The folder of the records, in the folder of results.
FOLDER = "sweep"
TASKS = ("characters", "mnist1d-mlp", "quadratic")
#: Seeds of neither tuning nor tests, because a finding of the sweep is to be checked on others.
SEEDS = (200, 201, 202)
#: The middle learning rates of the comparison.
RATES = (0.003, 0.00646, 0.0139, 0.03)
SHORT = tuple(Trial(rate, "cosine") for rate in RATES)
DEFAULT = "vsgd"


class Grid(NamedTuple):
    """Values of some hyperparameters to try.

    Attributes:
        name: of the page's section.
        heads: the names of the hyperparameters.
        entrants: the entrants by the hyperparameters' values, including the default.
        tasks: the names of the tasks.
        trials: learning rates and schedules.
    """

    name: str
    heads: Sequence[str]
    entrants: Mapping[tuple[float, ...], str]
    tasks: Sequence[str]
    trials: Sequence[Trial]


def _make_grid(
    name: str, default: Mapping[str, float], values: Sequence[tuple[float, ...]], chosen: Sequence[str], trials: Sequence[Trial]
) -> Grid:
    def name_entrant(each: tuple[float, ...]) -> str:
        if each == tuple(default.values()):
            return DEFAULT
        return f"vsgd:{','.join(f'{head}={value:g}' for head, value in zip(default, each, strict=True))}"

    return Grid(name, list(default), {each: name_entrant(each) for each in values}, chosen, trials)


_PRIOR = {"prior_strength": 1e-8}
_KAPPAS = {"kappa1": 0.81, "kappa2": 0.9}
#: The task on which the default diverges at a constant rate, in the comparison.
DIVERGED = ("digits-vae@4",)
#: The rates, from the default's best constant rate in that comparison upwards.
LONG = tuple(Trial(rate, "constant") for rate in (0.00139, *RATES))
GRIDS = (
    _make_grid("prior", _PRIOR, [(float(f"1e-{power}"),) for power in range(14, 0, -2)], TASKS, SHORT),
    _make_grid("kappas", _KAPPAS, [(one, two) for one in (0.6, 0.7, 0.81, 0.9) for two in (0.7, 0.8, 0.9)], TASKS, SHORT),
    _make_grid("long-prior", _PRIOR, [(1e-8,), (1e-7,), (1e-6,), (1e-5,)], DIVERGED, LONG),
    _make_grid("long-kappas", _KAPPAS, [(0.81, 0.9), (0.7, 0.7), (0.81, 0.81), (0.9, 0.9), (0.9, 0.81)], DIVERGED, LONG),
)


def list_settings(task: str, entrant: str, trial: Trial, backend: str) -> list[Setting]:
    """List a run for each seed.

    Args:
        task: the name of the task.
        entrant: the name of the entrant.
        trial: learning rate and schedule.
        backend: of Keras.
    """
    return [Setting(task, entrant, trial, seed, backend) for seed in SEEDS]


def list_all_settings(backend: str) -> list[Setting]:
    """List all runs of all grids.

    Args:
        backend: of Keras.
    """
    return [
        setting
        for grid in GRIDS
        for task in grid.tasks
        for entrant in grid.entrants.values()
        for trial in grid.trials
        for setting in list_settings(task, entrant, trial, backend)
    ]


class Scores(NamedTuple):
    """A metric of an entrant's runs.

    Attributes:
        values: for each trial, the metric of each seed; None where a run is missing or diverged.
        sign: 1 where a low metric is better, else -1.
    """

    values: Sequence[Sequence[float] | None]
    sign: int

    @property
    def best(self) -> int | None:
        """The index of the trial with the best mean; None if no trial has a mean."""
        found = [(self.sign * statistics.fmean(each), place) for place, each in enumerate(self.values) if each is not None]
        return min(found)[1] if found else None

    def format_cells(self, missing: Sequence[str]) -> list[str]:
        """Format the means, the best in bold.

        Args:
            missing: the texts of cells without a mean.
        """
        means = [
            why if each is None else f"{statistics.fmean(each):.4g}" for each, why in zip(self.values, missing, strict=True)
        ]
        return [f"**{mean}**" if place == self.best else mean for place, mean in enumerate(means)]

    def format_difference(self, other: Scores) -> str:
        """Format the difference from other scores, each at its best trial, seed by seed: the mean, the lowest and the highest.

        Args:
            other: scores of the same seeds.
        """
        if self.best is None or other.best is None:
            return ""
        pairs = zip(self.values[self.best] or (), other.values[other.best] or (), strict=True)
        differences = [first - second for first, second in pairs]
        low, high = min(differences), max(differences)
        return f"{statistics.fmean(differences):+.2g} ({low:+.2g} to {high:+.2g})"


def _make_scores(trials: Sequence[Trial], found: Sequence[Sequence[Any]], split: str, metric: str) -> Scores:
    results = [None if None in records else ArmResult(trial, records) for trial, records in zip(trials, found, strict=True)]
    values = [None if each is None else each.list_values(split, metric) for each in results]
    return Scores(values, -1 if metric == "accuracy" else 1)


def _make_rows(task: tasks.Task, grid: Grid, find: Callable[[Setting], Any], backend: str) -> Iterator[list[str]]:
    def found(entrant: str) -> list[list[Any]]:
        return [[find(setting) for setting in list_settings(task.name, entrant, trial, backend)] for trial in grid.trials]

    default = found(DEFAULT)
    for values, entrant in grid.entrants.items():
        records = found(entrant)
        missing = [MISSING if None in each else "diverged" for each in records]
        row = [f"{value:g}" for value in values]
        for split, metric in (("train", "loss"), ("validation", task.metric)):
            scores = _make_scores(grid.trials, records, split, metric)
            row += [
                *scores.format_cells(missing),
                "" if entrant == DEFAULT else scores.format_difference(_make_scores(grid.trials, default, split, metric)),
            ]
        yield row


def format_grid_table(task: tasks.Task, grid: Grid, find: Callable[[Setting], Any], backend: str) -> str:
    """Format train loss and validation metric of each entrant at each learning rate, and differences from the default's best.

    Args:
        task: the task.
        grid: the entrants and trials.
        find: returns the record of a run, or None.
        backend: of Keras.
    """
    rates = [f"{trial.learning_rate:g}" for trial in grid.trials]
    metric = "accuracy, %" if task.metric == "accuracy" else "loss"
    heads = [
        head
        for name in ("train loss", f"validation {metric}")
        for head in (*(f"{name}, lr {rate}" for rate in rates), "minus default's")
    ]
    return format_table([*grid.heads, *heads], _make_rows(task, grid, find, backend))


def run_sweep(results: Path, page: Path, workers: int, backend: str) -> None:
    """Do the missing runs, and write the tables into the page's sections.

    Args:
        results: the folder of results.
        page: the Markdown page.
        workers: how many processes run side by side.
        backend: of Keras.

    Raises:
        ValueError: `workers` is less than 1.
    """
    store = Store(results / FOLDER)
    perform_runs(list_all_settings(backend), store, workers, "sweep")
    for grid in GRIDS:
        chosen = [tasks.find_task(name) for name in grid.tasks]
        parts = [
            f"{task.title}, {task.steps} steps:\n\n{format_grid_table(task, grid, store.find, backend)}" for task in chosen
        ]
        replace_section(page, f"sweep-{grid.name}", parts)
