"""The comparison's protocol, on response surfaces that are made up."""

from __future__ import annotations

import math
from typing import Any

import pytest

pytest.importorskip("scipy")

from research.made_up_runs import distance, middle, record

from experiments import comparison, tasks
from experiments.comparison import ARMS, ENTRANTS, TEST_SEEDS, TUNING_SEEDS, Comparison, Setting, Trial

LOSS = "quadratic"


def bowl(setting: Setting) -> dict[str, Any]:
    """A loss that is best in the middle of the span, and lower with the constant schedule; each seed at a level of its own."""
    worse = 0.0 if setting.trial.schedule == "constant" else 0.05
    return record(LOSS, 1 + distance(setting, 1.05 * middle(setting.entrant)) ** 2 + worse + setting.seed)


def on(make: Any, name: str = LOSS) -> Comparison:
    return Comparison(tasks.find_task(name), make)


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

    def watched(setting: Setting) -> dict[str, Any]:
        seeds.add(setting.seed)
        return bowl(setting)

    found = on(watched)
    for entrant in ENTRANTS:
        settings = list(found.list_test_settings(entrant))
        assert len(settings) == len(set(settings)) == 3 * 10
        assert {each.trial for each in settings} == {found.choose_trial(entrant, arm) for arm in ARMS}
        assert tuple(each.seed for each in settings) == 3 * TEST_SEEDS
        found.list_tried(entrant)
    found.compute_target()
    assert seeds == set(TUNING_SEEDS)
    assert not seeds & set(TEST_SEEDS)
    # Where both arms choose the same, its runs are shared.
    shared = on(lambda setting: bowl(setting) if setting.trial.schedule == "cosine" else record(LOSS, 9.0))
    assert len(list(shared.list_test_settings("lion"))) == 2 * 10


def test_learning_rates_follow_the_schedule_and_the_warm_up() -> None:
    def rates_of(entrant: str, schedule: str) -> list[float]:
        return Setting(LOSS, entrant, Trial(0.3, schedule), 0, "jax").rates

    steps = tasks.TASKS[LOSS].steps
    cosine = [0.15 * (1 + math.cos(math.pi * step / steps)) for step in range(steps)]
    warm_up = [min(1, (step + 1) / 100) for step in range(steps)]  # 5% of 2000 steps
    assert rates_of("vsgd", "constant") == [0.3] * steps
    assert rates_of("vsgd", "cosine") == pytest.approx(cosine)
    assert rates_of("adamw-warm", "constant") == pytest.approx([0.3 * part for part in warm_up])
    assert rates_of("adamw-warm", "cosine") == pytest.approx([rate * part for rate, part in zip(cosine, warm_up, strict=True)])


def test_no_two_runs_have_one_key() -> None:
    every = [on(bowl, name) for name in (LOSS, f"{LOSS}@4", "characters")]
    settings = [setting for each in every for entrant in ENTRANTS for setting in each.list_tuning_settings(entrant)]
    assert len({repr(setting.key) for setting in settings}) == len(settings) == 3 * 7 * 60
    assert settings[-1].key["edition"] == tasks.hash_text()


def test_an_entrant_may_have_other_hyperparameters() -> None:
    found = comparison.find_entrant("vsgd-kappas:kappa2=0.8,prior_strength=1e-10")
    assert found.hyper == {"kappa1": 0.6, "kappa2": 0.8, "prior_strength": 1e-10}
    assert found.title == "VSGD, kappas 0.6 and 0.7, kappa2 0.8, prior_strength 1e-10"
    # The same run as that of the entrant with a name of its own.
    same = (Setting(LOSS, name, Trial(0.01, "cosine"), 0, "jax").key for name in ("vsgd:kappa1=0.6,kappa2=0.7", "vsgd-kappas"))
    assert next(same) == next(same)
    for name in ("vsgd:", "vsgd:kappa1", "vsgd:kappa1=high", "vsgd:kappa1=0.6,"):
        with pytest.raises(
            ValueError, match=f"^entrant is '{name}', but after ':' it must have NAME=NUMBER, separated by commas$"
        ):
            comparison.find_entrant(name)
