"""Test what the Keras callback reports in `fit`, when, and where it writes, on the backend of this process."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

keras = pytest.importorskip("keras")

from adapters.keras.keras_problems import BACKEND, BATCH, X, Y, fit, kinds, linear_model, make, to_numpy  # noqa: E402
from contract.summaries import check  # noqa: E402

from vsgd.keras.monitor import MonitorCallback, tensorboard_writer  # noqa: E402
from vsgd.monitor import Look, Monitor  # noqa: E402
from vsgd.posterior import Posterior  # noqa: E402


def watch(model: Any, every: int, epochs: int, *sinks: Any) -> list[Look]:
    """Return the looks that a monitor takes in a training of 4 batches an epoch."""
    looks: list[Look] = []
    callback = MonitorCallback(Monitor(looks, *sinks, every=every, smoothing=0), batch_size=BATCH)
    model.fit(X, Y, batch_size=BATCH, epochs=epochs, shuffle=False, verbose=0, callbacks=[callback])
    return looks


@kinds
def test_what_is_seen_is_what_the_posterior_says_and_watching_changes_nothing(kind: str) -> None:
    model, alone = linear_model(make(kind)), linear_model(make(kind))
    # The last look is after the last batch, so the optimizer still has the state that the monitor saw.
    looks = watch(model, 6, 3)
    assert [look.step for look in looks] == [6, 12]
    optimizer, variables = model.optimizer, model.trainable_variables
    scales = optimizer.noise_scale(batch_size=BATCH)
    known = [Posterior(*map(to_numpy, optimizer.posterior(variable))) for variable in variables]
    for variable, posterior, scale in zip(variables, known, scales.tensors, strict=True):
        check(looks[-1].tensors[variable.path], [posterior], scale, surprise=None)
    check(looks[-1].overall, known, scales.overall, surprise=None)
    fit(alone, 3)
    for one, other in zip(model.get_weights(), alone.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_look_has_the_loss_that_keras_logs() -> None:
    logged: list[float] = []
    noting = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: logged.append(logs["loss"]))
    looks: list[Look] = []
    model = linear_model(make("VSGD"))
    watching = MonitorCallback(Monitor(looks, every=2), batch_size=BATCH)
    model.fit(X, Y, batch_size=BATCH, shuffle=False, verbose=0, callbacks=[noting, watching])
    assert [look.loss for look in looks] == logged[1::2]


@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 2}], ids=["plain", "accumulating"])
def test_it_counts_on_from_the_steps_that_were_taken(options: dict[str, Any]) -> None:
    model = linear_model(make("VSGD", **options))
    fit(model, 1)  # 4 batches, not watched
    assert [look.step for _ in range(2) for look in watch(model, 3, 1)] == [6, 9, 12]


@pytest.mark.skipif(BACKEND == "torch", reason="Keras has no steps_per_execution on PyTorch")
@pytest.mark.skipif(keras.__version__.startswith("3.10."), reason="Keras 3.10 names an execution by its first step")
def test_it_counts_in_executions_of_several_steps() -> None:
    model = linear_model(make("VSGD"), steps_per_execution=2)
    assert [look.step for look in watch(model, 3, 3)] == [4, 6, 10, 12]


def test_a_loss_scaling_optimizer_is_looked_into_and_others_are_refused() -> None:
    assert [look.step for look in watch(linear_model(keras.optimizers.LossScaleOptimizer(make("VSGD"))), 4, 1)] == [4]
    with pytest.raises(TypeError, match="the model's optimizer is SGD, but must be VSGD, ConstantVSGD or a GradientObserver"):
        watch(linear_model(keras.optimizers.SGD()), 1, 1)


def test_tensorboard_reads_what_was_written(tmp_path: Path) -> None:
    missing = [name for name in ("tensorboard", *(() if BACKEND == "tensorflow" else ("torch",))) if find_spec(name) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    writer = tensorboard_writer(str(tmp_path))
    looks = watch(linear_model(make("VSGD")), 2, 1, writer)
    writer.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    for tag in looks[0].scalars():
        if BACKEND == "tensorflow":
            read = [(each.step, make_ndarray(each.tensor_proto).item()) for each in events.Tensors(tag)]
        else:
            read = [(each.step, each.value) for each in events.Scalars(tag)]
        assert read == [(look.step, pytest.approx(look.scalars()[tag])) for look in looks]


@pytest.mark.skipif(BACKEND == "tensorflow", reason="TensorFlow writes by itself")
def test_without_anything_that_writes_it_says_what_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="needs torch and tensorboard"):
        tensorboard_writer(str(tmp_path))
