"""The torch adapter as a driver."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import vsgd.torch
from drivers.base import Read, StateArray
from drivers.rules import RULES
from vsgd.posterior import NoiseScale, Posterior


class TorchDriver:
    def __init__(
        self,
        kind: str,
        params: Sequence[np.ndarray],
        dtype: str | None = None,
        *,
        device: torch.device | str = "cpu",
        compiled: bool = False,
        rates: np.ndarray | None = None,
        **options: Any,
    ) -> None:
        tensors = [torch.from_numpy(np.array(param)).to(device, dtype and getattr(torch, dtype)) for param in params]
        # Autograd rejects a differentiable step on a leaf that it tracks.
        tracked = not options.get("differentiable")
        self.params = [torch.nn.Parameter(each, tracked) for each in tensors]
        self.rates = None if rates is None else iter(rates)
        self.optimizer = getattr(vsgd.torch, kind)(self.params, **options)
        self.names = RULES[kind].state_names
        self.take_step = self.optimizer.step
        if compiled:
            group = self.optimizer.param_groups[0]
            # As a tensor, because the compiler treats a number as a constant of the function.
            group["lr"] = torch.tensor(group["lr"], dtype=torch.float64, device=device)
            torch.compiler.reset()
            self.take_step = torch.compile(self.take_step)

    def apply(self, grads: Sequence[torch.Tensor | None]) -> None:
        if self.rates is not None:
            group, lr = self.optimizer.param_groups[0], float(next(self.rates))
            group["lr"] = group["lr"].fill_(lr) if isinstance(group["lr"], torch.Tensor) else lr
        for param, grad in zip(self.params, grads, strict=True):
            param.grad = grad
        self.take_step()

    def step(self, grads: Sequence[np.ndarray | None]) -> None:
        pairs = zip(grads, self.params, strict=True)
        self.apply([None if grad is None else torch.from_numpy(np.array(grad)).to(param) for grad, param in pairs])

    def read(self) -> Read:
        named = ({"param": param, **self.optimizer.state[param]} for param in self.params)
        return [{name: to_numpy(tensors[name]) for name in ("param", *self.names)} for tensors in named]

    def write(self, read: Read) -> None:
        for param, each in zip(self.params, read, strict=True):
            param.data.copy_(torch.from_numpy(each["param"]))
            state = {name: torch.from_numpy(np.array(each[name])) for name in self.names}
            self.optimizer.state[param] = {"step": torch.tensor(1.0), **state}

    def posterior(self) -> list[Posterior]:
        return [Posterior(*map(to_numpy, self.optimizer.posterior(param))) for param in self.params]

    def noise_scale(self, batch_size: float) -> NoiseScale:
        return NoiseScale(*(each.item() for each in self.optimizer.noise_scale(batch_size=batch_size).overall))

    def surprise(self, grads: Sequence[np.ndarray]) -> list[float]:
        for param, grad in zip(self.params, grads, strict=True):
            param.grad = torch.from_numpy(np.array(grad))
        return [each.item() for each in self.optimizer.surprise().values()]

    def list_state(self) -> list[StateArray]:
        arrays = (self.optimizer.state[param][name] for param in self.params for name in self.names)
        return [StateArray(str(array.dtype).removeprefix("torch."), array.nbytes) for array in arrays]

    def save(self, path: Path) -> None:
        torch.save({"params": [param.data for param in self.params], "optimizer": self.optimizer.state_dict()}, path)

    def load(self, path: Path) -> None:
        saved = torch.load(path, weights_only=True)
        for param, value in zip(self.params, saved["params"], strict=True):
            param.data.copy_(value)
        self.optimizer.load_state_dict(saved["optimizer"])


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.dtype is torch.bfloat16 else tensor).numpy().copy()
