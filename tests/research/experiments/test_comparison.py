"""The comparison's protocol, on the committed records, and what its tables say of two results and of missing ones."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("scipy")
pytest.importorskip("tqdm")

from experiments import comparison, report, tasks
from experiments.comparison import ARMS, ENTRANTS, TEST_SEEDS, TUNING_SEEDS, Comparison, Setting, Trial
from experiments.spread import FOLDER, Store
from experiments.statistics import Difference

TASK = "quadratic"
STORE = Store(Path(__file__).parents[3] / "docs" / "results" / FOLDER)


def test_everyone_has_as_many_trials_over_as_wide_a_span_and_the_same_schedules() -> None:
    for arm, count in (("defaults", 1), ("5 trials", 5), ("20 trials", 20)):
        trials = {name: ARMS[arm](each) for name, each in ENTRANTS.items()}
        assert {len(set(each)) for each in trials.values()} == {count}
        assert len({tuple(trial.schedule for trial in each) for each in trials.values()}) == 1
        spans = {max(each).learning_rate / min(each).learning_rate for each in trials.values()}
        assert max(spans) == pytest.approx(min(spans), rel=0.02)  # rates have three digits
    for each in ENTRANTS.values():
        assert set(ARMS["5 trials"](each)) < set(ARMS["20 trials"](each))
        assert ARMS["defaults"](each) == [Trial(each.base.learning_rate, "constant")]


def test_choices_and_the_target_are_made_on_the_tuning_seeds_and_tested_on_fresh_ones() -> None:
    seeds = set()

    def find(setting: Setting) -> Any:
        seeds.add(setting.seed)
        return STORE.find(setting)

    found = Comparison(tasks.TASKS[TASK], find)
    for entrant in ENTRANTS:
        # A trial that two arms chose comes once.
        trials = list(dict.fromkeys(found.choose_trial(entrant, arm) for arm in ARMS))
        settings = [(each.trial, each.seed) for each in found.list_test_settings(entrant)]
        assert settings == [(trial, seed) for trial in trials for seed in TEST_SEEDS]
        found.list_tried(entrant)
    found.compute_target()
    assert seeds == set(TUNING_SEEDS)
    assert not seeds & set(TEST_SEEDS)


def test_learning_rates_follow_the_schedule_and_the_warm_up() -> None:
    def rates_of(entrant: str, schedule: str) -> list[float]:
        return Setting(TASK, entrant, Trial(0.3, schedule), 0, "jax").rates

    steps = tasks.TASKS[TASK].steps
    cosine = [0.15 * (1 + math.cos(math.pi * step / steps)) for step in range(steps)]
    warm_up = [min(1, (step + 1) / 100) for step in range(steps)]  # 5% of 2000 steps
    assert rates_of("vsgd", "constant") == [0.3] * steps
    assert rates_of("vsgd", "cosine") == pytest.approx(cosine)
    assert rates_of("adamw-warm", "constant") == pytest.approx([0.3 * part for part in warm_up])
    assert rates_of("adamw-warm", "cosine") == pytest.approx([rate * part for rate, part in zip(cosine, warm_up, strict=True)])


def test_no_two_runs_have_one_key() -> None:
    every = [Comparison(tasks.find_task(name), STORE.find) for name in (TASK, f"{TASK}@4", "characters")]
    settings = [setting for each in every for entrant in ENTRANTS for setting in each.list_tuning_settings(entrant)]
    assert len({repr(setting.key) for setting in settings}) == len(settings) == 3 * 7 * 60
    assert settings[-1].key["edition"] == tasks.hash_text()


def test_an_entrant_may_have_other_hyperparameters() -> None:
    found = comparison.find_entrant("vsgd-kappas:kappa2=0.8,prior_strength=1e-10")
    assert found.hyper == {"kappa1": 0.6, "kappa2": 0.8, "prior_strength": 1e-10}
    assert found.title == "VSGD, kappas 0.6 and 0.7, kappa2 0.8, prior_strength 1e-10"
    # The same run as that of the entrant with a name of its own.
    same = (Setting(TASK, name, Trial(0.01, "cosine"), 0, "jax").key for name in ("vsgd:kappa1=0.6,kappa2=0.7", "vsgd-kappas"))
    assert next(same) == next(same)
    for name in ("vsgd:", "vsgd:kappa1", "vsgd:kappa1=high", "vsgd:kappa1=0.6,"):
        with pytest.raises(
            ValueError, match=f"^entrant is '{name}', but after ':' it must have NAME=NUMBER, separated by commas$"
        ):
            comparison.find_entrant(name)


# The tables


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
    def find(setting: Setting) -> Any:
        return None if setting.entrant == "adamw" and setting.trial.schedule == "cosine" else STORE.find(setting)

    committed, found = (report.format_task_table(Comparison(tasks.TASKS[TASK], each)) for each in (STORE.find, find))
    # Differences need AdamW in the same arm, and the steps to the target need tuned AdamW.
    for expected_line, line in zip(committed.splitlines()[2:], found.splitlines()[2:], strict=True):
        arm, title, *expected = (cell.strip() for cell in expected_line.split("|")[1:-1])
        missing = (1, 2) if arm == "defaults" else range(7) if title == "AdamW" else (1, 2, 4, 6)
        cells = [report.MISSING if place in missing else cell for place, cell in enumerate(expected)]
        assert [cell.strip() for cell in line.split("|")[1:-1]] == [arm, title, *cells]
