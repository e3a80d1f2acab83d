"""Runners of the torch adapter's engines, and of the core on torch and on lists of its tensors."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from drivers.torch_driver import TorchDriver, to_numpy
from matrix.adapter_runner import AdapterRunner
from matrix.core_runner import CoreRunner, Library

from vsgd.backends.torch import foreach

_device = torch.device("cpu")


def gradients(params: Sequence[torch.Tensor], x: np.ndarray, y: np.ndarray) -> Sequence[torch.Tensor]:
    """Return the gradients of the network's mean cross-entropy, by autograd."""
    leaves = [param.detach().requires_grad_() for param in params]
    kernel1, bias1, kernel2, bias2 = leaves
    pixels, classes = (torch.from_numpy(array).to(params[0].device) for array in (x, y.astype(np.int64)))
    logits = torch.tanh(pixels @ kernel1 + bias1) @ kernel2 + bias2
    return torch.autograd.grad(torch.nn.functional.cross_entropy(logits, classes), leaves)


def from_numpy(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array.copy()).to(_device)


def drive(*arguments: Any, **options: Any) -> TorchDriver:
    """Make a driver on the device that `scope` sets."""
    return TorchDriver(*arguments, device=_device, **options)


_TENSORS = Library(torch, from_numpy, to_numpy, gradients)
_LISTS = _TENSORS._replace(
    xp=foreach.TensorListOps(),
    pack=lambda tensors: [foreach.TensorList(tensors)],
    unpack=lambda lists: lists[0].tensors,
)
_runner = partial(AdapterRunner, drive, gradients)
RUNNERS = {
    "torch-loop": partial(_runner, foreach=False, fused=False),
    "torch-foreach": partial(_runner, foreach=True),
    "torch-fused": partial(_runner, fused=True),
    "torch-triton": partial(_runner, fused=True),
    "torch-triton-capturable": partial(_runner, fused=True, capturable=True),
    "torch-differentiable": partial(_runner, differentiable=True),
    "torch-compiled": partial(_runner, compiled=True),
    "torch-compiled-foreach": partial(_runner, foreach=True, capturable=True, compiled=True),
    "core-torch": partial(CoreRunner, _TENSORS),
    "core-torch-lists": partial(CoreRunner, _LISTS),
}


def versions() -> dict[str, str]:
    return {"torch": torch.__version__}


def gpu() -> str | None:
    """Return the GPU's name, or None."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


@contextlib.contextmanager
def scope(device: str, dtype: str) -> Any:
    """Set the device of new tensors."""
    global _device
    _device = torch.device("cuda" if device == "gpu" else "cpu")
    yield
