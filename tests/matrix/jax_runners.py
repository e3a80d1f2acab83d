"""Runners of the optax transformations, and of the core on jax.numpy."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from drivers.base import Driver
from drivers.precision import x64
from matrix.adapter_runner import AdapterRunner
from matrix.core_runner import CoreRunner, Library

# By default, GPUs round float32 products to TF32.
jax.config.update("jax_default_matmul_precision", "highest")


def _loss(params: Sequence[Any], x: Any, y: Any) -> Any:
    kernel1, bias1, kernel2, bias2 = params
    logits = jnp.tanh(x @ kernel1 + bias1) @ kernel2 + bias2
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), y[:, None], axis=1).mean()


#: Return the gradients of the network's mean cross-entropy: `gradients(params, x, y)`.
gradients = jax.jit(jax.grad(_loss))


def _drive(*arguments: Any, **options: Any) -> Driver:
    from drivers.optax_driver import OptaxDriver  # the core needs no optax

    return OptaxDriver(*arguments, **options)


RUNNERS = {
    "optax-eager": partial(AdapterRunner, partial(_drive, jit=False), gradients),
    "optax-jit": partial(AdapterRunner, partial(_drive, jit=True), gradients),
    "optax-jit-numba": partial(AdapterRunner, partial(_drive, jit=True, numba=True), gradients),
    "core-jax": partial(CoreRunner, Library(jnp, jnp.asarray, np.array, gradients)),
}


def versions() -> dict[str, str]:
    return {name: version(name) for name in ("jax", "optax") if find_spec(name)}


def _gpus() -> list[Any]:
    try:
        return jax.devices("gpu")
    except RuntimeError:
        return []


def gpu() -> str | None:
    """Return the GPU's name, or None."""
    return next((device.device_kind for device in _gpus()), None)


@contextlib.contextmanager
def scope(device: str, dtype: str) -> Iterator[None]:
    """Set the device of new arrays, and enable 64 bits for float64."""
    chosen = _gpus() if device == "gpu" else jax.devices("cpu")
    with jax.default_device(chosen[0]), x64(dtype == "float64"):
        yield
