"""Check the recommended setting of Constant VSGD against the defaults, and compare its best learning rates with AdamW's."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from experiments import spread, tasks
from experiments.comparison import ARMS, WIDEST, Comparison, Setting, Trial, find_entrant
from experiments.report import ArmResult, judge_difference
from experiments.spread import Store, perform_runs
from experiments.statistics import compare_pairs
from reporting.pages import format_table, replace_section

#: The folder of the records, in the folder of results.
FOLDER = "recommended"
RECOMMENDED = "constant-vsgd:prior_strength=auto,forgetting_floor=0.01"
DEFAULTS = ("constant-vsgd", "vsgd")
BASELINE = "adamw"
TASKS = ("characters", "mnist1d-mlp", "mnist1d-cnn", "digits-convmixer", "digits-vae", "quadratic")
#: Tasks whose four times longer run takes seconds.
LONG_TASKS = ("mnist1d-mlp@4", "digits-vae@4", "quadratic@4")
SCHEDULES = ("cosine", "constant")
#: Learning rates around the best of the recommended setting.
RATES = (0.004, 0.008, 0.016)
#: Seeds of no other experiment.
SEEDS = (300, 301, 302)


class Batch(NamedTuple):
    """Runs that belong together: every entrant on every task, schedule, rate and seed.

    Attributes:
        entrants: their names.
        tasks: the names of the tasks.
        schedules: keys of `experiments.comparison.SCHEDULES`.
        rates: the learning rates.
        seeds: of weights and batches.
    """

    entrants: Sequence[str]
    tasks: Sequence[str]
    schedules: Sequence[str]
    rates: Sequence[float]
    seeds: Sequence[int]

    def list_settings(self, backend: str) -> list[Setting]:
        """List the runs.

        Args:
            backend: of Keras.
        """
        return [
            Setting(task, entrant, Trial(rate, schedule), seed, backend)
            for task in self.tasks
            for entrant in self.entrants
            for schedule in self.schedules
            for rate in self.rates
            for seed in self.seeds
        ]


CHECK = Batch((RECOMMENDED, *DEFAULTS), TASKS, SCHEDULES, RATES, SEEDS)
LONG_CHECK = Batch((RECOMMENDED, DEFAULTS[0]), LONG_TASKS, ("constant",), RATES, SEEDS)


class Finder:
    """The records of finished runs.

    Args:
        store: of the records.
        backend: of Keras.
    """

    def __init__(self, store: Store, backend: str) -> None:
        self._store = store
        self._backend = backend

    def find(self, task: tasks.Task, entrant: str, schedule: str, rate: float, seeds: Sequence[int]) -> ArmResult:
        """Return the results of a rate on all seeds."""
        trial = Trial(rate, schedule)
        found = [self._store.find(Setting(task.name, entrant, trial, seed, self._backend)) for seed in seeds]
        missing = sum(each is None for each in found)
        if missing:
            raise ValueError(f"{missing} runs of {entrant} on {task.name} are missing, but a table needs all of them")
        return ArmResult(trial, [each for each in found if each is not None])

    def find_best(self, task: tasks.Task, entrant: str, schedule: str, batch: Batch) -> ArmResult | None:
        """Return the results of the rate with the best mean validation metric; None if a run diverged at every rate."""
        results = [self.find(task, entrant, schedule, rate, batch.seeds) for rate in batch.rates]
        scores = [(score_result(task, each, "validation"), each) for each in results if not each.diverged]
        return min(scores, key=lambda pair: pair[0])[1] if scores else None


def score_result(task: tasks.Task, result: ArmResult, split: str) -> float:
    """Return the mean metric, in percent for accuracies and negated where a high one is better."""
    return task.sign * statistics.fmean(result.list_values(split, task.metric) or ())


def _format_difference(task: tasks.Task, one: ArmResult | None, other: ArmResult | None) -> str:
    """Format the paired difference in the test metric, with Student's 95% interval."""
    if one is None or other is None:
        return ""
    pairs = zip(one.list_values("test", task.metric) or (), other.list_values("test", task.metric) or (), strict=True)
    found = compare_pairs(*zip(*pairs, strict=True))
    verdict = judge_difference(found, task.metric)
    return f"{found.mean:+.2g} ± {found.high - found.mean:.2g}, {verdict}"


def _format_best(task: tasks.Task, result: ArmResult | None) -> str:
    return "diverged" if result is None else f"{result.format_mean('test', task.metric)} ({result.trial.learning_rate:g})"


def _count_lost(task: tasks.Task, entrant: str, schedule: str, batch: Batch, finder: Finder) -> int:
    results = (finder.find(task, entrant, schedule, rate, batch.seeds) for rate in batch.rates)
    return sum(record["final"] is None for result in results for record in result.records)


def make_check_rows(batch: Batch, finder: Finder) -> Iterator[list[str]]:
    """Yield a row for each task and schedule: every entrant at its best rate, differences, and runs that diverged.

    Args:
        batch: the runs; the first entrant is compared with all others.
        finder: of the records.
    """
    for task in map(tasks.find_task, batch.tasks):
        for schedule in batch.schedules:
            best = [finder.find_best(task, entrant, schedule, batch) for entrant in batch.entrants]
            lost = [str(_count_lost(task, entrant, schedule, batch, finder)) for entrant in batch.entrants]
            unit = "%" if task.metric == "accuracy" else "loss"
            yield [
                f"{task.title}, {unit}",
                schedule,
                *(_format_best(task, each) for each in best),
                *(_format_difference(task, best[0], each) for each in best[1:]),
                " / ".join(lost),
            ]


def find_baseline_rate(task: tasks.Task, schedule: str, comparisons: Store, backend: str) -> float:
    """Return the learning rate that is AdamW's best in the comparison, by the validation metric of its tuning seeds.

    Args:
        task: the task.
        schedule: of the learning rate.
        comparisons: the records of the comparison.
        backend: of Keras.
    """
    comparison = Comparison(task, comparisons.find, backend)
    trials = [trial for trial in ARMS[WIDEST](find_entrant(BASELINE)) if trial.schedule == schedule]
    scores = [
        (score, trial.learning_rate) for trial in trials if (score := comparison.score_trial(BASELINE, trial)) is not None
    ]
    if len(scores) < len(trials):
        raise ValueError(f"runs of {BASELINE} on {task.name} are missing, but a table needs all of them")
    return min(scores)[1]


def make_rule_rows(finder: Finder, comparisons: Store, backend: str) -> Iterator[list[str]]:
    """Yield a row for each task and schedule: AdamW's best rate, and what the recommended setting loses at each of its rates.

    Args:
        finder: of the records of the check.
        comparisons: the records of the comparison.
        backend: of Keras.
    """
    for task in map(tasks.find_task, CHECK.tasks):
        for schedule in CHECK.schedules:
            results = [finder.find(task, RECOMMENDED, schedule, rate, CHECK.seeds) for rate in CHECK.rates]
            scores = [None if each.diverged else score_result(task, each, "validation") for each in results]
            best = min((score for score in scores if score is not None), default=0.0)
            cells = ["diverged" if score is None else f"{score - best:.2g}" for score in scores]
            unit = "%" if task.metric == "accuracy" else "loss"
            yield [f"{task.title}, {unit}", schedule, f"{find_baseline_rate(task, schedule, comparisons, backend):g}", *cells]


def write_tables(finder: Finder, comparisons: Store, page: Path, backend: str) -> None:
    """Write both tables into the page's sections.

    Args:
        finder: of the records of the check.
        comparisons: the records of the comparison.
        page: the Markdown page.
        backend: of Keras.
    """
    names: Mapping[str, str] = {RECOMMENDED: "auto, floor 0.01", "constant-vsgd": "Constant VSGD", "vsgd": "VSGD"}

    def format_check(batch: Batch) -> str:
        titles = [names[entrant] for entrant in batch.entrants]
        heads = ["task", "rate", *titles, *(f"minus {title}" for title in titles[1:]), "diverged"]
        return format_table(heads, make_check_rows(batch, finder))

    replace_section(page, "recommended", [format_check(CHECK), "Four times as many steps:", format_check(LONG_CHECK)])
    heads = ["task", "rate", "AdamW's best", *(f"lost at {rate:g}" for rate in CHECK.rates)]
    replace_section(page, "rates", [format_table(heads, make_rule_rows(finder, comparisons, backend))])


def run_check(results: Path, page: Path, workers: int, backend: str) -> None:
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
    for title, batch in (("check", CHECK), ("long", LONG_CHECK)):
        perform_runs(batch.list_settings(backend), store, workers, title)
    write_tables(Finder(store, backend), Store(results / spread.FOLDER), page, backend)
