"""The NumPy adapter as a driver."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import vsgd.numpy
from drivers.base import Read, StateArray
from drivers.rules import RULES
from vsgd.posterior import NoiseScale, Posterior


class NumpyDriver:
    def __init__(
        self,
        kind: str,
        params: Sequence[np.ndarray],
        dtype: str | None = None,
        *,
        rates: np.ndarray | None = None,
        **options: Any,
    ) -> None:
        self.params = [np.array(param, dtype) for param in params]
        self.rates = None if rates is None else iter(rates)
        self.optimizer = getattr(vsgd.numpy, kind)(self.params, **options)
        self.names = RULES[kind].state_names

    def step(self, grads: Sequence[np.ndarray | None]) -> None:
        if self.rates is not None:
            self.optimizer.lr = next(self.rates)
        self.optimizer.step(grads)

    apply = step

    def read(self) -> Read:
        pairs = zip(self.params, self.optimizer.state, strict=True)
        return [{"param": param.copy(), **{name: state[name].copy() for name in self.names}} for param, state in pairs]

    def posterior(self) -> list[Posterior]:
        return [self.optimizer.posterior(index) for index in range(len(self.params))]

    def noise_scale(self, batch_size: float) -> NoiseScale:
        return self.optimizer.noise_scale(batch_size=batch_size).overall

    def surprise(self, grads: Sequence[np.ndarray]) -> list[float]:
        return self.optimizer.surprise(grads)

    def list_state(self) -> list[StateArray]:
        arrays = (state[name] for state in self.optimizer.state for name in self.names)
        return [StateArray(array.dtype.name, array.nbytes) for array in arrays]

    def save(self, path: Path) -> None:
        path.write_bytes(pickle.dumps((self.params, self.optimizer.state, self.optimizer.gradient_unit)))

    def load(self, path: Path) -> None:
        params, self.optimizer.state, self.optimizer.gradient_unit = pickle.loads(path.read_bytes())
        for param, value in zip(self.params, params, strict=True):
            param[...] = value
