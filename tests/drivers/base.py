"""What a driver is: one adapter on one engine, with its parameters, behind NumPy arrays."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from vsgd.posterior import NoiseScale, Posterior

#: For each parameter its value as "param", and its state arrays by name; bfloat16 as float32.
Read = list[dict[str, np.ndarray]]


class StateArray(NamedTuple):
    """One state array as it is stored."""

    dtype: str
    nbytes: int


class Driver(Protocol):
    """An optimizer with its parameters, made by `(kind, params, dtype=None, rates=None, **options)`.

    `kind` is the name of a class, "VSGD" or "ConstantVSGD", `dtype` the dtype of the parameters if not the arrays' own,
    `rates` the learning rate of each step, if it changes, and the options are those of the adapter, by torch's names.

    Attributes:
        params: the parameters, as the framework's arrays.
    """

    params: Any

    def apply(self, grads: Sequence[Any]) -> None:
        """Take one step, with gradients that are the framework's arrays."""

    def step(self, grads: Sequence[np.ndarray | None]) -> None:
        """Take one step, with gradients in the dtype of their parameters."""

    def read(self) -> Read:
        """Return parameters and state."""

    def write(self, read: Read) -> None:
        """Set parameters and state, in float32 or complex64, after at least one step."""

    def posterior(self) -> list[Posterior]:
        """Return the posterior of each parameter's gradient."""

    def noise_scale(self, batch_size: float) -> NoiseScale:
        """Return the noise scale of all parameters together."""

    def surprise(self, grads: Sequence[np.ndarray]) -> list[float]:
        """Return the mean surprise of each gradient."""

    def list_state(self) -> list[StateArray]:
        """Return how each state array is stored."""

    def save(self, path: Path) -> None:
        """Save parameters and state."""

    def load(self, path: Path) -> None:
        """Load what a driver of the same adapter saved."""
