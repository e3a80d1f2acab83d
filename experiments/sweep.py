"""What VSGD's hyperparameters do: grids of the prior's strength and of both kappas, each at several learning rates."""

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

#: Of the records, in the folder of results.
FOLDER = "sweep"
TASKS = ("characters", "mnist1d-mlp", "quadratic")
#: Neither for tuning nor for tests: what is seen here is to be tried on others.
SEEDS = (200, 201, 202)
#: The middle of those that are compared.
RATES = (0.003, 0.00646, 0.0139, 0.03)
SHORT = tuple(Trial(rate, "cosine") for rate in RATES)
DEFAULT = "vsgd"


class Grid(NamedTuple):
    """Values that are tried of some hyperparameters.

    Attributes:
        name: of the section on the page.
        heads: what the hyperparameters are called.
        entrants: who is tried, by the hyperparameters' values; among them the default.
        tasks: what they are tried on, by name.
        trials: with what.
    """

    name: str
    heads: Sequence[str]
    entrants: Mapping[tuple[float, ...], str]
    tasks: Sequence[str]
    trials: Sequence[Trial]


def _make_grid(
    name: str, default: Mapping[str, float], values: Sequence[tuple[float, ...]], chosen: Sequence[str], trials: Sequence[Trial]
) -> Grid:
    def entrant(each: tuple[float, ...]) -> str:
        if each == tuple(default.values()):
            return DEFAULT
        return f"vsgd:{','.join(f'{head}={value:g}' for head, value in zip(default, each, strict=True))}"

    return Grid(name, list(default), {each: entrant(each) for each in values}, chosen, trials)


_PRIOR = {"prior_strength": 1e-8}
_KAPPAS = {"kappa1": 0.81, "kappa2": 0.9}
#: Where the comparison saw the default diverge, at a constant rate.
DIVERGED = ("digits-vae@4",)
#: From the default's best constant rate in that comparison on.
LONG = tuple(Trial(rate, "constant") for rate in (0.00139, *RATES))
GRIDS = (
    _make_grid("prior", _PRIOR, [(float(f"1e-{power}"),) for power in range(14, 0, -2)], TASKS, SHORT),
    _make_grid("kappas", _KAPPAS, [(one, two) for one in (0.6, 0.7, 0.81, 0.9) for two in (0.7, 0.8, 0.9)], TASKS, SHORT),
    _make_grid("long-prior", _PRIOR, [(1e-8,), (1e-7,), (1e-6,), (1e-5,)], DIVERGED, LONG),
    _make_grid("long-kappas", _KAPPAS, [(0.81, 0.9), (0.7, 0.7), (0.81, 0.81), (0.9, 0.9), (0.9, 0.81)], DIVERGED, LONG),
)


def list_settings(task: str, entrant: str, trial: Trial, backend: str) -> list[Setting]:
    """A run for each seed.

    Args:
        task: by name.
        entrant: by name.
        trial: which.
        backend: of Keras.
    """
    return [Setting(task, entrant, trial, seed, backend) for seed in SEEDS]


def list_all_settings(backend: str) -> list[Setting]:
    """All runs of all grids.

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
        values: of each seed, for each trial; None where a run is missing or diverged.
        sign: 1 where less is better, else -1.
    """

    values: Sequence[Sequence[float] | None]
    sign: int

    @property
    def best(self) -> int | None:
        """The place of the trial with the best mean; None where there is none."""
        found = [(self.sign * statistics.fmean(each), place) for place, each in enumerate(self.values) if each is not None]
        return min(found)[1] if found else None

    def format_cells(self, missing: Sequence[str]) -> list[str]:
        """The means, the best in bold.

        Args:
            missing: what stands where there is no mean.
        """
        means = [
            why if each is None else f"{statistics.fmean(each):.4g}" for each, why in zip(self.values, missing, strict=True)
        ]
        return [f"**{mean}**" if place == self.best else mean for place, mean in enumerate(means)]

    def format_difference(self, other: Scores) -> str:
        """How much more this is than another, each at its best, seed by seed: the mean, the least and the most.

        Args:
            other: of the same seeds.
        """
        if self.best is None or other.best is None:
            return ""
        pairs = zip(self.values[self.best] or (), other.values[other.best] or (), strict=True)
        differences = [ours - theirs for ours, theirs in pairs]
        low, high = min(differences), max(differences)
        return f"{statistics.fmean(differences):+.2g} ({low:+.2g} to {high:+.2g})"


def _make_scores(trials: Sequence[Trial], found: Sequence[Sequence[Any]], split: str, metric: str) -> Scores:
    told = [None if None in records else ArmResult(trial, records) for trial, records in zip(trials, found, strict=True)]
    values = [None if each is None else each.list_values(split, metric) for each in told]
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
            ours = _make_scores(grid.trials, records, split, metric)
            row += [
                *ours.format_cells(missing),
                "" if entrant == DEFAULT else ours.format_difference(_make_scores(grid.trials, default, split, metric)),
            ]
        yield row


def format_grid_table(task: tasks.Task, grid: Grid, find: Callable[[Setting], Any], backend: str) -> str:
    """Train loss and validation metric of each entrant at each learning rate, and beside the default's best.

    Args:
        task: which.
        grid: who.
        find: the record of a run, or None.
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
    """Make the runs that are missing, and write the tables into the page's sections.

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
