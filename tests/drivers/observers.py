"""Every implementation of the gradient observer behind one interface."""

from __future__ import annotations

import contextlib
import importlib
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from drivers import HAS_KERAS, HAS_OPTAX, HAS_TORCH
from drivers.precision import x64
from vsgd.posterior import Posterior

#: The implementations, and whether each can run here.
OBSERVERS = {"TorchDoor": HAS_TORCH, "OptaxDoor": HAS_OPTAX, "KerasDoor": HAS_KERAS}


def open_door(name: str, params: Sequence[np.ndarray], **options: Any) -> Any:
    """Return the observer of these parameters, whose optimizer is gradient descent with a rate of 0.5, or skip the test."""
    if not OBSERVERS[name]:
        pytest.skip(f"not installed: what {name} needs")
    return globals()[name](params, **options)


class TorchDoor:
    def __init__(self, params: Sequence[np.ndarray], **options: Any) -> None:
        import torch

        from vsgd.torch import GradientObserver

        self.torch = torch
        self.params = [torch.nn.Parameter(torch.from_numpy(param.copy())) for param in params]
        self.observer = GradientObserver([(f"p{i}", param) for i, param in enumerate(self.params)], **options)
        self.optimizer = torch.optim.SGD(self.params, lr=0.5)
        self.observer.attach(self.optimizer)

    def step(self, grads: Sequence[np.ndarray | None]) -> None:
        for param, grad in zip(self.params, grads, strict=True):
            param.grad = None if grad is None else self.torch.from_numpy(np.asarray(grad))
        self.optimizer.step()

    def read(self) -> list[np.ndarray]:
        return [param.detach().numpy() for param in self.params]

    def posterior(self) -> list[Posterior]:
        return [Posterior(*(field.numpy() for field in self.observer.posterior(param))) for param in self.params]

    def elements(self) -> list[np.ndarray | None]:
        chosen = map(self.observer.elements, self.params)
        return [None if each is None else each.numpy() for each in chosen]

    def surprise(self, grads: Sequence[np.ndarray]) -> list[float]:
        """Observe gradients, and return their surprise."""
        self.step(grads)
        return [surprise.item() for surprise in self.observer.surprise().values()]

    def save(self, path: Path) -> None:
        self.torch.save((self.params, self.observer.state_dict()), path)

    def load(self, path: Path) -> None:
        params, state = self.torch.load(path, weights_only=True)
        for param, value in zip(self.params, params, strict=True):
            param.data.copy_(value)
        self.observer.load_state_dict(state)


class OptaxDoor:
    def __init__(self, params: Sequence[np.ndarray], **options: Any) -> None:
        import jax
        import optax

        import vsgd.optax as ours

        wide = any(param.dtype in (np.float64, np.complex128) for param in params)
        self.scope = x64 if wide else contextlib.nullcontext
        self.ours = ours
        solver = optax.chain(ours.observe_gradients(**options), optax.sgd(0.5))

        @jax.jit
        def step(grads: Any, state: Any, params: Any) -> Any:
            updates, state = solver.update(grads, state, params)
            return [p if u is None else p + u for p, u in zip(params, updates, strict=True)], state

        self.take_step = step
        with self.scope():
            self.params = [jax.numpy.asarray(param) for param in params]
            self.state = solver.init(self.params)

    def step(self, grads: Sequence[np.ndarray | None]) -> None:
        with self.scope():
            self.params, self.state = self.take_step(list(grads), self.state, self.params)

    def read(self) -> list[np.ndarray]:
        return list(map(np.asarray, self.params))

    def posterior(self) -> list[Posterior]:
        with self.scope():
            return [Posterior(*map(np.asarray, each)) for each in self.ours.posterior(self.state)]

    def elements(self) -> list[np.ndarray | None]:
        return [None if each is None else np.asarray(each) for each in self.state[0].elements]

    def surprise(self, grads: Sequence[np.ndarray]) -> list[float]:
        return [float(each) for each in self.ours.surprise(list(grads), self.state)]

    def save(self, path: Path) -> None:
        path.write_bytes(pickle.dumps((self.params, self.state)))

    def load(self, path: Path) -> None:
        self.params, self.state = pickle.loads(path.read_bytes())


class KerasDoor:
    def __init__(self, params: Sequence[np.ndarray], **options: Any) -> None:
        import keras

        problems = importlib.import_module("adapters.keras.keras_problems")
        ours = importlib.import_module("vsgd.keras")
        wide = any(param.dtype in (np.float64, np.complex128) for param in params)
        self.scope = problems.allow_float64 if wide else contextlib.nullcontext
        self.keras = keras
        self.to_numpy = problems.to_numpy
        with self.scope():
            self.params = [keras.Variable(param, dtype=param.dtype.name, name=f"p{i}") for i, param in enumerate(params)]
            self.optimizer = ours.GradientObserver(keras.optimizers.SGD(0.5), **options)
            self.optimizer.build(self.params)
        self.take_step = self.optimizer.apply
        if keras.backend.backend() != "torch":
            self.take_step = problems.jitted_apply(self.optimizer, self.params)

    def _convert(self, grads: Sequence[np.ndarray | None]) -> list[Any]:
        return [None if grad is None else self.keras.ops.convert_to_tensor(grad) for grad in grads]

    def step(self, grads: Sequence[np.ndarray | None]) -> None:
        with self.scope():
            self.take_step(self._convert(grads))

    def read(self) -> list[np.ndarray]:
        return [self.to_numpy(param) for param in self.params]

    def posterior(self) -> list[Posterior]:
        with self.scope():
            return [Posterior(*map(self.to_numpy, self.optimizer.posterior(param))) for param in self.params]

    def elements(self) -> list[np.ndarray | None]:
        chosen = map(self.optimizer.elements, self.params)
        return [None if each is None else self.to_numpy(each) for each in chosen]

    def surprise(self, grads: Sequence[np.ndarray]) -> list[float]:
        with self.scope():
            return [float(each) for each in self.optimizer.surprise(self._convert(grads))]

    def save(self, path: Path) -> None:
        arrays = {f"p{i}": self.to_numpy(param) for i, param in enumerate(self.params)}
        store: dict[str, Any] = {}
        self.optimizer.save_own_variables(store)
        with path.open("wb") as file:
            np.savez(file, **arrays, **{f"s{name}": self.to_numpy(value) for name, value in store.items()})

    def load(self, path: Path) -> None:
        with np.load(path) as arrays:
            for i, param in enumerate(self.params):
                param.assign(arrays[f"p{i}"])
            self.optimizer.load_own_variables({name[1:]: arrays[name] for name in arrays if name.startswith("s")})
