"""Compare best learning rates over batch sizes, lengths and schedules, on the study's tasks but not preregistered."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from experiments import tasks
from experiments.study.entrants import ENTRANTS, SCHEDULES, Setting
from experiments.study.figures import format_percent
from experiments.study.protocol import LENGTHS, Find, Run, compute_gap, get_metric, get_record
from experiments.study.tasks import NEW_TASKS
from reporting.pages import format_table

#: The optimizers of the comparison, without a warm-up where they can; the ratio of best rates refers to the last one.
COMPARED = ("calibrated", "constant-vsgd", "adamw-warm", "adamw")
RATES = tuple(0.0005 * 2**power for power in range(8))
#: The rates whose losses the table shows.
SHOWN = (0.004, 0.008, 0.016, 0.032)
#: Gaps up to this one count as level with the best rate.
LEVEL = 0.005
#: A seed of no other part of the study.
SEED = 600


class Group(NamedTuple):
    """Conditions that differ in the task only.

    Attributes:
        batches: "small" or "large".
        length: of the runs, as a multiple of the task's.
        schedule: of the learning rate.
    """

    batches: str
    length: int
    schedule: str

    def list_tasks(self) -> list[str]:
        """List the tasks, with the length."""
        names = tuple(NEW_TASKS)[("small", "large").index(self.batches) :: 2]
        return [name if self.length == 1 else f"{name}@{self.length}" for name in names]

    def list_runs(self, task: str, entrant: str) -> dict[float, Run]:
        """List an optimizer's runs on a task, by learning rate, with its shortest warm-up.

        Args:
            task: one of `list_tasks()`.
            entrant: one of `COMPARED`.
        """
        made = ENTRANTS[entrant]
        settings = {rate: Setting(rate, self.schedule, min(made.warm_ups), made.beta1, made.weight_decay) for rate in RATES}
        return {rate: Run(task, entrant, setting, SEED) for rate, setting in settings.items()}


GROUPS = tuple(Group(batches, length, way) for batches in ("small", "large") for length in LENGTHS for way in SCHEDULES)


def list_rate_runs(entrant: str) -> Iterator[Run]:
    """Yield an optimizer's runs over all rates and conditions; none if it is not compared.

    Args:
        entrant: a key of `ENTRANTS`.
    """
    for group in GROUPS if entrant in COMPARED else ():
        for task in group.list_tasks():
            yield from group.list_runs(task, entrant).values()


def compute_rate_gaps(group: Group, task_name: str, entrant: str, find: Find) -> dict[float, float]:
    """Compute the part of the way to an optimizer's own best rate that each rate misses, in the validation metric.

    Args:
        group: the condition.
        task_name: one of its tasks.
        entrant: one of `COMPARED`.
        find: returns the record of a run.

    Raises:
        MissingRunError: a run is missing.
    """
    task = tasks.find_task(task_name)
    found = {rate: get_record(find, run) for rate, run in group.list_runs(task_name, entrant).items()}
    untrained = statistics.fmean(task.sign * each["curve"][0] for each in found.values())
    ends = {rate: get_metric(task, each, "validation") for rate, each in found.items()}
    return {rate: compute_gap(end, untrained, min(ends.values())) for rate, end in ends.items()}


def find_best_rate(gaps: Mapping[float, float]) -> float:
    """Return the middle of the rates that are as good as the best one, on a scale of factors.

    Args:
        gaps: by rate.
    """
    return statistics.geometric_mean(rate for rate, gap in gaps.items() if gap <= LEVEL)


def _format_range(values: list[float]) -> str:
    return f"{statistics.geometric_mean(values):.2g} ({min(values):.2g} to {max(values):.2g})"


def format_rates_table(find: Find) -> str:
    """Format best rates over the tasks, geometric mean and range, and what the first optimizer loses at some rates.

    The rates end at `RATES`, so a best rate there may lie beyond.

    Args:
        find: returns the record of a run.

    Raises:
        MissingRunError: a run is missing.
    """
    rows = []
    for group in GROUPS:
        gaps: Mapping[str, list[dict[float, float]]] = {
            name: [compute_rate_gaps(group, task, name, find) for task in group.list_tasks()] for name in COMPARED
        }
        best = {name: list(map(find_best_rate, found)) for name, found in gaps.items()}
        ratios = [ours / theirs for ours, theirs in zip(best[COMPARED[0]], best[COMPARED[-1]], strict=True)]
        lost = [[each[rate] for each in gaps[COMPARED[0]]] for rate in SHOWN]
        rows.append(
            [
                f"{group.batches}, {group.length}x",
                group.schedule,
                *(_format_range(best[name]) for name in COMPARED),
                _format_range(ratios),
                *(f"{format_percent(statistics.fmean(each))} ({format_percent(max(each))})" for each in lost),
            ]
        )
    titles = [ENTRANTS[name].title for name in COMPARED]
    heads = ["batches, length", "rate", *titles, f"first / {titles[-1]}", *(f"lost at {rate:g}, % (most)" for rate in SHOWN)]
    return format_table(heads, rows)
