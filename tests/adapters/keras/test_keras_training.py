"""Training Keras models with VSGD, on the backend of this process, as `test_keras.py`."""

from __future__ import annotations

import shutil
from typing import Any

import numpy as np
import pytest

keras = pytest.importorskip("keras")

from adapters.keras.keras_problems import (  # noqa: E402
    BACKEND,
    BIAS,
    X,
    Y,
    fit,
    kinds,
    linear_model,
    make,
    numpy_fit,
    read,
    stateless,
    tensors,
    to_numpy,
    variables_of,
)
from drivers import assert_equal  # noqa: E402

from vsgd.keras import VSGD  # noqa: E402


def prepare_torch_compile() -> None:
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("no C++ compiler, which torch.compile needs on the CPU")
    if tuple(map(int, keras.__version__.split(".")[:2])) < (3, 15):
        pytest.skip("torch compiles no model of an older Keras, with its own Adam neither")
    pytest.importorskip("torch").compiler.reset()


def assert_weights(model: Any, expected: tuple[np.ndarray, np.ndarray]) -> None:
    for weight, value in zip(model.get_weights(), expected, strict=True):
        np.testing.assert_allclose(weight, value, rtol=0, atol=1e-5)


@kinds
@pytest.mark.parametrize("jit_compile", [True, False, "auto"])
def test_fit_equals_numpy(kind: str, jit_compile: Any) -> None:
    if BACKEND == "torch" and jit_compile is True:
        if kind == "ConstantVSGD":
            pytest.skip("torch.compile is slow, and VSGD has tried it")
        prepare_torch_compile()
    model = linear_model(make(kind, lr=0.05), jit_compile=jit_compile)
    losses = fit(model, epochs=5)
    assert losses[-1] < 0.5 * losses[0]
    # 20 steps of up to 0.05, in float32.
    assert_weights(model, numpy_fit(kind, 5, lr=0.05))


@pytest.mark.skipif(BACKEND != "torch", reason="torch's own")
def test_a_model_compiled_by_torch_rounds_too() -> None:
    prepare_torch_compile()
    ends = []
    for jit_compile in (True, False):
        model = linear_model(make("VSGD", lr=0.05, state_dtype="bfloat16"), jit_compile=jit_compile)
        fit(model, epochs=3)
        ends.append(np.concatenate([to_numpy(each).ravel() for each in model.optimizer.variables[2:]]))
    # The gradients differ in their last digits; other noise would leave hardly an element.
    assert np.mean(ends[0] == ends[1]) > 0.8


def two_layers(**options: Any) -> Any:
    model = keras.Sequential(
        [
            keras.layers.Input((X.shape[1],)),
            keras.layers.Dense(16, activation="tanh", name="first", kernel_initializer=keras.initializers.GlorotUniform(1)),
            keras.layers.Dense(Y.shape[1], name="second", kernel_initializer=keras.initializers.GlorotUniform(2)),
        ]
    )
    model.compile(optimizer=VSGD(**options), loss="mse")
    return model


def test_frozen_layers_stay_and_have_no_state() -> None:
    model = two_layers()
    model.get_layer("first").trainable = False
    model.compile(optimizer=VSGD(), loss="mse")
    before = model.get_weights()
    losses = fit(model, epochs=3)
    assert losses[-1] < losses[0]
    for weight, old in zip(model.get_weights()[:2], before[:2], strict=True):
        np.testing.assert_array_equal(weight, old)
    states = [each.name for each in model.optimizer.variables[2:]]
    assert len(states) == 6
    assert all("second" in name for name in states)


@pytest.fixture
def policy() -> Any:
    before = keras.config.dtype_policy()
    yield keras.config.set_dtype_policy
    keras.config.set_dtype_policy(before)


@pytest.mark.parametrize("name", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision_trains(policy: Any, name: str) -> None:
    policy(name)
    model = two_layers(learning_rate=0.02)
    losses = fit(model, epochs=10)
    assert losses[-1] < 0.5 * losses[0]
    assert {each.dtype for each in model.trainable_variables} == {"float32"}
    inner = getattr(model.optimizer, "inner_optimizer", model.optimizer)
    assert isinstance(inner, VSGD)
    assert (inner is not model.optimizer) == (name == "mixed_float16")
    assert to_numpy(inner.iterations) == 40
    assert {each.dtype for each in inner.variables[2:]} == {"float32"}


def test_an_overflow_under_loss_scaling_skips_the_step() -> None:
    variables = variables_of([np.ones(3, np.float32)])
    inner = make("VSGD")
    optimizer = keras.optimizers.LossScaleOptimizer(inner, initial_scale=1024.0)
    optimizer.build(variables)
    # On JAX, Keras' loss scaling knows no other way.
    apply = stateless(optimizer, variables) if BACKEND == "jax" else lambda grads: optimizer.apply(grads, variables)
    apply(tensors([np.full(3, 1024, np.float32)]))
    before = read(inner, variables)
    apply(tensors([np.asarray([1, np.inf, 1], np.float32)]))
    assert_equal(read(inner, variables), before)
    assert to_numpy(inner.iterations) == 1
    # The step that counted saw the gradient unscaled.
    np.testing.assert_allclose(before[0]["mu_g"], 1 / 31, rtol=1e-6)


def test_its_learning_rate_can_be_set_by_callbacks() -> None:
    model = linear_model(make("VSGD"))
    schedule = keras.callbacks.LearningRateScheduler(lambda epoch: 0.0 if epoch else 0.05)
    model.fit(X, Y, batch_size=16, epochs=3, shuffle=False, verbose=0, callbacks=[schedule])
    assert_weights(model, numpy_fit("VSGD", 1, lr=0.05))
    assert not np.array_equal(model.get_weights()[1], BIAS)
