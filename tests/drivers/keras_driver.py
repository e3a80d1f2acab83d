"""The Keras adapter as a driver, on the backend of this process."""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
from adapters.keras.keras_problems import allow_float64, jitted_apply, make, read, to_numpy
from keras import ops

from drivers.base import Read, StateArray
from vsgd.posterior import NoiseScale, Posterior


class KerasDriver:
    def __init__(
        self,
        kind: str,
        params: Sequence[np.ndarray],
        dtype: str | None = None,
        *,
        jit: bool = False,
        rates: np.ndarray | None = None,
        **options: Any,
    ) -> None:
        self.rates = None if rates is None else iter(rates)
        self.optimizer = make(kind, **options)
        double = any(param.dtype in (np.float64, np.complex128) for param in params)
        self.scope = allow_float64 if double else contextlib.nullcontext
        with self.scope():
            dtypes = [dtype or param.dtype.name for param in params]
            values = [ops.cast(ops.convert_to_tensor(param), each) for param, each in zip(params, dtypes, strict=True)]
            pairs = enumerate(zip(values, dtypes, strict=True))
            self.params = [keras.Variable(value, dtype=each, name=f"p{i}") for i, (value, each) in pairs]
            self.optimizer.build(self.params)
        self.take_step = jitted_apply(self.optimizer, self.params) if jit else self._step

    def _step(self, grads: Sequence[Any]) -> None:
        self.optimizer.apply(grads, self.params)

    def apply(self, grads: Sequence[Any]) -> None:
        if self.rates is not None:
            self.optimizer.learning_rate = next(self.rates)
        self.take_step(grads)

    def step(self, grads: Sequence[np.ndarray | None]) -> None:
        with self.scope():
            pairs = zip(grads, self.params, strict=True)
            self.apply([None if grad is None else ops.cast(ops.convert_to_tensor(grad), each.dtype) for grad, each in pairs])

    def read(self) -> Read:
        with self.scope():
            return [{name: _widen(array) for name, array in each.items()} for each in read(self.optimizer, self.params)]

    def write(self, read: Read) -> None:
        for variable, states, each in zip(self.params, self.optimizer._states, read, strict=True):
            for target, name in zip((variable, *states), each, strict=True):
                target.assign(each[name])

    def posterior(self) -> list[Posterior]:
        return [Posterior(*map(to_numpy, self.optimizer.posterior(variable))) for variable in self.params]

    def noise_scale(self, batch_size: float) -> NoiseScale:
        return NoiseScale(*(float(to_numpy(each)) for each in self.optimizer.noise_scale(batch_size=batch_size).overall))

    def surprise(self, grads: Sequence[np.ndarray]) -> list[float]:
        return [float(to_numpy(each)) for each in self.optimizer.surprise([ops.convert_to_tensor(grad) for grad in grads])]

    def list_state(self) -> list[StateArray]:
        arrays = [each for states in self.optimizer._states for each in states]
        names = [keras.backend.standardize_dtype(each.value.dtype) for each in arrays]
        sizes = {"bfloat16": 2, "float32": 4, "float64": 8, "complex64": 8}
        return [StateArray(name, sizes[name] * int(np.prod(each.shape))) for name, each in zip(names, arrays, strict=True)]

    def save(self, path: Path) -> None:
        store: dict[str, Any] = {}
        with self.scope():
            self.optimizer.save_own_variables(store)
            params = [ops.convert_to_numpy(each) for each in self.params]
            path.write_bytes(pickle.dumps((params, {name: ops.convert_to_numpy(each) for name, each in store.items()})))

    def load(self, path: Path) -> None:
        params, store = pickle.loads(path.read_bytes())
        with self.scope():
            for variable, value in zip(self.params, params, strict=True):
                variable.assign(value)
            self.optimizer.load_own_variables(store)


def _widen(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float32) if array.dtype.name == "bfloat16" else array
