"""Run the core alone on any array library, with only the code that an adapter needs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from drivers.rules import RULES
from matrix.experiments import LR, Snapshot

from vsgd import core
from vsgd.outliers import choose_rule
from vsgd.posterior import Scales, compute_posterior


def _as_they_are(arrays: list[Any]) -> list[Any]:
    return arrays


class Library(NamedTuple):
    """An array library.

    Attributes:
        xp: the namespace for the update.
        array: converts from NumPy.
        numpy: converts to NumPy.
        gradients: returns the network's gradients, `gradients(params, x, y)`, for a batch of NumPy arrays.
        pack: turns arrays into operands of the update.
        unpack: turns operands of the update into arrays.
    """

    xp: Any
    array: Callable[[np.ndarray], Any]
    numpy: Callable[[Any], np.ndarray]
    gradients: Callable[[list[Any], np.ndarray, np.ndarray], Sequence[Any]]
    pack: Callable[[list[Any]], list[Any]] = _as_they_are
    unpack: Callable[[list[Any]], list[Any]] = _as_they_are


class CoreRunner:
    """VSGD written with the core and a library."""

    def __init__(
        self, library: Library, kind: str, params: list[np.ndarray], *, lr: Any, weight_decay: float = 0.0, **hyper: float
    ) -> None:
        self.library, self.rule = library, choose_rule(RULES[kind], hyper.get("outlier_threshold"))
        self.hyper = self.rule.hyperparameters(**hyper)
        self.rates, self.weight_decay = itertools.repeat(LR) if lr is None else map(float, lr), weight_decay
        self.update = self.rule.make_update(library.xp)
        self.count = 0
        self.params = [library.array(param) for param in params]
        initial = self.rule.initial_state(self.hyper)
        self.states = [[library.array(np.full_like(param, value)) for param in params] for value in initial]

    def step(self, grads: Sequence[np.ndarray]) -> None:
        self._step([self.library.array(grad) for grad in grads])

    def train(self, x: np.ndarray, y: np.ndarray) -> None:
        self._step(list(self.library.gradients(self.params, x, y)))

    def _step(self, grads: list[Any]) -> None:
        lr = next(self.rates)
        self.count += 1
        coefficients = self.rule.coefficients(self.count, self.hyper)
        after = []
        for param, grad, *state in zip(*map(self.library.pack, (self.params, grads, *self.states)), strict=True):
            direction, state = self.update(grad, tuple(state), coefficients)
            after.append((core.descend(param, direction, lr, 1 - lr * self.weight_decay), *state))
        self.params, *self.states = (self.library.unpack(list(column)) for column in zip(*after, strict=True))

    def read(self) -> Snapshot:
        names = ("param", *self.rule.state_names)
        rows = zip(self.params, *self.states, strict=True)
        return [dict(zip(names, map(self.library.numpy, row), strict=True)) for row in rows]

    def posterior(self) -> Snapshot:
        known = (
            compute_posterior(state, Scales(*self.rule.variance_scales(self.hyper))) for state in zip(*self.states, strict=True)
        )
        return [{name: self.library.numpy(array) for name, array in each._asdict().items()} for each in known]
