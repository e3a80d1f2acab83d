"""Write the comparison's tables and plots from the records; cells of missing runs contain `MISSING`."""

from __future__ import annotations

import itertools
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments import figures, tasks
from experiments.comparison import ARMS, BASELINE, ENTRANTS, Comparison, Trial
from experiments.paper_report import MISSING
from experiments.spread import FOLDER, Store
from experiments.statistics import (
    Difference,
    Range,
    compare_pairs,
    compute_median_steps,
    correct_holm,
    count_steps_to_target,
    find_useful_range,
)
from reporting.pages import format_image, format_table, replace_section

#: The entrant that the summary compares with the others.
SUBJECT = "vsgd"
_WORDS = ("better", "level", "worse")


class ArmResult(NamedTuple):
    """The result of an entrant in an arm.

    Attributes:
        trial: the trial that tuning chose.
        records: of the test seeds.
    """

    trial: Trial
    records: Sequence[Mapping[str, Any]]

    def list_values(self, split: str, metric: str) -> list[float] | None:
        """List the metric of each record, accuracies in percent; None where a run diverged.

        Args:
            split: the split's name.
            metric: "loss" or "accuracy".
        """
        if self.diverged:
            return None
        scale = 100 if metric == "accuracy" else 1
        return [scale * record["final"][split][metric] for record in self.records]

    @property
    def diverged(self) -> str:
        """How many runs diverged, as text; empty if none did."""
        count = sum(record["final"] is None for record in self.records)
        return f"{count} of {len(self.records)} diverged" if count else ""

    def format_mean(self, split: str, metric: str) -> str:
        """Format the mean of the metric, or how many runs diverged.

        Args:
            split: the split's name.
            metric: "loss" or "accuracy".
        """
        values = self.list_values(split, metric)
        return self.diverged if values is None else f"{statistics.fmean(values):.4g}"


def find_result(comparison: Comparison, arm: str, entrant: str) -> ArmResult | None:
    """Find the result of an entrant in an arm; None while runs are missing.

    Args:
        comparison: the comparison on a task.
        arm: the name of the arm.
        entrant: the name of the entrant.
    """
    trial = comparison.choose_trial(entrant, arm)
    records = None if trial is None else comparison.find_results(entrant, trial)
    return None if trial is None or records is None else ArmResult(trial, records)


def make_comparisons(store: Store, backend: str) -> dict[str, list[Comparison]]:
    """Make the comparisons on the "small" tasks and on those that run "longer".

    The longer ones have the entrants with at least one record.

    Args:
        store: of the records.
        backend: of Keras.
    """
    files = [each for name in tasks.TASKS for each in store.list_tasks() if each.startswith(f"{name}@")]
    longer = [Comparison(tasks.find_task(name), store.find, backend) for name in files]
    entrants = [name for name in ENTRANTS if any(_has_runs(each, name, store) for each in longer)]
    return {
        "small": [Comparison(task, store.find, backend) for task in tasks.TASKS.values()],
        "longer": [Comparison(each.task, store.find, backend, entrants) for each in longer],
    }


def _has_runs(comparison: Comparison, entrant: str, store: Store) -> bool:
    runs = itertools.chain(comparison.list_tuning_settings(entrant), comparison.list_test_settings(entrant))
    return any(store.find(each) is not None for each in runs)


def judge_difference(difference: Difference, metric: str) -> str:
    """Return whether the first of a pair is better, worse, or level, which means that the interval contains zero.

    Args:
        difference: the first's metric minus the second's.
        metric: "loss" or "accuracy".
    """
    if not difference.excludes_zero:
        return "level"
    return "better" if (difference.mean > 0) == (metric == "accuracy") else "worse"


def _compare_results(first: ArmResult, second: ArmResult, split: str, metric: str) -> Difference | str:
    values, others = first.list_values(split, metric), second.list_values(split, metric)
    if values is None or others is None:
        return first.diverged or f"of the other {second.diverged}"
    return compare_pairs(values, others)


def compare_arms(first: ArmResult | None, second: ArmResult | None, split: str, metric: str) -> Difference | str:
    """Compare two results, or return the reason why that is impossible.

    Args:
        first: a result; None while runs are missing.
        second: the result to compare it with, likewise.
        split: the split's name.
        metric: "loss" or "accuracy".
    """
    return MISSING if first is None or second is None else _compare_results(first, second, split, metric)


def _format_difference(first: ArmResult, second: ArmResult | None, split: str, metric: str) -> str:
    found = compare_arms(first, second, split, metric)
    if isinstance(found, str):
        return found
    interval = f"{found.mean:+.3g} ({found.low:+.3g} to {found.high:+.3g}; {found.effect:+.1f} sd)"
    return f"{interval}, {judge_difference(found, metric)}"


def _format_arrivals(comparison: Comparison, records: Sequence[Mapping[str, Any]]) -> list[str]:
    target, task = comparison.compute_target(), comparison.task
    if target is None:
        return [MISSING, MISSING]
    steps = [count_steps_to_target(record["curve"], task.every, target, task.sign) for record in records]
    median = compute_median_steps(steps)
    return ["not reached" if median is None else f"{median:g}", f"{sum(each is not None for each in steps)} of {len(steps)}"]


def _format_row(comparison: Comparison, arm: str, entrant: str) -> list[str]:
    head, metric = [arm, ENTRANTS[entrant].title], comparison.task.metric
    result, baseline = (find_result(comparison, arm, each) for each in (entrant, BASELINE))
    if result is None:
        return [*head, *[MISSING] * 7]
    edge = " (edge)" if comparison.is_at_edge(entrant, result.trial) else ""
    rate = f"{result.trial.learning_rate:g}{edge}, {result.trial.schedule}"
    cells = [*head, rate, *_format_arrivals(comparison, result.records)]
    for split, name in (("train", "loss"), ("test", metric)):
        difference = "" if entrant == BASELINE else _format_difference(result, baseline, split, name)
        cells += [result.format_mean(split, name), difference]
    return cells


def format_task_table(comparison: Comparison) -> str:
    """Format all results on a task, arm by arm, with the differences from AdamW in the same arm.

    Args:
        comparison: the comparison on the task.
    """
    task, minus = comparison.task, f"minus {ENTRANTS[BASELINE].title}'s"
    test = "test accuracy, %" if task.metric == "accuracy" else "test loss"
    header = ["arm", "optimizer", "learning rate", "steps to target", "reached", "train loss", minus, test, minus]
    return format_table(header, [_format_row(comparison, arm, entrant) for arm in ARMS for entrant in comparison.entrants])


def format_task_section(comparison: Comparison) -> str:
    """Format a task's section: the heading, steps, unit and target, and the table.

    Args:
        comparison: the comparison on the task.
    """
    task, target = comparison.task, comparison.compute_target()
    reach = MISSING if target is None else f"{100 * target:.4g}%" if task.metric == "accuracy" else f"{target:.4g}"
    how = f"{task.steps} steps; losses in {task.unit}; target: validation {task.metric} {reach}."
    return "\n\n".join([f"#### {task.title[0].upper()}{task.title[1:]}", how, format_task_table(comparison)])


def format_summary(arm: str, found: Sequence[Comparison]) -> str:
    """Format the verdicts of VSGD compared with each other entrant: train loss first, then the test metric.

    A star marks verdicts that hold after Holm's correction for all comparisons of the table.

    Args:
        arm: the name of the arm.
        found: the comparisons, of the same entrants; each gets a row.
    """
    others = [each for each in found[0].entrants if each != SUBJECT]
    differences = {}
    for place, comparison in enumerate(found):
        for other in others:
            subject, result = (find_result(comparison, arm, name) for name in (SUBJECT, other))
            for split, metric in (("train", "loss"), ("test", comparison.task.metric)):
                differences[place, other, split] = compare_arms(subject, result, split, metric)
    known = {key: each for key, each in differences.items() if not isinstance(each, str)}
    corrected = dict(zip(known, correct_holm([each.p for each in known.values()]), strict=True))
    words = {}
    for (place, other, split), each in differences.items():
        metric = "loss" if split == "train" else found[place].task.metric
        words[place, other, split] = each if isinstance(each, str) else judge_difference(each, metric)
    rows = []
    for place, comparison in enumerate(found):
        cells = [comparison.task.title]
        for other in others:
            pair = [(place, other, split) for split in ("train", "test")]
            texts = [words[key] + ("*" if corrected.get(key, 1.0) <= 0.05 else "") for key in pair]
            cells.append(" / ".join(dict.fromkeys(texts) if MISSING in texts else texts))
        rows.append(cells)
    totals = []
    for other in others:
        counts = [Counter(words[place, other, split] for place in range(len(found))) for split in ("train", "test")]
        totals.append(" / ".join("-".join(str(each[word]) for word in _WORDS) for each in counts))
    header = [f"VSGD, {arm}", *(f"to {ENTRANTS[other].title}" for other in others)]
    return format_table(header, [*rows, ["better-level-worse", *totals]])


def _format_width(found: Range | None) -> str:
    if found is None:
        return "all diverged"
    least = "at least " if found.open_below or found.open_above else ""
    return f"{least}{found.factor:.1f}x ({found.low:.2g} to {found.high:.2g})"


def format_sensitivity(found: Sequence[Comparison]) -> str:
    """Format the ranges of learning rates whose validation metric is within 1% of the best, with the tuned schedule.

    Args:
        found: the comparisons, of the same entrants; each gets a row.
    """
    rows = []
    for comparison in found:
        tried = [comparison.list_tried(entrant) for entrant in comparison.entrants]
        rows.append(
            [comparison.task.title, *(MISSING if each is None else _format_width(find_useful_range(*each)) for each in tried)]
        )
    return format_table(["", *(ENTRANTS[each].title for each in found[0].entrants)], rows)


def format_facts(store: Store, found: Sequence[Comparison]) -> list[str]:
    """Format the numbers of finished runs and the machines that they ran on.

    Args:
        store: of the records.
        found: the comparisons.
    """
    rows = []
    for comparison in found:
        parts = (comparison.list_tuning_settings, comparison.list_test_settings)
        done = [[store.find(each) is not None for name in comparison.entrants for each in part(name)] for part in parts]
        rows.append([comparison.task.title, *(f"{sum(each)} of {len(each)}" for each in done)])
    lines = [format_table(["runs", "for tuning", "for the tests of what is chosen so far"], rows)]
    for record in store.open_records("environments"):
        versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
        lines.append(f"Run on {record['processors']} processors ({record['cpu']}), one thread a run; {versions}.")
    return lines


def write_page(results: Path, page: Path, backend: str = "jax") -> None:
    """Write tables and plots into the page's sections of the comparison.

    Args:
        results: the folder of results and plots; its folder `spread.FOLDER` has the records.
        page: the Markdown page; a missing page is created.
        backend: of Keras; the page reports its runs.
    """
    store = Store(results / FOLDER)
    groups = make_comparisons(store, backend)
    results.mkdir(parents=True, exist_ok=True)
    replace_section(page, "small-runs", format_facts(store, [*itertools.chain.from_iterable(groups.values())]))
    for group, found in groups.items():
        if found:
            _write_group(group, found, results, page)


def _write_group(group: str, found: Sequence[Comparison], results: Path, page: Path) -> None:
    curves, rates = results / f"{group}-curves.svg", results / f"{group}-learning-rates.svg"
    figures.draw_curves(found, curves)
    figures.draw_rates(found, rates)
    sections = {
        "summary": [format_summary(arm, found) for arm in ARMS],
        "curves": [
            format_image(
                "Validation metric over the steps, tuned by 20 trials: medians and quartiles of ten seeds", curves, page
            )
        ],
        "sensitivity": [
            format_sensitivity(found),
            format_image("Validation metric at the end over the learning rate: means of three seeds", rates, page),
        ],
        "tables": list(map(format_task_section, found)),
    }
    for name, parts in sections.items():
        replace_section(page, f"{group}-{name}", parts)
