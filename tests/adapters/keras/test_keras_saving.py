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
    COMPACT,
    FLOAT32,
    GRADS,
    fit,
    kinds,
    linear_model,
    make,
    storages,
    tensors,
    to_numpy,
    variables_of,
)

import vsgd.keras  # noqa: E402


@kinds
def test_set_weights_sets_all(kind: str) -> None:
    variables, optimizer, new = variables_of(FLOAT32), make(kind, lr=0.125), make(kind, lr=0.5)
    for grads in GRADS:
        optimizer.apply(tensors([grad.astype(np.float32) for grad in grads]), variables)
    new.build(variables)
    new.set_weights([to_numpy(each) for each in optimizer.variables])
    for ours, theirs in zip(new.variables, optimizer.variables, strict=True):
        np.testing.assert_array_equal(to_numpy(ours), to_numpy(theirs))
    assert to_numpy(new.iterations) == 12
    assert to_numpy(new.learning_rate) == 0.125


OPTIONS: list[dict[str, Any]] = [
    {},
    {"learning_rate": 0.25, "variance_ratio": 7.0, "prior_strength": 1e-6, "epsilon": 1e-6, "weight_decay": 0.125},
    {"clipnorm": 1.0, "use_ema": True, "ema_momentum": 0.5, "ema_overwrite_frequency": 3, "name": "mine", "prior_shape": 0.0},
    # The configuration cannot hold NumPy's integers.
    {"loss_scale_factor": 8.0, "gradient_accumulation_steps": 2, "seed": np.int64(7), **COMPACT},
    {"clipvalue": 1.0, "learning_rate": keras.optimizers.schedules.CosineDecay(0.1, 10)},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@kinds
def test_keras_own_serialization_test(kind: str, options: dict[str, Any]) -> None:
    testing = pytest.importorskip("keras.src.testing")
    optimizer = make(kind, **options)
    revived = testing.TestCase().run_class_serialization_test(optimizer)
    config = optimizer.get_config()
    assert set(config) == set(inspect.signature(type(optimizer)).parameters) - {"kwargs"}
    assert revived.get_config() == json.loads(json.dumps(config))
    for name, value in options.items():
        if name != "learning_rate":
            assert config[name] == value
            assert getattr(revived, name) == value


@kinds
def test_it_is_found_by_its_registered_name_and_older_ones_have_the_papers_shape(kind: str) -> None:
    registered, cls = f"vsgd>{kind}", getattr(vsgd.keras, kind)
    assert keras.saving.get_registered_name(cls) == registered
    assert type(keras.optimizers.get(registered)) is cls
    config = make(kind, prior_shape=0.0, variance_ratio=5.0).get_config()
    del config["prior_shape"]
    optimizer = keras.optimizers.get({"class_name": registered, "config": config})
    assert type(optimizer) is cls
    assert (optimizer.variance_ratio, optimizer.prior_shape) == (5.0, None)


@storages
@kinds
def test_a_saved_model_continues_bit_by_bit(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    # Not with an average of the weights: on JAX, Keras 3.15 then fails in the second fit, with Adam as well.
    model = linear_model(make(kind, lr=0.05, weight_decay=0.01, clipnorm=1.0, **options))
    fit(model, epochs=3)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert type(loaded.optimizer) is type(model.optimizer)
    assert loaded.optimizer.get_config() == model.optimizer.get_config()
    arrays = [[*each.weights, *each.optimizer.variables] for each in (loaded, model)]
    for _ in range(2):
        for ours, theirs in zip(*arrays, strict=True):
            np.testing.assert_array_equal(to_numpy(ours), to_numpy(theirs))
        assert fit(loaded, epochs=2) == fit(model, epochs=2)
