"""Shared by the tests of the Keras adapter: float64 on every backend, state by name, and a model with known gradients."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import numpy as np
import pytest
from drivers.precision import x64
from drivers.rules import RULES

import vsgd.keras
import vsgd.numpy

BACKEND = keras.backend.backend()


@contextlib.contextmanager
def floatx(dtype: str) -> Iterator[None]:
    """Set Keras' default float dtype, and enable 64 bits in JAX for float64."""
    before = keras.config.floatx()
    keras.config.dtype_policy()  # Keras makes it at the first call, and never again
    keras.config.set_floatx(dtype)
    try:
        with allow_float64() if dtype == "float64" else contextlib.nullcontext():
            yield
    finally:
        keras.config.set_floatx(before)


def allow_float64() -> contextlib.AbstractContextManager[Any]:
    return x64() if BACKEND == "jax" else contextlib.nullcontext()


def make(kind: str, **hyper: Any) -> Any:
    """Make an optimizer, with arguments by the names of the other adapters."""
    names = {"lr": "learning_rate", "eps": "epsilon"}
    return getattr(vsgd.keras, kind)(**{names.get(name, name): value for name, value in hyper.items()})


def variables_of(params: Sequence[np.ndarray]) -> list[Any]:
    return [keras.Variable(param, dtype=param.dtype.name, name=f"p{i}") for i, param in enumerate(params)]


def tensors(arrays: Sequence[np.ndarray | None]) -> list[Any]:
    return [None if array is None else keras.ops.convert_to_tensor(array, dtype=array.dtype.name) for array in arrays]


def to_numpy(variable: Any) -> np.ndarray:
    return np.array(keras.ops.convert_to_numpy(variable))


def read(optimizer: Any, variables: Sequence[Any]) -> list[dict[str, np.ndarray]]:
    """Return the value and state of each variable; the state is looked up by name among the optimizer's variables."""
    named = {variable.name: variable for variable in optimizer.variables}
    names = RULES[type(optimizer).__name__].state_names
    return [{"param": to_numpy(each), **{name: to_numpy(named[f"{each.name}_{name}"]) for name in names}} for each in variables]


def stateless(optimizer: Any, variables: Sequence[Any], transform: Callable[[Any], Any] = lambda function: function) -> Any:
    """Return an `apply` that uses a transformed `stateless_apply`, which JAX needs."""
    pure = transform(optimizer.stateless_apply)

    def apply(grads: Sequence[Any]) -> None:
        values = ([keras.ops.convert_to_tensor(each) for each in some] for some in (optimizer.variables, variables))
        optimizer_values, variable_values = values
        new, new_optimizer = pure(optimizer_values, grads, variable_values)
        for each, value in zip([*variables, *optimizer.variables], [*new, *new_optimizer], strict=True):
            each.assign(value)

    return apply


def jitted_apply(optimizer: Any, variables: list[Any]) -> Any:
    """Return `optimizer.apply`, compiled like the backend's `fit`."""
    if BACKEND == "tensorflow":
        import tensorflow as tf

        return tf.function(optimizer.apply, jit_compile=True)
    if BACKEND == "jax":
        import jax

        return stateless(optimizer, variables, jax.jit)
    pytest.skip("torch.compile has its test in test_keras_training.py")


# Parameters of two shapes, and their gradients.
_shapes = ((3,), (2, 1, 3))
_draw = np.random.default_rng(3).standard_normal
PARAMS = [_draw(shape) for shape in _shapes]
GRADS = [[_draw(shape) for shape in _shapes] for _ in range(12)]
FLOAT32 = [param.astype(np.float32) for param in PARAMS]

#: Options that round everything stochastically that can be.
COMPACT: dict[str, Any] = {"state_dtype": "bfloat16", "stochastic_rounding": True}
kinds = pytest.mark.parametrize("kind", RULES)
storages = pytest.mark.parametrize("options", [{}, COMPACT], ids=["float32", "compact"])


# A linear model with a mean squared error, so that NumPy can compute each gradient.
FEATURES, OUTPUTS, SAMPLES, BATCH = 5, 2, 64, 16
_rng = np.random.default_rng(7)
X = _rng.standard_normal((SAMPLES, FEATURES)).astype(np.float32)
Y = (X @ _rng.standard_normal((FEATURES, OUTPUTS)) + 0.3 * _rng.standard_normal((SAMPLES, OUTPUTS))).astype(np.float32)
KERNEL = _rng.standard_normal((FEATURES, OUTPUTS)).astype(np.float32)
BIAS = np.zeros(OUTPUTS, np.float32)


def linear_model(optimizer: Any, **compile_options: Any) -> Any:
    model = keras.Sequential([keras.layers.Input((FEATURES,)), keras.layers.Dense(OUTPUTS, name="linear")])
    model.set_weights([KERNEL, BIAS])
    model.compile(optimizer=optimizer, loss="mse", **compile_options)
    return model


def fit(model: Any, epochs: int) -> list[float]:
    """Train with the batches in order, and return the loss of each epoch."""
    return model.fit(X, Y, batch_size=BATCH, epochs=epochs, shuffle=False, verbose=0).history["loss"]


def numpy_fit(kind: str, epochs: int, **hyper: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return kernel and bias after the same training in float64, by the NumPy adapter and closed-form gradients."""
    kernel, bias = KERNEL.astype(np.float64), BIAS.astype(np.float64)
    optimizer = getattr(vsgd.numpy, kind)([kernel, bias], **hyper)
    for _ in range(epochs):
        for start in range(0, SAMPLES, BATCH):
            x, y = X[start : start + BATCH].astype(np.float64), Y[start : start + BATCH].astype(np.float64)
            error = 2 * (x @ kernel + bias - y) / y.size
            optimizer.step([x.T @ error, error.sum(0)])
    return kernel, bias
