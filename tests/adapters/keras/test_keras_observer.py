"""Test the Keras observer in `fit`, in files, under a loss scale and with schedules, and the errors that it raises."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from adapters.keras.keras_problems import BATCH, X, Y, to_numpy

from vsgd.keras import VSGD, GradientObserver
from vsgd.keras.monitor import MonitorCallback
from vsgd.monitor import Look, Monitor


def train(optimizer: keras.optimizers.Optimizer, **options: Any) -> keras.Model:
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.layers.Input((X.shape[1],)), keras.layers.Dense(Y.shape[1], name="linear")])
    model.compile(optimizer=optimizer, loss="mse")
    model.fit(X, Y, batch_size=BATCH, epochs=2, shuffle=False, verbose=0, **options)
    return model


@pytest.mark.parametrize("make", [lambda: keras.optimizers.AdamW(0.01), lambda: VSGD(0.01)], ids=["AdamW", "VSGD"])
def test_fit_trains_alike_with_and_without_it_and_files_hold_it(make: Callable[[], Any], tmp_path: Path) -> None:
    plain, watched = train(make()), train(GradientObserver(make()))
    for one, other in zip(plain.get_weights(), watched.get_weights(), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)
    posterior = watched.optimizer.posterior(watched.trainable_variables[0])
    assert (to_numpy(posterior.noise_variance) > 0).all()
    watched.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    for one, other in zip(loaded.optimizer.posterior(loaded.trainable_variables[0]), posterior, strict=True):
        np.testing.assert_array_equal(to_numpy(one), to_numpy(other))
    assert int(to_numpy(loaded.optimizer.iterations)) == int(to_numpy(watched.optimizer.iterations)) > 0


def test_it_sees_gradients_without_a_loss_scale_and_hands_on_rates() -> None:
    plain = train(GradientObserver(keras.optimizers.SGD(0.01)))
    fixed = train(GradientObserver(keras.optimizers.SGD(0.01, loss_scale_factor=64.0)))
    dynamic = train(keras.optimizers.LossScaleOptimizer(GradientObserver(keras.optimizers.SGD(0.01)), initial_scale=64.0))
    expected = plain.optimizer.posterior(plain.trainable_variables[0])
    for observer, model in ((fixed.optimizer, fixed), (dynamic.optimizer.inner_optimizer, dynamic)):
        for one, other in zip(observer.posterior(model.trainable_variables[0]), expected, strict=True):
            np.testing.assert_allclose(to_numpy(one), to_numpy(other), rtol=1e-4)
    plain.optimizer.learning_rate = 0.5
    assert float(to_numpy(plain.optimizer.inner_optimizer.learning_rate)) == 0.5


def test_what_it_cannot_watch_is_refused() -> None:
    with pytest.raises(TypeError, match="inner_optimizer is float, but must be a Keras optimizer"):
        GradientObserver(0.01)
    observer = GradientObserver(keras.optimizers.SGD())
    variable = keras.Variable([1.0, 2.0], name="v")
    observer.build([variable])
    with pytest.raises(ValueError, match="variable is w, but must be one that the optimizer was built with"):
        observer.posterior(keras.Variable([1.0], name="w"))
    with pytest.raises(ValueError, match="grads has 2 items, but there are 1 variables"):
        observer.apply([keras.ops.ones(2)] * 2)
    assert to_numpy(observer.posterior(variable).mean).tolist() == [0.0, 0.0]


def test_the_monitors_callback_takes_it() -> None:
    looks: list[Look] = []
    watching = MonitorCallback(Monitor(looks, every=4, smoothing=0), batch_size=BATCH)
    model = train(GradientObserver(keras.optimizers.SGD(0.01), max_elements=7), callbacks=[watching])
    steps = int(to_numpy(model.optimizer.iterations))
    assert looks[-1].step == steps
    for variable in model.trainable_variables:
        found, posterior = looks[-1].tensors[variable.path], model.optimizer.posterior(variable)
        noise = to_numpy(posterior.noise_variance)
        scale = np.prod(variable.shape) / noise.size
        assert found.noise_trace == pytest.approx(BATCH * scale * noise.sum(), rel=1e-5)
        assert found.gain == pytest.approx(np.median(to_numpy(posterior.gain)), rel=1e-5)
