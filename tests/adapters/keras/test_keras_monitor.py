"""The Keras callback, on the backend of this process: what it tells in `fit`, when, and where it writes."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

keras = pytest.importorskip("keras")

from adapters.keras.keras_problems import BACKEND, BATCH, X, Y, linear_model, make, to_numpy  # noqa: E402
from contract.summaries import check  # noqa: E402
from drivers.rules import RULES  # noqa: E402

from vsgd.keras.monitor import MonitorCallback, tensorboard_writer  # noqa: E402
from vsgd.monitor import Look, Monitor  # noqa: E402
from vsgd.posterior import Posterior  # noqa: E402


def watched(optimizer: Any, every: int, epochs: int, *sinks: Any, **options: Any) -> tuple[Any, list[Look]]:
    """The model after training with a monitor, and what that saw: 4 batches an epoch."""
    looks: list[Look] = []
    model = linear_model(optimizer, **options)
    callback = MonitorCallback(Monitor(looks, *sinks, every=every, smoothing=0), batch_size=BATCH)
    model.fit(X, Y, batch_size=BATCH, epochs=epochs, shuffle=False, verbose=0, callbacks=[callback])
    return model, looks


@pytest.mark.parametrize("kind", RULES)
def test_what_is_seen_is_what_the_posterior_says(kind: str) -> None:
    # The last look is after the last batch, so that the optimizer still has what was seen.
    model, looks = watched(make(kind), 6, 3)
    assert [look.step for look in looks] == [6, 12]
    optimizer, variables = model.optimizer, model.trainable_variables
    scales = optimizer.noise_scale(batch_size=BATCH)
    known = [Posterior(*map(to_numpy, optimizer.posterior(variable))) for variable in variables]
    seen = looks[-1]
    for variable, posterior, scale in zip(variables, known, scales.tensors, strict=True):
        check(seen.tensors[variable.path], [posterior], scale, surprise=None)
    check(seen.overall, known, scales.overall, surprise=None)


def test_watching_changes_nothing() -> None:
    model, looks = watched(make("VSGD"), 3, 2)
    alone = linear_model(make("VSGD"))
    alone.fit(X, Y, batch_size=BATCH, epochs=2, shuffle=False, verbose=0)
    assert len(looks) == 2
    for one, other in zip(model.get_weights(), alone.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 2}], ids=["plain", "accumulating"])
def test_it_counts_on_from_the_steps_that_were_taken(options: dict[str, Any]) -> None:
    model = linear_model(make("VSGD", **options))
    looks: list[Look] = []
    model.fit(X, Y, batch_size=BATCH, epochs=1, shuffle=False, verbose=0)  # 4 batches, not watched
    for _ in range(2):
        callback = MonitorCallback(Monitor(looks, every=3), batch_size=BATCH)
        model.fit(X, Y, batch_size=BATCH, epochs=1, shuffle=False, verbose=0, callbacks=[callback])
    assert [look.step for look in looks] == [6, 9, 12]


def test_it_counts_in_executions_of_several_steps() -> None:
    if BACKEND == "torch":
        pytest.skip("Keras has no steps_per_execution on PyTorch")
    _, looks = watched(make("VSGD"), 3, 3, steps_per_execution=2)
    assert [look.step for look in looks] == [4, 6, 10, 12]


def test_a_loss_scaling_optimizer_is_looked_into() -> None:
    _, looks = watched(keras.optimizers.LossScaleOptimizer(make("VSGD")), 4, 1)
    assert [look.step for look in looks] == [4]


def test_other_optimizers_are_refused() -> None:
    with pytest.raises(TypeError, match="the model's optimizer is SGD, but must be VSGD or ConstantVSGD"):
        watched(keras.optimizers.SGD(), 1, 1)


def test_tensorboard_reads_what_was_written(tmp_path: Path) -> None:
    missing = [name for name in ("tensorboard", *(() if BACKEND == "tensorflow" else ("torch",))) if find_spec(name) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    writer = tensorboard_writer(str(tmp_path))
    _, looks = watched(make("VSGD"), 2, 1, writer)
    writer.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    for tag, values in [(tag, [look.scalars()[tag] for look in looks]) for tag in looks[0].scalars()]:
        if BACKEND == "tensorflow":
            read = [(each.step, make_ndarray(each.tensor_proto).item()) for each in events.Tensors(tag)]
        else:
            read = [(each.step, each.value) for each in events.Scalars(tag)]
        assert read == [(2, pytest.approx(values[0])), (4, pytest.approx(values[1]))]


def test_without_anything_that_writes_it_says_what_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if BACKEND == "tensorflow":
        pytest.skip("TensorFlow writes by itself")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="needs torch and tensorboard"):
        tensorboard_writer(str(tmp_path))
