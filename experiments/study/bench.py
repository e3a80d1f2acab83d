"""Train a task with an entrant of the study, by one compiled step for all settings."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import keras
import numpy as np
import optax
from optax import contrib

from experiments.bench import Outcome, assign_initial_values, perform_run, read_values, split_inputs
from experiments.study.entrants import Axes, Entrant, Setting
from experiments.tasks import Split, Task


class _Carry(NamedTuple):
    weights: list[jax.Array]
    state: Any
    statistics: list[jax.Array]  # of batch normalization


class Bench:
    """A task's model with an entrant, compiled in the first run.

    Args:
        task: the task.
        entrant: the optimizer.
    """

    def __init__(self, task: Task, entrant: Entrant) -> None:
        self.task = task
        self.data = task.load_data()  # before seeding, because making data may seed the global generators
        self._entrant = entrant
        self._model = task.make_network()
        self._loss = task.make_loss()
        self._matrices = find_hidden_matrices(self._model)
        # Not a scan over steps: XLA runs convolutions inside a loop on a CPU many times slower.
        self._step = jax.jit(self._take_step, donate_argnums=0)
        self._measure = jax.jit(self._compute_metrics)

    def run(self, setting: Setting, seed: int) -> Outcome:
        """Train from the seed's weights on the seed's batches; both are the same for every entrant.

        Args:
            setting: the hyperparameters.
            seed: of weights and batches.
        """
        batches = self.data.batches(np.random.default_rng(seed))
        assign_initial_values(self._model, self.task, seed)
        weights, statistics = (
            list(map(jnp.asarray, read_values(each)))
            for each in (self._model.trainable_variables, self._model.non_trainable_variables)
        )
        optimizer = self._entrant.make(setting.learning_rate, setting.beta1, setting.weight_decay, self._matrices)
        carry = _Carry(weights, optimizer.init(weights), statistics)
        rates = np.array(setting.list_rates(self.task.steps), np.float32)

        def train(part: slice) -> float:
            nonlocal carry
            losses = []
            for rate, batch in zip(rates[part], batches, strict=False):
                carry, loss = self._step(carry, batch, rate, setting.beta1, setting.weight_decay)
                losses.append(loss)
            return float(jnp.mean(jnp.stack(losses)))

        return perform_run(self.task, len(rates), train, lambda split: self._evaluate(carry, split))

    def _take_step(self, carry: _Carry, batch: Split, rate: Any, beta1: Any, weight_decay: Any) -> tuple[_Carry, Any]:
        x, y = split_inputs(batch)

        def compute_loss(weights: Any) -> tuple[Any, Any]:
            output, statistics = self._model.stateless_call(weights, carry.statistics, x, training=True)
            return jnp.mean(self._loss(y, output)), statistics

        (loss, statistics), gradients = jax.value_and_grad(compute_loss, has_aux=True)(carry.weights)
        # Its numbers are traced, so that one compiled step serves all settings.
        optimizer = self._entrant.make(rate, beta1, weight_decay, self._matrices)
        updates, state = optimizer.update(gradients, carry.state, carry.weights)
        return _Carry(optax.apply_updates(carry.weights, updates), state, statistics), loss

    def _compute_metrics(self, carry: _Carry, split: Split) -> dict[str, Any]:
        averaged = isinstance(carry.state, contrib.ScheduleFreeState)
        weights = contrib.schedule_free_eval_params(carry.state, carry.weights) if averaged else carry.weights
        x, y = split_inputs(split)
        output, _ = self._model.stateless_call(weights, carry.statistics, x, training=False)
        found = {"loss": jnp.mean(self._loss(y, output))}
        if self.task.metric == "accuracy":
            found["accuracy"] = jnp.mean(jnp.argmax(output, axis=-1) == y)
        return found

    def _evaluate(self, carry: _Carry, split: str) -> dict[str, float]:
        return {name: float(value) for name, value in self._measure(carry, self.data.splits[split]).items()}


def find_hidden_matrices(model: keras.Model) -> list[Axes | None]:
    """Find the trainable arrays that Muon steps: all kernels but those of the last layer and of depthwise convolutions.

    Args:
        model: with variables.

    Returns:
        For each array its axes as a matrix; None for an array that AdamW steps.
    """
    found = {each.path: _find_matrix_axes(each.path, len(each.shape)) for each in model.trainable_variables}
    last = next((path for path in reversed(found) if found[path]), "").rpartition("/")[0]
    return [None if path.rpartition("/")[0] == last else axes for path, axes in found.items()]


def _find_matrix_axes(path: str, rank: int) -> Axes | None:
    layer, _, name = path.rpartition("/")
    if rank < 2 or "kernel" not in name or "depthwise" in layer:
        return None
    # The output of attention's first three kernels has two axes, heads and their channels.
    inputs = 1 if layer.endswith(("/query", "/key", "/value")) else rank - 1
    return tuple(range(inputs)), tuple(range(inputs, rank))
