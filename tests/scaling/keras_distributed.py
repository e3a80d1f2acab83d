"""Train and save in a process with a Keras backend and several devices, and return the deviation from one device."""

from __future__ import annotations

import contextlib
import functools
import pickle
from pathlib import Path
from typing import Any

import keras
import numpy as np
from scaling.keras_network import apart, arrays, compiled, fit, spare


def _mirrored_strategy() -> Any:
    """Return a strategy over all GPUs, or over two halves of the CPU; call this before TensorFlow runs anything."""
    import tensorflow as tf

    if tf.config.list_physical_devices("GPU"):
        return tf.distribute.MirroredStrategy()
    (cpu,) = tf.config.list_physical_devices("CPU")
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
    return tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])


STRATEGY = _mirrored_strategy() if keras.backend.backend() == "tensorflow" else None


def model_parallel() -> Any:
    """Shard batches over the rows of a mesh, and kernels and a bias over its columns: two columns if the devices allow it."""
    devices = keras.distribution.list_devices()
    columns = 2 if len(devices) % 2 == 0 else 1
    mesh = keras.distribution.DeviceMesh((len(devices) // columns, columns), ["batch", "model"], devices)
    layouts = keras.distribution.LayoutMap(mesh)
    layouts[".*first/kernel"] = (None, "model")
    layouts[".*first/bias"] = ("model",)
    layouts[".*second/kernel"] = ("model", None)
    return keras.distribution.ModelParallel(layout_map=layouts, batch_dim_name="batch")


def scope(how: str) -> contextlib.AbstractContextManager[Any]:
    """Return the context in which models are made and trained."""
    if how == "alone":
        return contextlib.nullcontext()
    if how == "MirroredStrategy":
        return STRATEGY.scope()
    return {"DataParallel": keras.distribution.DataParallel, "ModelParallel": model_parallel}[how]().scope()


@functools.cache
def alone(case: str) -> list[np.ndarray]:
    """Return the weights and variables of the training on one device."""
    return arrays(fit(compiled(case)))


def strayed(case: str, how: str) -> float:
    """Return a training's deviation from one device, and assert that all copies of a mirrored variable are equal."""
    with scope(how):
        model = fit(compiled(case))
    if how == "MirroredStrategy":
        assert_copies_are_equal(model)
    return apart(arrays(model), alone(case))


def assert_copies_are_equal(model: Any) -> None:
    for variable in [*model.weights, *model.optimizer.variables]:
        copies = [copy.numpy().tobytes() for copy in variable.value.values]
        assert copies == copies[:1] * STRATEGY.num_replicas_in_sync


def save(how: str, path: str, case: str) -> None:
    """Save a trained model and its arrays, and the same after more training."""
    with scope(how):
        model = fit(compiled(case))
        write(model, path)
        write(fit(model), f"{path}-goes-on")


def write(model: Any, path: str) -> None:
    model.save(f"{path}.keras")
    Path(f"{path}.pickle").write_bytes(pickle.dumps(arrays(model)))


def load(how: str, path: str) -> tuple[float, float]:
    """Return a model's deviation after loading, and after some more steps."""
    with scope(how):
        model = loaded(path)
        strayed_so_far = apart(arrays(model), _read(path))
        return strayed_so_far, apart(arrays(fit(model)), _read(f"{path}-goes-on"))


def loaded(path: str) -> Any:
    """Load a saved model, and restore the settings that its file lacks."""
    model = keras.saving.load_model(f"{path}.keras")
    spare(model.optimizer)
    # The file stores what "auto" chose when saving; a strategy rejects it, and torch would call its compiler.
    model.jit_compile = keras.backend.backend() == "jax"
    return model


def _read(path: str) -> list[np.ndarray]:
    return pickle.loads(Path(f"{path}.pickle").read_bytes())
