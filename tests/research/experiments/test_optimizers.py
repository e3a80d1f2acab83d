"""The optimizers that are compared: each is what its name says, with its defaults or what is given."""

from __future__ import annotations

import itertools

import pytest

from experiments.optimizers import OPTIMIZERS

CLASSES = {"vsgd": "VSGD", "constant-vsgd": "ConstantVSGD", "adam": "Adam", "adamw": "AdamW", "sgd": "SGD", "lion": "Lion"}


def test_learning_rates_span_three_decades_around_the_default_by_equal_factors() -> None:
    for each in OPTIMIZERS.values():
        rates = each.list_learning_rates(20)
        assert len(rates) == 20
        assert rates[-1] / rates[0] == pytest.approx(1000)
        assert rates[0] < each.learning_rate < rates[-1]
        for low, high in itertools.pairwise(rates):
            assert high / low == pytest.approx(1000 ** (1 / 19), rel=1e-2)  # of three digits each
    with pytest.raises(ValueError, match="count is 1, but must be at least 2"):
        OPTIMIZERS["sgd"].list_learning_rates(1)


def test_each_is_made_with_its_defaults_or_what_is_given() -> None:
    keras = pytest.importorskip("keras")
    schedule = keras.optimizers.schedules.ExponentialDecay(0.5, 10, 0.5, staircase=True)
    for name, each in OPTIMIZERS.items():
        made = each.make()
        assert type(made).__name__ == CLASSES[name]
        assert float(made.learning_rate) == pytest.approx(each.learning_rate)
        other = each.make(schedule, weight_decay=0.125)
        assert other.get_config()["learning_rate"]["class_name"] == "ExponentialDecay"
        assert other.weight_decay == 0.125
    assert OPTIMIZERS["sgd"].make().momentum == 0.9
    assert OPTIMIZERS["sgd"].make(momentum=0.5).momentum == 0.5
