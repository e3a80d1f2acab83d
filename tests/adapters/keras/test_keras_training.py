"""Training Keras models with VSGD, on the backend of this process, as `test_keras.py`."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

keras = pytest.importorskip("keras")

from adapters.keras.keras_problems import (  # noqa: E402
    BACKEND,
    BIAS,
    KERNEL,
    X,
    Y,
    fit,
    linear_model,
    make,
    numpy_fit,
    read,
    stateless,
    tensors,
    to_numpy,
    variables_of,
)
from drivers.rules import RULES  # noqa: E402

from vsgd.keras import VSGD, ConstantVSGD  # noqa: E402

kinds = pytest.mark.parametrize("kind", RULES)


def assert_weights(model: Any, expected: tuple[np.ndarray, np.ndarray], atol: float) -> None:
    for weight, value in zip(model.get_weights(), expected, strict=True):
        np.testing.assert_allclose(weight, value, rtol=0, atol=atol)


@kinds
@pytest.mark.parametrize("jit_compile", [True, False, "auto"])
def test_fit_equals_numpy(kind: str, jit_compile: Any) -> None:
    if BACKEND == "torch" and jit_compile is True:
        if not any(map(shutil.which, ("c++", "g++", "clang++"))):
            pytest.skip("no C++ compiler, which torch.compile needs on the CPU")
        if kind == "ConstantVSGD":
            pytest.skip("torch.compile is slow, and VSGD has tried it")
        if tuple(map(int, keras.__version__.split(".")[:2])) < (3, 15):
            pytest.skip("torch compiles no model of an older Keras, with its own Adam neither")
        pytest.importorskip("torch").compiler.reset()
    model = linear_model(make(kind, lr=0.05), jit_compile=jit_compile)
    losses = fit(model, epochs=5)
    assert losses[-1] < 0.5 * losses[0]
    # 20 steps of up to 0.05, in float32.
    assert_weights(model, numpy_fit(kind, 5, lr=0.05), atol=1e-5)


def test_a_model_compiles_with_the_registered_name() -> None:
    model = linear_model("vsgd>VSGD")
    assert type(model.optimizer) is VSGD
    fit(model, epochs=2)
    assert_weights(model, numpy_fit("VSGD", 2), atol=1e-5)


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
    before = [weight.copy() for weight in model.get_layer("first").get_weights()]
    losses = fit(model, epochs=3)
    assert losses[-1] < losses[0]
    for weight, old in zip(model.get_layer("first").get_weights(), before, strict=True):
        np.testing.assert_array_equal(weight, old)
    states = [each.name for each in model.optimizer.variables[2:]]
    assert len(states) == 6
    assert all("second" in name for name in states)


def zero_gradient_steps(model: Any, steps: int) -> list[np.ndarray]:
    """By what each variable was multiplied when its gradient was zero, and the step so its decay alone."""
    before = model.get_weights()
    for _ in range(steps):
        model.optimizer.apply([keras.ops.zeros(each.shape) for each in model.trainable_variables], model.trainable_variables)
    return [after / start for after, start in zip(model.get_weights(), before, strict=True)]


def test_biases_and_normalizations_do_not_decay_where_they_are_excluded(tmp_path: Path) -> None:
    layers = [keras.layers.Dense(8, name="first"), keras.layers.LayerNormalization(name="norm"), keras.layers.Dense(2)]
    model = keras.Sequential([keras.layers.Input((X.shape[1],)), *layers])
    model.set_weights([weight + 1 for weight in model.get_weights()])  # biases start at zero
    optimizer = VSGD(learning_rate=0.125, weight_decay=0.25)
    optimizer.exclude_from_weight_decay(var_names=["bias", "gamma", "beta"])
    model.compile(optimizer=optimizer, loss="mse")
    kernel, spared = (1 - 0.125 * 0.25) ** 3, 1.0

    def assert_factors(factors: list[np.ndarray], expected: list[float]) -> None:
        for factor, value in zip(factors, expected, strict=True):
            np.testing.assert_allclose(factor, np.full_like(factor, value), rtol=1e-6 if value == kernel else 0)

    as_told = [kernel, spared, spared, spared, kernel, spared]
    assert_factors(zero_gradient_steps(model, 3), as_told)
    # Keras' files do not say what is excluded.
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert_factors(zero_gradient_steps(loaded, 3), [kernel] * 6)
    loaded.optimizer.exclude_from_weight_decay(var_names=["bias", "gamma", "beta"])
    assert_factors(zero_gradient_steps(loaded, 3), as_told)


def test_accumulation_over_all_batches_equals_one_large_batch() -> None:
    small = linear_model(make("VSGD", lr=0.05, gradient_accumulation_steps=4))
    fit(small, epochs=3)
    large = linear_model(make("VSGD", lr=0.05))
    large.fit(X, Y, batch_size=len(X), epochs=3, shuffle=False, verbose=0)
    assert_weights(small, tuple(large.get_weights()), atol=1e-5)
    assert np.abs(large.get_weights()[0] - KERNEL).max() > 0.1


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
    for ours, theirs in zip(read(inner, variables), before, strict=True):
        for name in theirs:
            np.testing.assert_array_equal(ours[name], theirs[name])
    assert to_numpy(inner.iterations) == 1
    assert to_numpy(optimizer.dynamic_scale) == 512
    # The step that counted saw the gradient unscaled.
    np.testing.assert_allclose(before[0]["mu_g"], 1 / 31, rtol=1e-6)


def test_an_embedding_trains_as_the_dense_layer_that_it_stands_for() -> None:
    # On TensorFlow its gradients are sparse; the rows that no batch shows must follow their state as with gradients of zero.
    rng = np.random.default_rng(0)
    words = rng.integers(0, 9, 64)
    words[words == 4] = 5
    targets = rng.standard_normal((64, 3)).astype(np.float32)
    table = rng.standard_normal((9, 3)).astype(np.float32)
    results = []
    for layer, inputs, shape in (
        (keras.layers.Embedding(9, 3), words, ()),
        (keras.layers.Dense(3, use_bias=False), np.eye(9, dtype=np.float32)[words], (9,)),
    ):
        model = keras.Sequential([keras.layers.Input(shape), layer])
        model.set_weights([table])
        model.compile(optimizer=ConstantVSGD(learning_rate=0.05), loss="mse")
        model.fit(inputs, targets, batch_size=16, epochs=5, shuffle=False, verbose=0)
        results.append([to_numpy(each) for each in [*model.weights, *model.optimizer.variables]])
    for sparse, dense in zip(*results, strict=True):
        np.testing.assert_allclose(sparse, dense, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(results[0][0][4], table[4])
    assert np.abs(results[0][0] - table).max() > 0.2


def test_its_learning_rate_can_be_set_by_callbacks() -> None:
    model = linear_model(make("VSGD"))
    schedule = keras.callbacks.LearningRateScheduler(lambda epoch: 0.0 if epoch else 0.05)
    model.fit(X, Y, batch_size=16, epochs=3, shuffle=False, verbose=0, callbacks=[schedule])
    assert_weights(model, numpy_fit("VSGD", 1, lr=0.05), atol=1e-5)
    assert not np.array_equal(model.get_weights()[1], BIAS)
