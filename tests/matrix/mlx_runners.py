"""The MLX adapter, and the core on `mlx.core`."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from functools import partial
from importlib.metadata import version
from typing import Any

import mlx.core as mx
import numpy as np
from drivers.mlx_driver import to_mlx
from matrix.core_runner import RULES, CoreRunner, Library
from matrix.experiments import LR, Snapshot

import vsgd.mlx


def _loss(params: Sequence[mx.array], x: mx.array, y: mx.array) -> mx.array:
    kernel1, bias1, kernel2, bias2 = params
    logits = mx.tanh(x @ kernel1 + bias1) @ kernel2 + bias2
    # In float64 `mx.exp` has no more digits than in float32. No logit is so large that it must be taken off.
    odds = mx.exp(logits) if logits.dtype == mx.float32 else math.e**logits
    return (mx.log(odds.sum(axis=1)) - mx.take_along_axis(logits, y[:, None], axis=1)[:, 0]).mean()


def gradients(params: Sequence[mx.array], x: np.ndarray, y: np.ndarray) -> Sequence[mx.array]:
    """Of the mean cross-entropy of the network."""
    return mx.grad(_loss)(params, to_mlx(x), to_mlx(y))


class MlxRunner:
    """The MLX adapter, with step sizes as a schedule."""

    def __init__(self, kind: str, params: Sequence[np.ndarray], *, lr: Any, compiled: bool, **hyper: float) -> None:
        self.names = RULES[kind].state_names
        rates = to_mlx(np.asarray(LR if lr is None else lr, params[0].dtype))
        self.optimizer = getattr(vsgd.mlx, kind)(rates if lr is None else lambda step: rates[step], **hyper)
        self.tree = {"params": [to_mlx(param) for param in params]}
        self.optimizer.init(self.tree)
        held = [self.tree, self.optimizer.state]
        self.take_step = mx.compile(self._step, held, held) if compiled else self._step

    def step(self, grads: Sequence[np.ndarray]) -> None:
        self.take_step([to_mlx(grad) for grad in grads])

    def train(self, x: np.ndarray, y: np.ndarray) -> None:
        self.take_step(gradients(self.tree["params"], x, y))

    def _step(self, grads: Sequence[mx.array]) -> None:
        self.tree.update(self.optimizer.apply_gradients({"params": grads}, self.tree))

    def _states(self) -> list[dict[str, mx.array]]:
        return self.optimizer.state["params"]

    def read(self) -> Snapshot:
        named = ({"param": param, **state} for param, state in zip(self.tree["params"], self._states(), strict=True))
        return [{name: np.array(array) for name, array in each.items()} for each in named]

    def posterior(self) -> Snapshot:
        known = map(self.optimizer.posterior, self._states())
        return [{name: np.array(array) for name, array in each._asdict().items()} for each in known]


RUNNERS = {
    "mlx": partial(MlxRunner, compiled=False),
    "mlx-compiled": partial(MlxRunner, compiled=True),
    "core-mlx": partial(CoreRunner, Library(mx, to_mlx, np.array, gradients)),
}


def versions() -> dict[str, str]:
    return {"mlx": version("mlx")}


def gpu() -> None:
    """None is used: MLX has float64 on the CPU alone."""


def scope(device: str, dtype: str) -> contextlib.AbstractContextManager[Any]:
    """Where arrays are made."""
    return mx.stream(mx.cpu)
