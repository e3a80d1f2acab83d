"""The MLX adapter as a driver."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

import vsgd.mlx
from drivers.base import Read, StateArray
from drivers.rules import RULES
from vsgd.posterior import Posterior


def to_mlx(array: np.ndarray) -> mx.array:
    """Return an array of MLX, which makes float32 of float64 unless told."""
    return mx.array(array, getattr(mx, array.dtype.name))


class MlxDriver:
    def __init__(self, kind: str, params: Sequence[np.ndarray], dtype: str | None = None, **options: Any) -> None:
        mx.set_default_device(mx.cpu)  # GPUs have no float64
        arrays = map(to_mlx, params)
        self.params = {str(i): each if dtype is None else each.astype(getattr(mx, dtype)) for i, each in enumerate(arrays)}
        lr = options.pop("lr", 0.01)
        if any(param.dtype == np.float64 for param in params):  # as an array: MLX stores a number as float32
            lr = to_mlx(np.array(lr))
        self.optimizer = getattr(vsgd.mlx, kind)(lr, **options)
        self.optimizer.init(self.params)
        self.names = RULES[kind].state_names

    def step(self, grads: Sequence[np.ndarray | None]) -> None:
        given = {str(i): to_mlx(grad) for i, grad in enumerate(grads) if grad is not None}
        self.params.update(self.optimizer.apply_gradients(given, self.params))
        mx.eval(self.params, self.optimizer.state)

    def read(self) -> Read:
        named = ({"param": self.params[i], **self.optimizer.state[i]} for i in self.params)
        return [{name: np.array(each[name]) for name in ("param", *self.names)} for each in named]

    def write(self, read: Read) -> None:
        for i, each in enumerate(read):
            self.params[str(i)] = to_mlx(each["param"])
            self.optimizer.state[str(i)] = {name: to_mlx(each[name]) for name in self.names}

    def posterior(self) -> list[Posterior]:
        posteriors = (self.optimizer.posterior(self.optimizer.state[i]) for i in self.params)
        return [Posterior(*map(np.array, each)) for each in posteriors]

    def list_state(self) -> list[StateArray]:
        arrays = (self.optimizer.state[i][name] for i in self.params for name in self.names)
        return [StateArray(str(array.dtype).removeprefix("mlx.core."), array.nbytes) for array in arrays]

    def save(self, path: Path) -> None:
        tree = {"params": self.params, "state": self.optimizer.state}
        mx.savez(str(path), **dict(tree_flatten(tree)))

    def load(self, path: Path) -> None:
        tree = tree_unflatten(list(mx.load(f"{path}.npz").items()))
        # A tree with keys "0", "1", ... comes back as a list.
        self.params = {str(i): each for i, each in enumerate(tree["params"])}
        self.optimizer.state = tree["state"]
