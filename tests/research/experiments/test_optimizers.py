"""The optimizers that are compared: each is what its name says, with what it is told."""

from __future__ import annotations

import itertools
import math

import pytest

from experiments.optimizers import OPTIMIZERS, find_optimizer

CLASSES = {
    "vsgd": "VSGD",
    "constant-vsgd": "ConstantVSGD",
    "adam": "Adam",
    "adamw": "AdamW",
    "sgd": "SGD",
    "lion": "Lion",
}


def test_all_learning_rates_span_the_same_number_of_decades() -> None:
    assert {round(math.log10(each.span[1] / each.span[0]), 9) for each in OPTIMIZERS.values()} == {3}
    for each in OPTIMIZERS.values():
        assert each.span[0] < each.learning_rate < each.span[1]


def test_learning_rates_go_from_end_to_end_by_equal_factors() -> None:
    assert OPTIMIZERS["adam"].list_learning_rates(4) == [1e-4, 1e-3, 1e-2, 0.1]
    rates = OPTIMIZERS["sgd"].list_learning_rates(20)
    assert (rates[0], rates[-1], len(rates)) == (1e-3, 1.0, 20)
    factor = 1000 ** (1 / 19)
    for low, high in itertools.pairwise(rates):
        assert high / low == pytest.approx(factor, rel=1e-2)  # of three digits each
    with pytest.raises(ValueError, match="count is 1, but must be at least 2"):
        OPTIMIZERS["sgd"].list_learning_rates(1)


def test_each_is_made_with_its_defaults_or_what_it_is_told() -> None:
    keras = pytest.importorskip("keras")
    assert set(CLASSES) == set(OPTIMIZERS)
    schedule = keras.optimizers.schedules.ExponentialDecay(0.5, 10, 0.5, staircase=True)
    for name, kind in CLASSES.items():
        made = OPTIMIZERS[name].make()
        assert type(made).__name__ == kind
        assert float(made.learning_rate) == pytest.approx(OPTIMIZERS[name].learning_rate)
        assert float(OPTIMIZERS[name].make(0.25).learning_rate) == 0.25
        other = OPTIMIZERS[name].make(schedule, weight_decay=0.125)
        assert other.get_config()["learning_rate"]["class_name"] == "ExponentialDecay"
        assert other.weight_decay == 0.125
    assert OPTIMIZERS["sgd"].make().momentum == 0.9
    assert OPTIMIZERS["sgd"].make(momentum=0.5).momentum == 0.5
    assert OPTIMIZERS["vsgd"].make(kappa1=0.6).kappa1 == 0.6


def test_an_unknown_name_is_said() -> None:
    with pytest.raises(ValueError, match=r"optimizer is 'adm', but must be one of vsgd, constant-vsgd, adam, "):
        find_optimizer("adm")
