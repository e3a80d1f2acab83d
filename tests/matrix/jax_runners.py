"""The optax transformations, and the core on jax.numpy."""

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
from drivers.precision import x64
from matrix.core_runner import RULES, CoreRunner, Library
from matrix.experiments import LR, Snapshot

# GPUs would round float32 products to TF32.
jax.config.update("jax_default_matmul_precision", "highest")


def _loss(params: Sequence[Any], x: Any, y: Any) -> Any:
    kernel1, bias1, kernel2, bias2 = params
    logits = jnp.tanh(x @ kernel1 + bias1) @ kernel2 + bias2
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), y[:, None], axis=1).mean()


#: Of the mean cross-entropy of the network: `gradients(params, x, y)`.
gradients = jax.jit(jax.grad(_loss))


class OptaxRunner:
    """The optax transformations."""

    def __init__(self, kind: str, params: Sequence[np.ndarray], *, lr: Any, jit: bool, **hyper: float) -> None:
        import optax

        import vsgd.optax

        self.names = RULES[kind].state_names
        make = {"VSGD": vsgd.optax.vsgd, "ConstantVSGD": vsgd.optax.constant_vsgd}[kind]
        rates = None if lr is None else jnp.asarray(lr, params[0].dtype)
        solver = make(LR if rates is None else lambda count: rates[count], **hyper)  # has no default

        def step(params: Any, state: Any, grads: Any) -> Any:
            updates, state = solver.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        self.take_step = jax.jit(step) if jit else step
        self.params = [jnp.asarray(param) for param in params]
        self.state = solver.init(self.params)

    def step(self, grads: Sequence[np.ndarray]) -> None:
        self._step([jnp.asarray(grad) for grad in grads])

    def train(self, x: np.ndarray, y: np.ndarray) -> None:
        self._step(gradients(self.params, x, y))

    def _step(self, grads: list[Any]) -> None:
        self.params, self.state = self.take_step(self.params, self.state, grads)

    def read(self) -> Snapshot:
        rows = zip(self.params, *(getattr(self.state[0], name) for name in self.names), strict=True)
        return [dict(zip(("param", *self.names), map(np.array, row), strict=True)) for row in rows]

    def posterior(self) -> Snapshot:
        import vsgd.optax

        known = vsgd.optax.posterior(self.state)
        return [{name: np.array(array) for name, array in each._asdict().items()} for each in known]


RUNNERS = {
    "optax-eager": partial(OptaxRunner, jit=False),
    "optax-jit": partial(OptaxRunner, jit=True),
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
    """The name of the GPU, if there is one."""
    return next((device.device_kind for device in _gpus()), None)


@contextlib.contextmanager
def scope(device: str, dtype: str) -> Iterator[None]:
    """Where arrays are made, with 64 bits where they are wanted."""
    chosen = _gpus() if device == "gpu" else jax.devices("cpu")
    with jax.default_device(chosen[0]), x64(dtype == "float64"):
        yield
