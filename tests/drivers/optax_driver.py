"""The optax adapter as a driver."""

from __future__ import annotations

import functools
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax

import vsgd.optax
from drivers.base import Read, StateArray
from drivers.precision import x64
from drivers.rules import RULES
from vsgd.posterior import NoiseScale, Posterior

#: BY_HANDLER makes the installed handler step all arrays, those with fewer than 8 elements in one call; BY_XLA, none.
BY_HANDLER, BY_XLA = (
    mock.patch.multiple("vsgd.backends.jax_step", SMALLEST=size, FEWEST=count) for size, count in ((8, 1), (2**62, 2**62))
)


@functools.lru_cache(maxsize=None, typed=True)
def make_solver(kind: str, jit: bool, numba: bool = False, **options: Any) -> tuple[Any, Callable[..., Any]]:
    """Return a transformation and its step; cached, so that equal ones are compiled once."""
    make = {"VSGD": vsgd.optax.vsgd, "ConstantVSGD": vsgd.optax.constant_vsgd}[kind]
    solver = make(options.pop("lr", 0.01), **options)

    def step(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        with BY_HANDLER if numba else BY_XLA:
            updates, state = solver.update(grads, state, params)
        moved = [None if update is None else param for param, update in zip(params, updates, strict=True)]
        stepped = optax.apply_updates(moved, updates)
        return [old if new is None else new for old, new in zip(params, stepped, strict=True)], state

    return solver, jax.jit(step) if jit else step


class OptaxDriver:
    def __init__(
        self,
        kind: str,
        params: Sequence[np.ndarray],
        dtype: str | None = None,
        *,
        jit: bool,
        numba: bool = False,
        rates: np.ndarray | None = None,
        **options: Any,
    ) -> None:
        self.names = RULES[kind].state_names
        self.double = any(param.dtype in (np.float64, np.complex128) for param in params)
        with x64(self.double):
            if rates is not None:
                options["lr"] = jnp.asarray(rates, params[0].dtype).__getitem__
            try:
                solver, self.take_step = make_solver(kind, jit, numba, **options)
            except TypeError:  # an option that cannot be hashed, which the adapter rejects
                solver, self.take_step = make_solver.__wrapped__(kind, jit, numba, **options)
            self.params = [jnp.asarray(param, dtype or param.dtype) for param in params]
            self.state = solver.init(self.params)

    def apply(self, grads: Sequence[jax.Array | None]) -> None:
        self.params, self.state = self.take_step(self.params, self.state, grads)

    def step(self, grads: Sequence[np.ndarray | None]) -> None:
        with x64(self.double):
            pairs = zip(grads, self.params, strict=True)
            self.apply([None if grad is None else jnp.asarray(grad, param.dtype) for grad, param in pairs])

    def read(self) -> Read:
        columns = zip(self.params, *(getattr(self.state[0], name) for name in self.names), strict=True)
        return [dict(zip(("param", *self.names), map(_to_numpy, column), strict=True)) for column in columns]

    def write(self, read: Read) -> None:
        self.params = [jnp.asarray(each["param"]) for each in read]
        arrays = {name: [jnp.asarray(each[name]) for each in read] for name in self.names}
        self.state = (self.state[0]._replace(**arrays), *self.state[1:])

    def posterior(self) -> list[Posterior]:
        return [Posterior(*map(np.asarray, each)) for each in vsgd.optax.posterior(self.state)]

    def noise_scale(self, batch_size: float) -> NoiseScale:
        return NoiseScale(*(each.item() for each in vsgd.optax.noise_scale(self.state, batch_size=batch_size).overall))

    def surprise(self, grads: Sequence[np.ndarray]) -> list[float]:
        return [each.item() for each in vsgd.optax.surprise([jnp.asarray(grad) for grad in grads], self.state)]

    def list_state(self) -> list[StateArray]:
        arrays = (array for name in self.names for array in getattr(self.state[0], name))
        return [StateArray(array.dtype.name, array.nbytes) for array in arrays]

    def save(self, path: Path) -> None:
        path.write_bytes(pickle.dumps(jax.tree.map(np.asarray, (self.params, self.state))))

    def load(self, path: Path) -> None:
        with x64(self.double):
            self.params, self.state = jax.tree.map(jnp.asarray, pickle.loads(path.read_bytes()))


def _to_numpy(array: jax.Array) -> np.ndarray:
    return np.array(array.astype(jnp.float32) if array.dtype == jnp.bfloat16 else array)
