"""An adapter as a runner: its driver steps with given gradients or trains the network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from drivers.base import Driver
from matrix.experiments import Snapshot


class AdapterRunner:
    """A runner on a driver, made by `driver` with the adapter's options.

    `gradients(params, x, y)` returns the network's gradients.
    """

    def __init__(
        self,
        driver: Callable[..., Driver],
        gradients: Callable[..., Sequence[Any]],
        kind: str,
        params: Sequence[np.ndarray],
        *,
        lr: np.ndarray | None,
        **options: Any,
    ) -> None:
        self.driver = driver(kind, params, rates=lr, **options)
        self.gradients = gradients

    def step(self, grads: Sequence[np.ndarray]) -> None:
        self.driver.step(grads)

    def train(self, x: np.ndarray, y: np.ndarray) -> None:
        self.driver.apply(self.gradients(self.driver.params, x, y))

    def read(self) -> Snapshot:
        return self.driver.read()

    def posterior(self) -> Snapshot:
        return [each._asdict() for each in self.driver.posterior()]
