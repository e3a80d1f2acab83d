"""The NumPy adapter, and the core on NumPy."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from matrix.core_runner import RULES, CoreRunner, Library
from matrix.experiments import Snapshot, of_steps

import vsgd.numpy


def gradients(params: Sequence[np.ndarray], x: np.ndarray, y: np.ndarray) -> list[np.ndarray]:
    """Of the mean cross-entropy of the network, by hand."""
    kernel1, bias1, kernel2, bias2 = params
    hidden = np.tanh(x @ kernel1 + bias1)
    logits = hidden @ kernel2 + bias2
    odds = np.exp(logits - logits.max(axis=1, keepdims=True))
    of_logits = odds / odds.sum(axis=1, keepdims=True)
    of_logits[np.arange(len(y)), y] -= 1
    of_logits /= len(y)
    of_hidden = of_logits @ kernel2.T * (1 - hidden * hidden)
    return [x.T @ of_hidden, of_hidden.sum(axis=0), hidden.T @ of_logits, of_logits.sum(axis=0)]


class NumpyRunner:
    """The NumPy adapter."""

    def __init__(self, kind: str, params: Sequence[np.ndarray], *, lr: Any, **hyper: float) -> None:
        self.names = RULES[kind].state_names
        self.params = [param.copy() for param in params]
        self.optimizer = getattr(vsgd.numpy, kind)(self.params, **hyper)
        self.lr, self.count = of_steps(lr, self.optimizer.lr), 0

    def step(self, grads: Sequence[np.ndarray]) -> None:
        self.optimizer.lr = self.lr(self.count)
        self.count += 1
        self.optimizer.step(grads)

    def train(self, x: np.ndarray, y: np.ndarray) -> None:
        self.step(gradients(self.params, x, y))

    def read(self) -> Snapshot:
        states = zip(self.params, self.optimizer.state, strict=True)
        return [{"param": param.copy(), **{name: state[name].copy() for name in self.names}} for param, state in states]

    def posterior(self) -> Snapshot:
        return [self.optimizer.posterior(index)._asdict() for index in range(len(self.params))]


RUNNERS = {
    "numpy": NumpyRunner,
    "core-numpy": partial(CoreRunner, Library(np, np.array, np.array, gradients)),
}


def versions() -> dict[str, str]:
    return {"numpy": np.__version__}


def gpu() -> str | None:
    """The name of the GPU, if there is one."""
    return None


def scope(device: str, dtype: str) -> contextlib.AbstractContextManager[Any]:
    """Where and in what precision arrays are made by default."""
    return contextlib.nullcontext()
