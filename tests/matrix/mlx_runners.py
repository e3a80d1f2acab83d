"""Runners of the MLX adapter, and of the core on `mlx.core`."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from functools import partial
from importlib.metadata import version
from typing import Any

import mlx.core as mx
import numpy as np
from drivers.mlx_driver import MlxDriver, to_mlx
from matrix.adapter_runner import AdapterRunner
from matrix.core_runner import CoreRunner, Library


def _loss(params: Sequence[mx.array], x: mx.array, y: mx.array) -> mx.array:
    kernel1, bias1, kernel2, bias2 = params
    logits = mx.tanh(x @ kernel1 + bias1) @ kernel2 + bias2
    # In float64 `mx.exp` has only float32's digits. No logit is so large that the maximum must be subtracted.
    odds = mx.exp(logits) if logits.dtype == mx.float32 else math.e**logits
    return (mx.log(odds.sum(axis=1)) - mx.take_along_axis(logits, y[:, None], axis=1)[:, 0]).mean()


def gradients(params: Sequence[mx.array], x: np.ndarray, y: np.ndarray) -> Sequence[mx.array]:
    """Return the gradients of the network's mean cross-entropy."""
    return mx.grad(_loss)(params, to_mlx(x), to_mlx(y))


RUNNERS = {
    "mlx": partial(AdapterRunner, MlxDriver, gradients),
    "mlx-compiled": partial(AdapterRunner, partial(MlxDriver, compiled=True), gradients),
    "core-mlx": partial(CoreRunner, Library(mx, to_mlx, np.array, gradients)),
}


def versions() -> dict[str, str]:
    return {"mlx": version("mlx")}


def gpu() -> None:
    """Return None: MLX has float64 only on the CPU."""


def scope(device: str, dtype: str) -> contextlib.AbstractContextManager[Any]:
    """Set the device of new arrays."""
    return mx.stream(mx.cpu)
