"""Test the comparison's protocol on the committed records; `test_committed_pages.py` tests its tables."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("scipy")
pytest.importorskip("tqdm")

from experiments import tasks
from experiments.comparison import ARMS, ENTRANTS, TEST_SEEDS, TUNING_SEEDS, Comparison, Setting, Trial
from experiments.spread import FOLDER, Store

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
        # A trial that two arms chose occurs once.
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
