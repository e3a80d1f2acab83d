"""The Keras adapter on the backend of this process, and the core on keras.ops and on TensorFlow."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.metadata import version
from typing import Any

import keras
import numpy as np
from adapters.keras.keras_problems import BACKEND, floatx, make, read, tensors, to_numpy, variables_of
from matrix.core_runner import CoreRunner, Library
from matrix.experiments import Snapshot, of_steps


def tensorflow_gradients(params: Sequence[Any], x: np.ndarray, y: np.ndarray) -> Sequence[Any]:
    """Of the mean cross-entropy of the network, by a tape."""
    import tensorflow as tf

    with tf.GradientTape() as tape:
        tape.watch(params)
        kernel1, bias1, kernel2, bias2 = params
        logits = tf.tanh(x @ kernel1 + bias1) @ kernel2 + bias2
        loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(labels=y, logits=logits))
    return tape.gradient(loss, params)


def backend_gradients() -> Callable[..., Sequence[Any]]:
    if BACKEND == "tensorflow":
        return tensorflow_gradients
    if BACKEND == "jax":
        from matrix import jax_runners

        return jax_runners.gradients
    from matrix import torch_runners

    return torch_runners.gradients


class KerasRunner:
    """The Keras adapter: `apply` for gradients that are given, a compiled model for a training.

    But in float64 on JAX and torch the gradients of a training are the backend's own, not of a model: Keras' operations there
    take float64 through float32 (https://github.com/keras-team/keras/issues/23704).
    """

    def __init__(self, kind: str, params: Sequence[np.ndarray], *, lr: Any, **hyper: float) -> None:
        if "weight_decay" in hyper:
            # As float64: the base class takes a Python float through float32 on TensorFlow.
            hyper["weight_decay"] = np.float64(hyper["weight_decay"])
        self.optimizer = make(kind, **hyper)
        self.params = params
        self.lr = None if lr is None else of_steps(lr, 0.0)
        self.count = 0
        self.variables: list[Any] = []
        self.model: Any = None

    def step(self, grads: Sequence[np.ndarray]) -> None:
        self.build()
        self.optimizer.learning_rate = self.lr(self.count)
        self.count += 1
        self.optimizer.apply(tensors(grads), self.variables)

    def build(self) -> None:
        if not self.variables:
            self.variables = variables_of(self.params)
            self.optimizer.build(self.variables)

    def train(self, x: np.ndarray, y: np.ndarray) -> None:
        if x.dtype == np.float64 and BACKEND != "tensorflow":
            self.build()
            values = [keras.ops.convert_to_tensor(each) for each in self.variables]
            self.optimizer.apply(list(backend_gradients()(values, x, y)), self.variables)
            return
        if self.model is None:
            # Told, for Keras' default policy keeps the first float type that it saw.
            dtype = x.dtype.name
            hidden = keras.layers.Dense(32, activation="tanh", dtype=dtype, name="hidden")
            head = keras.layers.Dense(10, dtype=dtype, name="head")
            self.model = keras.Sequential([keras.layers.Input((64,), dtype=dtype), hidden, head])
            self.model.set_weights(self.params)
            loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, dtype=dtype)
            self.model.compile(optimizer=self.optimizer, loss=loss)
        self.model.train_on_batch(x, y)

    def read(self) -> Snapshot:
        if self.model is None:
            return read(self.optimizer, self.variables)
        return [{"param": to_numpy(weight)} for weight in self.model.trainable_variables]

    def posterior(self) -> Snapshot:
        known = map(self.optimizer.posterior, self.variables)
        return [{name: to_numpy(tensor) for name, tensor in each._asdict().items()} for each in known]


def array(values: np.ndarray) -> Any:
    return keras.ops.convert_to_tensor(values, dtype=values.dtype.name)


_OPS = Library(keras.ops, array, to_numpy, backend_gradients())
RUNNERS: dict[str, Callable[..., Any]] = {
    f"keras-{BACKEND}": KerasRunner,
    f"core-keras-{BACKEND}": partial(CoreRunner, _OPS),
}
if BACKEND == "tensorflow":
    import tensorflow as tf

    # GPUs would round float32 products to TF32.
    tf.config.experimental.enable_tensor_float_32_execution(False)
    RUNNERS["core-tensorflow"] = partial(CoreRunner, _OPS._replace(xp=tf, array=tf.constant, numpy=np.array))


def versions() -> dict[str, str]:
    backend = tf.__version__ if BACKEND == "tensorflow" else version(BACKEND)
    return {"keras": keras.__version__, BACKEND: backend}


def gpu() -> str | None:
    """The name of the GPU, if there is one."""
    if BACKEND == "tensorflow":
        found = tf.config.list_physical_devices("GPU")
        return tf.config.experimental.get_device_details(found[0]).get("device_name", "GPU") if found else None
    if BACKEND == "jax":
        from matrix import jax_runners

        return jax_runners.gpu()
    from matrix import torch_runners

    return torch_runners.gpu()


@contextlib.contextmanager
def scope(device: str, dtype: str) -> Iterator[None]:
    """Where tensors are made, and of what dtype by default."""
    # On torch without an index: Keras moves what is on "cpu" to "cpu:0", and the copies are leaves no more.
    place = device if BACKEND == "torch" else f"{device}:0"
    with keras.device(place), floatx(dtype):
        yield
