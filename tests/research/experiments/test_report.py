"""What the tables of the comparison say of two results, and of runs that are missing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

for package in ("matplotlib", "scipy", "tqdm"):
    pytest.importorskip(package)

from experiments import report, spread, tasks  # noqa: E402
from experiments.comparison import Comparison, Setting  # noqa: E402
from experiments.statistics import Difference  # noqa: E402


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


def test_cells_that_need_a_missing_run_say_so() -> None:
    store = spread.Store(Path(__file__).parents[3] / "docs" / "results" / spread.FOLDER)

    def find(setting: Setting) -> dict[str, Any] | None:
        return None if setting.entrant == "adamw" and setting.trial.schedule == "cosine" else store.find(setting)

    committed, found = (report.format_task_table(Comparison(tasks.TASKS["quadratic"], each)) for each in (store.find, find))
    # Differences need AdamW in the same arm, and the steps to the target need tuned AdamW.
    for expected_line, line in zip(committed.splitlines()[2:], found.splitlines()[2:], strict=True):
        arm, title, *expected = (cell.strip() for cell in expected_line.split("|")[1:-1])
        missing = (1, 2) if arm == "defaults" else range(7) if title == "AdamW" else (1, 2, 4, 6)
        cells = [report.MISSING if place in missing else cell for place, cell in enumerate(expected)]
        assert [cell.strip() for cell in line.split("|")[1:-1]] == [arm, title, *cells]
