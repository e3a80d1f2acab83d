"""The interface of a driver: one adapter on one engine, with its parameters, accessed through NumPy arrays."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from vsgd.posterior import NoiseScale, Posterior

#: For each parameter, its value as "param" and its state arrays by name; bfloat16 is returned as float32.
Read = list[dict[str, np.ndarray]]


class StateArray(NamedTuple):
    """How one state array is stored."""

    dtype: str
    nbytes: int


class Driver(Protocol):
    """An optimizer with its parameters, made by `(kind, params, dtype=None, rates=None, **options)`.

    `kind` is the name of a class, "VSGD" or "ConstantVSGD". `dtype` is the dtype of the parameters, if it differs from that
    of the arrays. `rates` holds the learning rate of each step, if it changes. The options are those of the adapter, by
    torch's names.

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
        """Return the overall noise scale of all parameters."""

    def surprise(self, grads: Sequence[np.ndarray]) -> list[float]:
        """Return the mean surprise of each gradient."""

    def list_state(self) -> list[StateArray]:
        """Return how each state array is stored."""

    def save(self, path: Path) -> None:
        """Save parameters and state."""

    def load(self, path: Path) -> None:
        """Load what a driver of the same adapter saved."""
