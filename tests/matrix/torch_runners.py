"""The torch adapter's engines, and the core on torch and on lists of its tensors."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from matrix.core_runner import RULES, CoreRunner, Library
from matrix.experiments import Snapshot, of_steps

import vsgd.torch
from vsgd.backends.torch import foreach

_device = torch.device("cpu")


def gradients(params: Sequence[torch.Tensor], x: np.ndarray, y: np.ndarray) -> Sequence[torch.Tensor]:
    """Of the mean cross-entropy of the network, by autograd."""
    leaves = [param.detach().requires_grad_() for param in params]
    kernel1, bias1, kernel2, bias2 = leaves
    pixels, classes = (torch.from_numpy(array).to(params[0].device) for array in (x, y.astype(np.int64)))
    logits = torch.tanh(pixels @ kernel1 + bias1) @ kernel2 + bias2
    return torch.autograd.grad(torch.nn.functional.cross_entropy(logits, classes), leaves)


def from_numpy(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array.copy()).to(_device)


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().cpu().numpy().copy()


class TorchRunner:
    """The torch adapter with these flags."""

    def __init__(
        self,
        kind: str,
        params: Sequence[np.ndarray],
        *,
        lr: Any,
        compiled: bool = False,
        flags: dict[str, bool],
        **hyper: float,
    ) -> None:
        self.names = RULES[kind].state_names
        # Autograd refuses a differentiable step on a leaf that it tracks.
        tracked = not flags.get("differentiable")
        self.params = [torch.nn.Parameter(from_numpy(param), tracked) for param in params]
        self.optimizer = getattr(vsgd.torch, kind)(self.params, **hyper, **flags)
        self.group = self.optimizer.param_groups[0]
        self.lr, self.count = of_steps(lr, self.group["lr"]), 0
        self.take_step = self.optimizer.step
        if compiled:
            # As a tensor, for the compiler takes a number for a constant of the function.
            self.group["lr"] = torch.zeros((), dtype=torch.float64, device=_device)
            torch.compiler.reset()
            self.take_step = torch.compile(self.take_step)

    def step(self, grads: Sequence[np.ndarray]) -> None:
        self._step([from_numpy(grad) for grad in grads])

    def train(self, x: np.ndarray, y: np.ndarray) -> None:
        self._step(gradients(self.params, x, y))

    def _step(self, grads: Sequence[torch.Tensor]) -> None:
        lr = self.lr(self.count)
        self.count += 1
        if isinstance(self.group["lr"], torch.Tensor):
            self.group["lr"].fill_(lr)
        else:
            self.group["lr"] = lr
        for param, grad in zip(self.params, grads, strict=True):
            param.grad = grad
        self.take_step()

    def read(self) -> Snapshot:
        named = ({"param": param, **self.optimizer.state[param]} for param in self.params)
        return [{name: to_numpy(tensors[name]) for name in ("param", *self.names)} for tensors in named]

    def posterior(self) -> Snapshot:
        known = map(self.optimizer.posterior, self.params)
        return [{name: to_numpy(tensor) for name, tensor in each._asdict().items()} for each in known]


_TENSORS = Library(torch, from_numpy, to_numpy, gradients)
_LISTS = _TENSORS._replace(
    xp=foreach.TensorListOps(),
    pack=lambda tensors: [foreach.TensorList(tensors)],
    unpack=lambda lists: lists[0].tensors,
)
RUNNERS = {
    "torch-loop": partial(TorchRunner, flags={"foreach": False, "fused": False}),
    "torch-foreach": partial(TorchRunner, flags={"foreach": True}),
    "torch-fused": partial(TorchRunner, flags={"fused": True}),
    "torch-triton": partial(TorchRunner, flags={"fused": True}),
    "torch-triton-capturable": partial(TorchRunner, flags={"fused": True, "capturable": True}),
    "torch-differentiable": partial(TorchRunner, flags={"differentiable": True}),
    "torch-compiled": partial(TorchRunner, flags={}, compiled=True),
    "torch-compiled-foreach": partial(TorchRunner, flags={"foreach": True, "capturable": True}, compiled=True),
    "core-torch": partial(CoreRunner, _TENSORS),
    "core-torch-lists": partial(CoreRunner, _LISTS),
}


def versions() -> dict[str, str]:
    return {"torch": torch.__version__}


def gpu() -> str | None:
    """The name of the GPU, if there is one."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


@contextlib.contextmanager
def scope(device: str, dtype: str) -> Any:
    """Where tensors are made."""
    global _device
    _device = torch.device("cuda" if device == "gpu" else "cpu")
    yield
