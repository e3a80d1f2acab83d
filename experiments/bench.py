"""Runs of a task with an optimizer, one after the other on one compiled model, each as if it were the first."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import keras
import numpy as np
from numpy.typing import NDArray

from experiments.tasks import Split, Task


class Outcome(NamedTuple):
    """What a run found. A run ends at the first loss that is not finite, and what it then lacks is None.

    Attributes:
        curve: the validation metric before the first step, and every `task.every` steps.
        losses: mean losses of the mini-batches between those.
        final: loss, and accuracy if that is the metric, of each split at the end.
    """

    curve: list[float | None]
    losses: list[float | None]
    final: dict[str, dict[str, float]] | None


@functools.lru_cache(maxsize=64)
def make_initial_values(task: Task, seed: int) -> list[NDArray[Any]]:
    """What the variables of the task's model are at first.

    Args:
        task: whose.
        seed: decides the weights.
    """
    keras.utils.set_random_seed(seed)
    return _read_values(task.make_network().variables)


def _read_values(variables: Sequence[Any]) -> list[NDArray[Any]]:
    return [np.array(keras.ops.convert_to_numpy(each)) for each in variables]


def _assign_values(variables: Sequence[Any], values: Sequence[NDArray[Any]]) -> None:
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)


class Bench:
    """A task's model compiled with an optimizer once, for compiling takes as long as many a run.

    Args:
        task: the problem.
        optimizer: a Keras optimizer with a number for a learning rate.
    """

    def __init__(self, task: Task, optimizer: Any) -> None:
        self.task = task
        self.optimizer = optimizer
        self.data = task.load_data()  # before anything is seeded, for making data may seed the global generators
        self.model = task.make_network()
        metrics = ["accuracy"] if task.metric == "accuracy" else None
        self.model.compile(optimizer=optimizer, loss=task.make_loss(), metrics=metrics)
        optimizer.build(self.model.trainable_variables)
        self._fresh = _read_values(optimizer.variables)

    def run(self, seed: int, rates: Sequence[float]) -> Outcome:
        """Train from the seed's weights on the seed's batches, both the same whatever the optimizer.

        Args:
            seed: decides weights and batches.
            rates: the learning rate of each step.
        """
        batches = self.start(seed)
        curve: list[float | None] = [self.evaluate("validation")[self.task.metric]]
        losses: list[float | None] = []
        every = self.task.every
        for start in range(0, len(rates), every):
            part = rates[start : start + every]
            loss = self.train(part, batches)
            if loss is None:
                return self._diverged(curve, losses, len(rates))
            losses.append(loss)
            curve.append(self.evaluate("validation")[self.task.metric])
        final = {name: self.evaluate(name) for name in self.data.splits}
        if not all(math.isfinite(each["loss"]) for each in final.values()):
            return self._diverged(curve[:-1], losses, len(rates))
        return Outcome(curve, losses, final)

    def start(self, seed: int) -> Iterator[Split]:
        """Go to where a run begins.

        Args:
            seed: decides weights and batches.

        Returns:
            The run's batches, endless.
        """
        _assign_values(self.model.variables, make_initial_values(self.task, seed))
        _assign_values(self.optimizer.variables, self._fresh)
        return self.data.batches(np.random.default_rng(seed))

    def train(self, rates: Sequence[float], batches: Iterator[Split]) -> float | None:
        """Take steps, and tell the mean loss of their batches, or None if one was not finite.

        Args:
            rates: the learning rate of each step.
            batches: as many as there are steps are taken of these.
        """
        total = 0.0
        for rate, batch in zip(rates, islice(batches, len(rates)), strict=True):
            self.optimizer.learning_rate = rate
            loss = float(_loss(self.model.train_on_batch(*_split_inputs(batch))))
            if not math.isfinite(loss):
                return None
            total += loss
        return total / len(rates)

    def _diverged(self, curve: list[float | None], losses: list[float | None], steps: int) -> Outcome:
        looks = math.ceil(steps / self.task.every)
        return Outcome(curve + [None] * (looks + 1 - len(curve)), losses + [None] * (looks - len(losses)), None)

    def evaluate(self, split: str) -> dict[str, float]:
        """Loss, and accuracy if that is the metric, of the model as it is.

        Args:
            split: its name.
        """
        found = self.model.test_on_batch(*_split_inputs(self.data.splits[split]), return_dict=True)
        return {name: float(value) for name, value in found.items()}


def _split_inputs(split: Split) -> tuple[Any, Any]:
    return (list(split.x) if isinstance(split.x, tuple) else split.x), split.y


def _loss(found: Any) -> Any:
    return found[0] if isinstance(found, (list, tuple)) else found
