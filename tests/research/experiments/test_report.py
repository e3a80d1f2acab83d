"""What the tables of the comparison say of runs that are made up, and of runs that are missing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

for package in ("matplotlib", "scipy", "tqdm"):
    pytest.importorskip(package)

from research.made_up_runs import distance, diverged, middle, record  # noqa: E402

from experiments import figures, report, spread, tasks  # noqa: E402
from experiments.comparison import ENTRANTS, TEST_SEEDS, Comparison, Setting  # noqa: E402
from experiments.statistics import Difference  # noqa: E402

LOSS = "digits-vae"


def run(setting: Setting) -> dict[str, Any]:
    return record(setting.task, 0.2 + 0.1 * distance(setting, 1.05 * middle(setting.entrant)))


def task_rows(comparison: Comparison) -> dict[tuple[str, str], list[str]]:
    _, _, *lines = report.format_task_table(comparison).splitlines()
    rows = ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines)
    return {(arm, optimizer): cells for arm, optimizer, *cells in rows}


@pytest.mark.parametrize(
    ("low", "high", "loss", "accuracy"),
    [
        (-2.0, -0.5, "better", "worse"),
        (0.5, 2.0, "worse", "better"),
        (-0.1, 2.0, "level", "level"),
        (0.0, 2.0, "level", "level"),
    ],
)
def test_verdicts(low: float, high: float, loss: str, accuracy: str) -> None:
    difference = Difference((low + high) / 2, low, high)
    assert [report.judge_difference(difference, metric) for metric in ("loss", "accuracy")] == [loss, accuracy]


def test_plots_show_where_everyone_ends_losing_ones_too() -> None:
    import matplotlib.pyplot as plt

    losing = Comparison(tasks.TASKS[LOSS], lambda setting: record(LOSS, 9.0) if setting.entrant == "sgd" else run(setting))
    figure, axes = plt.subplots()
    assert figures._draw_task_curves(axes, losing)
    ends = [line.get_ydata()[-1] for line in axes.get_lines()]
    plt.close(figure)
    # Everyone's line, and the target's.
    assert len(ends) == len(ENTRANTS) + 1
    low, high = axes.get_ylim()
    assert low < min(ends) < 1 < max(ends) == 9.0 < high


def test_runs_that_diverge_are_reported_and_not_averaged() -> None:
    def rows_without(entrant: str) -> dict[tuple[str, str], list[str]]:
        def find(setting: Setting) -> dict[str, Any]:
            return diverged() if setting.entrant == entrant and setting.seed in TEST_SEEDS[2:5] else run(setting)

        return task_rows(Comparison(tasks.TASKS[LOSS], find))

    _, _, reached, *ends = rows_without("lion")["defaults", "Lion"]
    assert set(ends) == {"3 of 10 diverged"}
    assert reached != "10 of 10"
    assert rows_without("adamw")["defaults", "Lion"][4::2] == ["of the other 3 of 10 diverged"] * 2


def test_cells_that_need_a_missing_run_say_so() -> None:
    store = spread.Store(Path(__file__).parents[3] / "docs" / "results" / spread.FOLDER)

    def find(setting: Setting) -> dict[str, Any] | None:
        return None if setting.entrant == "adamw" and setting.trial.schedule == "cosine" else store.find(setting)

    task = tasks.TASKS["quadratic"]
    committed, found = task_rows(Comparison(task, store.find)), task_rows(Comparison(task, find))
    # Differences need AdamW in the same arm, and the steps to the target need tuned AdamW.
    for (arm, optimizer), (rate, _, _, train, than_train, test, than_test) in committed.items():
        if arm == "defaults":
            expected = [rate, *[report.MISSING] * 2, train, than_train, test, than_test]
        elif optimizer == "AdamW":
            expected = [report.MISSING] * 7
        else:
            expected = [rate, *[report.MISSING] * 2, train, report.MISSING, test, report.MISSING]
        assert found[arm, optimizer] == expected
