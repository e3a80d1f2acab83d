"""Runners of the Keras adapter on the backend of this process, and of the core on keras.ops and on TensorFlow."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib import import_module
from importlib.metadata import version
from typing import Any

import keras
import numpy as np
from adapters.keras.keras_problems import BACKEND, floatx, make, to_numpy
from drivers.keras_driver import KerasDriver
from matrix.adapter_runner import AdapterRunner
from matrix.core_runner import CoreRunner, Library
from matrix.experiments import Snapshot


def tensorflow_gradients(params: Sequence[Any], x: np.ndarray, y: np.ndarray) -> Sequence[Any]:
    """Return the gradients of the network's mean cross-entropy, by a tape."""
    import tensorflow as tf

    with tf.GradientTape() as tape:
        tape.watch(params)
        kernel1, bias1, kernel2, bias2 = params
        logits = tf.tanh(x @ kernel1 + bias1) @ kernel2 + bias2
        loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(labels=y, logits=logits))
    return tape.gradient(loss, params)


#: The module with the backend's own runners; TensorFlow has none.
NATIVE = None if BACKEND == "tensorflow" else import_module(f"matrix.{BACKEND}_runners")
gradients = tensorflow_gradients if NATIVE is None else NATIVE.gradients


class KerasRunner(AdapterRunner):
    """The Keras adapter: `apply` for given gradients, a compiled model for a training.

    In float64 on JAX and torch, a training uses the backend's gradients instead of a model, because Keras' operations there
    take float64 through float32 (https://github.com/keras-team/keras/issues/23704).
    """

    def __init__(self, kind: str, params: Sequence[np.ndarray], **options: Any) -> None:
        if "weight_decay" in options:
            # As float64: the base class takes a Python float through float32 on TensorFlow.
            options["weight_decay"] = np.float64(options["weight_decay"])
        super().__init__(KerasDriver, gradients, kind, params, **options)
        self.kind, self.model = kind, None

    def train(self, x: np.ndarray, y: np.ndarray) -> None:
        if x.dtype == np.float64 and BACKEND != "tensorflow":
            values = [keras.ops.convert_to_tensor(each) for each in self.driver.params]
            self.driver.apply(list(self.gradients(values, x, y)))
            return
        if self.model is None:
            # Set the dtype, because Keras' default policy keeps the first float type that it used.
            dtype = x.dtype.name
            hidden = keras.layers.Dense(32, activation="tanh", dtype=dtype, name="hidden")
            head = keras.layers.Dense(10, dtype=dtype, name="head")
            self.model = keras.Sequential([keras.layers.Input((64,), dtype=dtype), hidden, head])
            self.model.set_weights([each["param"] for each in super().read()])
            loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, dtype=dtype)
            self.model.compile(optimizer=make(self.kind), loss=loss)
        self.model.train_on_batch(x, y)

    def read(self) -> Snapshot:
        if self.model is None:
            return super().read()
        return [{"param": to_numpy(weight)} for weight in self.model.trainable_variables]


def array(values: np.ndarray) -> Any:
    return keras.ops.convert_to_tensor(values, dtype=values.dtype.name)


_OPS = Library(keras.ops, array, to_numpy, gradients)
RUNNERS: dict[str, Callable[..., Any]] = {
    f"keras-{BACKEND}": KerasRunner,
    f"core-keras-{BACKEND}": partial(CoreRunner, _OPS),
}
if BACKEND == "tensorflow":
    import tensorflow as tf

    # By default, GPUs round float32 products to TF32.
    tf.config.experimental.enable_tensor_float_32_execution(False)
    RUNNERS["core-tensorflow"] = partial(CoreRunner, _OPS._replace(xp=tf, array=tf.constant, numpy=np.array))


def versions() -> dict[str, str]:
    backend = tf.__version__ if BACKEND == "tensorflow" else version(BACKEND)
    return {"keras": keras.__version__, BACKEND: backend}


def gpu() -> str | None:
    """Return the GPU's name, or None."""
    if NATIVE is not None:
        return NATIVE.gpu()
    found = tf.config.list_physical_devices("GPU")
    return tf.config.experimental.get_device_details(found[0]).get("device_name", "GPU") if found else None


@contextlib.contextmanager
def scope(device: str, dtype: str) -> Iterator[None]:
    """Set the device and the default dtype of new tensors."""
    # Torch gets no index: Keras would move a tensor from "cpu" to "cpu:0", and the copy is no longer a leaf.
    place = device if BACKEND == "torch" else f"{device}:0"
    with keras.device(place), floatx(dtype):
        yield
