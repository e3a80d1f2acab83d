"""Saving: the optimizer's configuration, its variables, and the files of models, on the backend of this process, as
`test_keras.py`."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

keras = pytest.importorskip("keras")

from adapters.keras.keras_problems import (  # noqa: E402
    GRADS,
    PARAMS,
    as_dtype,
    assert_continues,
    fit,
    linear_model,
    make,
    read,
    tensors,
    to_numpy,
    variables_of,
)
from drivers.rules import RULES  # noqa: E402

from vsgd.keras import VSGD, ConstantVSGD  # noqa: E402

kinds = pytest.mark.parametrize("kind", RULES)


@kinds
def test_set_weights_resumes_bit_by_bit(kind: str) -> None:
    params = as_dtype(PARAMS[1:3], "float32")
    variables = variables_of(params)
    optimizer = make(kind, lr=0.125)
    for grads in GRADS[:6]:
        optimizer.apply(tensors(as_dtype(grads[1:3], "float32")), variables)
    new_variables = variables_of([to_numpy(each) for each in variables])
    new = make(kind, lr=0.5)
    new.build(new_variables)
    new.set_weights([to_numpy(each) for each in optimizer.variables])
    for grads in GRADS[6:]:
        for each, its in ((optimizer, variables), (new, new_variables)):
            each.apply(tensors(as_dtype(grads[1:3], "float32")), its)
    for ours, theirs in zip(read(new, new_variables), read(optimizer, variables), strict=True):
        for name in theirs:
            np.testing.assert_array_equal(ours[name], theirs[name])
    assert to_numpy(new.iterations) == 12
    assert to_numpy(new.learning_rate) == 0.125


OPTIONS: list[dict[str, Any]] = [
    {},
    {"learning_rate": 0.25, "variance_ratio": 7.0, "prior_strength": 1e-6, "epsilon": 1e-6, "weight_decay": 0.125},
    {"clipnorm": 1.0, "use_ema": True, "ema_momentum": 0.5, "ema_overwrite_frequency": 3, "name": "mine"},
    {"global_clipnorm": 1.0, "loss_scale_factor": 8.0, "gradient_accumulation_steps": 2},
    {"clipvalue": 1.0, "learning_rate": "schedule"},
]


def with_schedule(options: dict[str, Any]) -> dict[str, Any]:
    if options.get("learning_rate") != "schedule":
        return options
    return {**options, "learning_rate": keras.optimizers.schedules.CosineDecay(0.1, 10)}


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("cls", [VSGD, ConstantVSGD])
def test_keras_own_serialization_test(cls: type, options: dict[str, Any]) -> None:
    testing = pytest.importorskip("keras.src.testing")
    optimizer = cls(**with_schedule(options))
    revived = testing.TestCase().run_class_serialization_test(optimizer)
    config = optimizer.get_config()
    assert set(config) == set(inspect.signature(cls).parameters) - {"kwargs"}
    assert revived.get_config() == json.loads(json.dumps(config))
    for name, value in options.items():
        if name != "learning_rate":
            assert config[name] == value
            assert getattr(revived, name) == value


@pytest.mark.parametrize("cls", [VSGD, ConstantVSGD])
def test_it_is_found_by_its_registered_name(cls: type) -> None:
    registered = f"vsgd>{cls.__name__}"
    assert keras.saving.get_registered_name(cls) == registered
    assert type(keras.optimizers.get(registered)) is cls
    optimizer = keras.optimizers.get({"class_name": registered, "config": {"variance_ratio": 5.0}})
    assert type(optimizer) is cls
    assert optimizer.variance_ratio == 5.0
    revived = keras.optimizers.deserialize(keras.optimizers.serialize(optimizer))
    assert type(revived) is cls
    assert revived.get_config() == optimizer.get_config()


@kinds
def test_a_saved_model_continues_bit_by_bit(kind: str, tmp_path: Path) -> None:
    # Not with an average of the weights: on JAX, Keras 3.15 then fails in the second fit, with Adam as well.
    model = linear_model(make(kind, lr=0.05, weight_decay=0.01, clipnorm=1.0))
    fit(model, epochs=3)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert type(loaded.optimizer) is type(model.optimizer)
    assert loaded.optimizer.get_config() == model.optimizer.get_config()
    assert_continues(loaded, model)


def test_weights_only_files_hold_the_optimizer_too(tmp_path: Path) -> None:
    model = linear_model(make("VSGD"))
    fit(model, epochs=2)
    model.save_weights(tmp_path / "model.weights.h5")
    other = linear_model(make("VSGD"))
    other.optimizer.build(other.trainable_variables)
    other.load_weights(tmp_path / "model.weights.h5")
    for ours, theirs in zip(other.optimizer.variables, model.optimizer.variables, strict=True):
        np.testing.assert_array_equal(to_numpy(ours), to_numpy(theirs))
