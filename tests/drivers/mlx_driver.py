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
    """Return an MLX array of the same dtype; by default, MLX turns float64 into float32."""
    return mx.array(array, getattr(mx, array.dtype.name))


class MlxDriver:
    def __init__(
        self,
        kind: str,
        params: Sequence[np.ndarray],
        dtype: str | None = None,
        *,
        compiled: bool = False,
        rates: np.ndarray | None = None,
        **options: Any,
    ) -> None:
        mx.set_default_device(mx.cpu)  # GPUs have no float64
        arrays = map(to_mlx, params)
        # Use names, so that a missing gradient is a missing name.
        self.tree = {str(i): each if dtype is None else each.astype(getattr(mx, dtype)) for i, each in enumerate(arrays)}
        lr = options.pop("lr", 0.01)
        if rates is not None:
            lr = to_mlx(rates.astype(params[0].dtype)).__getitem__
        elif any(param.dtype == np.float64 for param in params):  # as an array, because MLX stores a number as float32
            lr = to_mlx(np.array(lr))
        self.optimizer = getattr(vsgd.mlx, kind)(lr, **options)
        self.optimizer.init(self.tree)
        self.names = RULES[kind].state_names
        held = [self.tree, self.optimizer.state]
        self.take_step = mx.compile(self._step, held, held) if compiled else self._step

    @property
    def params(self) -> list[mx.array]:
        return list(self.tree.values())

    def _step(self, grads: dict[str, mx.array]) -> None:
        self.tree.update(self.optimizer.apply_gradients(grads, self.tree))

    def apply(self, grads: Sequence[mx.array | None]) -> None:
        self.take_step({str(i): grad for i, grad in enumerate(grads) if grad is not None})
        mx.eval(self.tree, self.optimizer.state)

    def step(self, grads: Sequence[np.ndarray | None]) -> None:
        self.apply([None if grad is None else to_mlx(grad) for grad in grads])

    def read(self) -> Read:
        named = ({"param": self.tree[i], **self.optimizer.state[i]} for i in self.tree)
        return [{name: _to_numpy(each[name]) for name in ("param", *self.names)} for each in named]

    def write(self, read: Read) -> None:
        for i, each in enumerate(read):
            self.tree[str(i)] = to_mlx(each["param"])
            self.optimizer.state[str(i)] = {name: to_mlx(each[name]) for name in self.names}

    def posterior(self) -> list[Posterior]:
        posteriors = (self.optimizer.posterior(self.optimizer.state[i]) for i in self.tree)
        return [Posterior(*map(np.array, each)) for each in posteriors]

    def list_state(self) -> list[StateArray]:
        arrays = (self.optimizer.state[i][name] for i in self.tree for name in self.names)
        return [StateArray(str(array.dtype).removeprefix("mlx.core."), array.nbytes) for array in arrays]

    def save(self, path: Path) -> None:
        tree = {"params": self.tree, "state": self.optimizer.state}
        mx.savez(str(path), **dict(tree_flatten(tree)))

    def load(self, path: Path) -> None:
        tree = tree_unflatten(list(mx.load(f"{path}.npz").items()))
        # MLX returns a tree with keys "0", "1", ... as a list.
        self.tree = {str(i): each for i, each in enumerate(tree["params"])}
        self.optimizer.state = tree["state"]


def _to_numpy(array: mx.array) -> np.ndarray:
    return np.array(array.astype(mx.float32) if array.dtype == mx.bfloat16 else array)
