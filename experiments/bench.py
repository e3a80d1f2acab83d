"""Run a task with an optimizer several times on one compiled model, each run as if it were the first."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import keras
import numpy as np
from numpy.typing import NDArray

from experiments.tasks import Split, Task


class Outcome(NamedTuple):
    """The results of a run. A run ends at the first loss that is not finite; what is then missing is None.

    Attributes:
        curve: the validation metric before the first step and every `task.every` steps.
        losses: mean losses of the mini-batches in between.
        final: loss, and accuracy if it is the metric, of each split at the end.
    """

    curve: list[float | None]
    losses: list[float | None]
    final: dict[str, dict[str, float]] | None


@functools.lru_cache(maxsize=64)
def make_initial_values(task: Task, seed: int) -> list[NDArray[Any]]:
    """Return the initial values of the variables of a task's model.

    Args:
        task: the task.
        seed: of the weights.

    Returns:
        The values, which must not be changed.
    """
    keras.utils.set_random_seed(seed)
    return read_values(task.make_network().variables)


def read_values(variables: Sequence[Any]) -> list[NDArray[Any]]:
    """Return copies of the values of Keras variables.

    Args:
        variables: the variables.
    """
    return [np.array(keras.ops.convert_to_numpy(each)) for each in variables]


def assign_initial_values(model: keras.Model, task: Task, seed: int) -> None:
    """Give a task's model the weights of a seed.

    Args:
        model: made by the task.
        task: the task.
        seed: of the weights.
    """
    _assign_values(model.variables, make_initial_values(task, seed))


def _assign_values(variables: Sequence[Any], values: Sequence[NDArray[Any]]) -> None:
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)


def perform_run(
    task: Task, steps: int, train: Callable[[slice], float | None], evaluate: Callable[[str], dict[str, float]]
) -> Outcome:
    """Train and look at the validation metric in turn, until the end or the first loss that is not finite.

    Args:
        task: the task.
        steps: of the run.
        train: takes a slice of the run's steps, and returns their mean loss; None, or not finite, if a loss is not finite.
        evaluate: returns the loss, and the accuracy if it is the metric, of the current model on a split.
    """
    looks = range(0, steps, task.every)
    curve: list[float | None] = [evaluate("validation")[task.metric]]
    losses: list[float | None] = []
    for start in looks:
        loss = train(slice(start, start + task.every))
        if loss is None or not math.isfinite(loss):
            break
        losses.append(loss)
        curve.append(evaluate("validation")[task.metric])
    if len(losses) == len(looks):
        final = {name: evaluate(name) for name in task.load_data().splits}
        if all(math.isfinite(each["loss"]) for each in final.values()):
            return Outcome(curve, losses, final)
        curve.pop()
    return Outcome(curve + [None] * (len(looks) + 1 - len(curve)), losses + [None] * (len(looks) - len(losses)), None)


class Bench:
    """A task's model, compiled with an optimizer once, because compiling takes as long as many runs.

    Args:
        task: the task.
        optimizer: a Keras optimizer with a number for a learning rate.
    """

    def __init__(self, task: Task, optimizer: Any) -> None:
        self.task = task
        self.optimizer = optimizer
        self.data = task.load_data()  # before seeding, because making data may seed the global generators
        self.model = task.make_network()
        metrics = ["accuracy"] if task.metric == "accuracy" else None
        self.model.compile(optimizer=optimizer, loss=task.make_loss(), metrics=metrics)
        optimizer.build(self.model.trainable_variables)
        self._fresh = read_values(optimizer.variables)

    def run(self, seed: int, rates: Sequence[float]) -> Outcome:
        """Train from the seed's weights on the seed's batches; both are the same for every optimizer.

        Args:
            seed: of weights and batches.
            rates: the learning rate of each step.
        """
        batches = self.start(seed)
        return perform_run(self.task, len(rates), lambda part: self.train(rates[part], batches), self.evaluate)

    def start(self, seed: int) -> Iterator[Split]:
        """Reset model and optimizer to the beginning of a run.

        Args:
            seed: of weights and batches.

        Returns:
            The run's batches, endless.
        """
        assign_initial_values(self.model, self.task, seed)
        _assign_values(self.optimizer.variables, self._fresh)
        return self.data.batches(np.random.default_rng(seed))

    def train(self, rates: Sequence[float], batches: Iterator[Split]) -> float | None:
        """Take steps, and return the mean loss of their batches.

        Args:
            rates: the learning rate of each step.
            batches: the mini-batches; each step takes one.

        Returns:
            The mean loss; None if a loss was not finite.
        """
        total = 0.0
        for rate, batch in zip(rates, islice(batches, len(rates)), strict=True):
            self.optimizer.learning_rate = rate
            found = self.model.train_on_batch(*split_inputs(batch))
            loss = float(found[0] if isinstance(found, (list, tuple)) else found)  # a list where there are metrics
            if not math.isfinite(loss):
                return None
            total += loss
        return total / len(rates)

    def evaluate(self, split: str) -> dict[str, float]:
        """Compute the loss, and the accuracy if it is the metric, of the current model on a split.

        Args:
            split: the split's name.

        Returns:
            The values by name.
        """
        found = self.model.test_on_batch(*split_inputs(self.data.splits[split]), return_dict=True)
        return {name: float(value) for name, value in found.items()}


def split_inputs(split: Split) -> tuple[Any, Any]:
    """Return what a Keras model takes: its input, or a list of them, and the targets.

    Args:
        split: the examples.
    """
    return (list(split.x) if isinstance(split.x, tuple) else split.x), split.y
