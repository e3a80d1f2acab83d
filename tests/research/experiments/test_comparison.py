"""The comparison's protocol, on response surfaces that are made up."""

from __future__ import annotations

import math
from typing import Any

import pytest

pytest.importorskip("scipy")

from research.made_up_runs import Surface, distance, diverged, middle, record

from experiments import comparison, tasks
from experiments.comparison import ARMS, ENTRANTS, SCHEDULES, TEST_SEEDS, TUNING_SEEDS, Comparison, Setting, Trial

LOSS, ACCURACY = "quadratic", "mnist1d-mlp"


def on(name: str, make: Any) -> tuple[Comparison, Surface]:
    surface = Surface(make)
    return Comparison(tasks.TASKS[name], surface), surface


def bowl(setting: Setting) -> dict[str, Any]:
    """A loss that is best in the middle of the span, and lower with the constant schedule; each seed at a level of its own."""
    worse = 0.0 if setting.trial.schedule == "constant" else 0.05
    return record(LOSS, 1 + distance(setting, 1.05 * middle(setting.entrant)) ** 2 + worse + setting.seed)


def hill(setting: Setting) -> dict[str, Any]:
    """An accuracy of 0.9 in the middle and less elsewhere, and a loss that falls with the learning rate."""
    accuracy = 0.9 if distance(setting, middle(setting.entrant)) < 0.5 else 0.5
    return record(ACCURACY, accuracy, loss=1 / setting.trial.learning_rate)


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


@pytest.mark.parametrize("entrant", ENTRANTS)
def test_the_best_trial_of_each_arm_is_chosen(entrant: str) -> None:
    found, _ = on(LOSS, bowl)
    rates = ENTRANTS[entrant].base.list_learning_rates(10)
    # The middle of ten is between the fifth and the sixth, and the best a bit above.
    assert found.choose_trial(entrant, "20 trials") == Trial(rates[5], "constant")
    assert found.choose_trial(entrant, "5 trials") == Trial(rates[5], "cosine")
    assert found.choose_trial(entrant, "defaults") == Trial(ENTRANTS[entrant].base.learning_rate, "constant")


def test_accuracies_are_to_be_high_and_of_equal_ones_the_loss_decides() -> None:
    found, _ = on(ACCURACY, hill)
    rates = ENTRANTS["sgd"].base.list_learning_rates(10)
    assert found.choose_trial("sgd", "20 trials") == Trial(rates[5], "constant")


def test_a_trial_of_which_one_run_diverged_is_not_chosen() -> None:
    best = Trial(ENTRANTS["sgd"].base.list_learning_rates(10)[5], "constant")
    found, _ = on(LOSS, lambda setting: diverged() if setting.trial == best and setting.seed == 1 else bowl(setting))
    assert found.score_trial("sgd", best) == (math.inf, math.inf)
    assert found.choose_trial("sgd", "20 trials") == Trial(ENTRANTS["sgd"].base.list_learning_rates(10)[4], "constant")


def test_choices_and_the_target_are_made_on_the_tuning_seeds_alone() -> None:
    found, surface = on(LOSS, bowl)
    for entrant in ENTRANTS:
        for arm in ARMS:
            found.choose_trial(entrant, arm)
        found.list_tried(entrant)
    found.compute_target()
    assert {setting.seed for setting in surface.asked} == set(TUNING_SEEDS)
    assert not set(TUNING_SEEDS) & set(TEST_SEEDS)
    assert (len(TUNING_SEEDS), len(TEST_SEEDS)) == (3, 10)


def test_what_is_chosen_is_tested_on_all_fresh_seeds_once() -> None:
    found, _ = on(LOSS, bowl)
    assert len(list(found.list_tuning_settings("lion"))) == 20 * 3
    settings = list(found.list_test_settings("lion"))
    assert len(settings) == len(set(settings)) == 3 * 10
    assert {setting.trial for setting in settings} == {found.choose_trial("lion", arm) for arm in ARMS}
    for trial in {setting.trial for setting in settings}:
        assert tuple(setting.seed for setting in settings if setting.trial == trial) == TEST_SEEDS
    # Where both arms choose the same, its runs are shared.
    shared, _ = on(LOSS, lambda setting: bowl(setting) if setting.trial.schedule == "cosine" else record(LOSS, 9.0))
    assert shared.choose_trial("lion", "5 trials") == shared.choose_trial("lion", "20 trials")
    assert len(list(shared.list_test_settings("lion"))) == 2 * 10


def test_nothing_is_chosen_before_all_trials_are_made() -> None:
    last = ARMS["20 trials"](ENTRANTS["vsgd"])[-1]
    found, _ = on(LOSS, lambda setting: None if (setting.trial, setting.seed) == (last, 2) else bowl(setting))
    # The highest rate with the cosine schedule is among the five, too.
    assert found.choose_trial("vsgd", "20 trials") is found.choose_trial("vsgd", "5 trials") is found.list_tried("vsgd") is None
    assert {setting.trial for setting in found.list_test_settings("vsgd")} == set(ARMS["defaults"](ENTRANTS["vsgd"]))
    assert found.choose_trial("adamw", "20 trials") is not None


def test_the_target_is_98_percent_of_the_way_of_tuned_adamw() -> None:
    # From 10 to 2.0 on the middle seed of three.
    level = {0: 1.0, 1: 2.0, 2: 3.5}
    found, _ = on(LOSS, lambda setting: record(LOSS, level[setting.seed] + distance(setting, middle("adamw"))))
    trial = found.choose_trial("adamw", "20 trials")
    ends = 2.0 + abs(math.log10(trial.learning_rate / middle("adamw")))
    assert found.compute_target() == pytest.approx(10 + 0.98 * (ends - 10))
    untuned, _ = on(LOSS, lambda setting: None if setting.entrant == "adamw" else bowl(setting))
    assert untuned.compute_target() is None


def test_results_are_of_all_test_seeds_in_order_or_not_at_all() -> None:
    found, _ = on(LOSS, lambda setting: record(LOSS, float(setting.seed)))
    trial = Trial(0.01, "constant")
    assert [each["curve"][-1] for each in found.find_results("vsgd", trial)] == list(TEST_SEEDS)
    partly, _ = on(LOSS, lambda setting: None if setting.seed == TEST_SEEDS[4] else bowl(setting))
    assert partly.find_results("vsgd", trial) is None


def test_the_rates_that_were_tried_are_those_of_the_chosen_schedule() -> None:
    found, _ = on(LOSS, bowl)
    rates, values = found.list_tried("adamw")
    assert rates == ENTRANTS["adamw"].base.list_learning_rates(10)
    # The mean of the seeds 0, 1 and 2 is 1.
    assert values == pytest.approx([2 + math.log10(rate / (1.05 * middle("adamw"))) ** 2 for rate in rates])


def test_edges_are_told() -> None:
    found, _ = on(LOSS, bowl)
    rates = ENTRANTS["vsgd"].base.list_learning_rates(10)
    assert [found.is_at_edge("vsgd", Trial(rate, "cosine")) for rate in rates] == [True, *[False] * 8, True]


def rates_of(entrant: str, trial: Trial) -> list[float]:
    return Setting(LOSS, entrant, trial, 0, "jax").rates


def test_learning_rates_follow_the_schedule_and_the_warm_up() -> None:
    steps = tasks.TASKS[LOSS].steps
    assert rates_of("vsgd", Trial(0.3, "constant")) == [0.3] * steps
    cosine = rates_of("vsgd", Trial(0.3, "cosine"))
    assert len(cosine) == steps
    for part in (0, 0.25, 0.5, 0.75):
        assert cosine[int(part * steps)] == pytest.approx(0.15 * (1 + math.cos(math.pi * part)))
    assert 0 < cosine[-1] < 1e-6
    warm = rates_of("adamw-warm", Trial(0.3, "constant"))
    # 5% of 2000 steps.
    assert warm[:100] == pytest.approx([0.3 * (step + 1) / 100 for step in range(100)])
    assert warm[100:] == [0.3] * (steps - 100)
    both = rates_of("adamw-warm", Trial(0.3, "cosine"))
    assert both == pytest.approx([first * second / 0.3 for first, second in zip(warm, cosine, strict=True)])


def test_no_two_runs_have_one_key() -> None:
    found, _ = on(LOSS, bowl)
    longer = Comparison(tasks.find_task(f"{LOSS}@4"), bowl)
    other, _ = on("characters", bowl)
    settings = [
        setting for each in (found, longer, other) for entrant in ENTRANTS for setting in each.list_tuning_settings(entrant)
    ]
    assert len({repr(setting.key) for setting in settings}) == len(settings) == 3 * 7 * 60
    assert other._make_setting("vsgd", Trial(0.01, "constant"), 0).key["edition"] == tasks.hash_text()


def test_an_entrant_that_is_not_there_is_named() -> None:
    with pytest.raises(ValueError, match=r"^entrant is 'adam', but must be one of vsgd, vsgd-kappas, "):
        comparison.find_entrant("adam")


def test_an_entrant_may_have_other_hyperparameters() -> None:
    found = comparison.find_entrant("vsgd-kappas:kappa2=0.8,prior_strength=1e-10")
    assert found.hyper == {"kappa1": 0.6, "kappa2": 0.8, "prior_strength": 1e-10}
    assert found.title == "VSGD, kappas 0.6 and 0.7, kappa2 0.8, prior_strength 1e-10"
    assert found.base is ENTRANTS["vsgd"].base
    key = Setting(LOSS, "vsgd:kappa1=0.6,kappa2=0.7", Trial(0.01, "cosine"), 0, "jax").key
    # The same run as that of the entrant with a name of its own.
    assert key == Setting(LOSS, "vsgd-kappas", Trial(0.01, "cosine"), 0, "jax").key
    for name in ("vsgd:", "vsgd:kappa1", "vsgd:kappa1=high", "vsgd:kappa1=0.6,"):
        with pytest.raises(
            ValueError, match=f"^entrant is '{name}', but after ':' it must have NAME=NUMBER, separated by commas$"
        ):
            comparison.find_entrant(name)


def test_schedules_begin_at_the_learning_rate() -> None:
    assert [shape(0.0) for shape in SCHEDULES.values()] == [1.0, 1.0]
