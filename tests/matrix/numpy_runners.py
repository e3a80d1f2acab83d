"""Runners of the NumPy adapter, and of the core on NumPy."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from drivers.numpy_driver import NumpyDriver
from matrix.adapter_runner import AdapterRunner
from matrix.core_runner import CoreRunner, Library


def gradients(params: Sequence[np.ndarray], x: np.ndarray, y: np.ndarray) -> list[np.ndarray]:
    """Return the gradients of the network's mean cross-entropy, by hand."""
    kernel1, bias1, kernel2, bias2 = params
    hidden = np.tanh(x @ kernel1 + bias1)
    logits = hidden @ kernel2 + bias2
    odds = np.exp(logits - logits.max(axis=1, keepdims=True))
    of_logits = odds / odds.sum(axis=1, keepdims=True)
    of_logits[np.arange(len(y)), y] -= 1
    of_logits /= len(y)
    of_hidden = of_logits @ kernel2.T * (1 - hidden * hidden)
    return [x.T @ of_hidden, of_hidden.sum(axis=0), hidden.T @ of_logits, of_logits.sum(axis=0)]


RUNNERS = {
    "numpy": partial(AdapterRunner, NumpyDriver, gradients),
    "core-numpy": partial(CoreRunner, Library(np, np.array, np.array, gradients)),
}


def versions() -> dict[str, str]:
    return {"numpy": np.__version__}


def gpu() -> str | None:
    """Return None: NumPy uses no GPU."""
    return None


def scope(device: str, dtype: str) -> contextlib.AbstractContextManager[Any]:
    """Set the device and precision of new arrays, which NumPy does not need."""
    return contextlib.nullcontext()
