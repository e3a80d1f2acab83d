"""What VSGD sees of each weight tensor as it trains: sizes of gradients, sigma, gains, and of the steps that it takes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

from experiments import comparison, sweep, tasks
from experiments.bench import Bench
from experiments.comparison import Setting, Trial
from reporting.pages import format_table, replace_section

TASKS = (*sweep.TASKS, "digits-vae")
#: What of the steps is told, beside the last one.
STEPS = (1, 10, 100)
#: Tensors of less elements, such as biases, have no row.
SMALLEST = 100
#: A gain below takes more than twenty gradients to follow.
STUCK = 0.05


class Step(NamedTuple):
    """A step of a tensor.

    Attributes:
        gradient: root of the mean square of the mini-batch gradient.
        sigma: the median standard deviation of the posterior by which the step was divided.
        gain: the median gain of the step.
        stuck: the part of the elements whose gain is below `STUCK`.
        step: root of the mean square of the step, over the learning rate.
    """

    gradient: float
    sigma: float
    gain: float
    stuck: float
    step: float


def _compute_root_mean_square(values: Any) -> float:
    return float(np.sqrt(np.mean(np.square(values, dtype=np.float64))))


def _read_posterior(bench: Bench, variable: Any) -> Any:
    return [ops.convert_to_numpy(each).astype(np.float64) for each in bench.optimizer.posterior(variable)]


def _measure_step(before: Sequence[Any], after: Sequence[Any], eps: float) -> Step:
    mean, variance, _, _, gain, _ = before
    # The update is mu' = mu + gain (ghat - mu): so it tells the gradient.
    gradient = mean + (after[0] - mean) / gain
    step = after[0] / (np.sqrt(after[0] ** 2 + variance) + eps)
    return Step(
        _compute_root_mean_square(gradient),
        float(np.median(np.sqrt(variance))),
        float(np.median(gain)),
        float(np.mean(gain < STUCK)),
        _compute_root_mean_square(step),
    )


class Tensor(NamedTuple):
    """What was seen of a tensor.

    Attributes:
        name: its path in the model.
        size: how many elements it has.
        steps: those that were looked at.
    """

    name: str
    size: int
    steps: list[Step]


def watch_tensors(setting: Setting, steps: Sequence[int]) -> list[Tensor]:
    """What was seen of each tensor, step by step, in a run.

    Args:
        setting: which run, of VSGD.
        steps: which steps, in rising order, counted from 1.
    """
    keras.utils.clear_session()  # that names of layers do not count on from models made before
    bench = Bench(tasks.find_task(setting.task), comparison.find_entrant(setting.entrant).make())
    variables = bench.model.trainable_variables
    found = [Tensor(each.path, int(np.prod(each.shape)), []) for each in variables]
    batches, taken = bench.start(setting.seed), 0
    for step in steps:
        if taken < step - 1:
            bench.train(setting.rates[taken : step - 1], batches)
        before = [_read_posterior(bench, each) for each in variables]
        bench.train(setting.rates[step - 1 : step], batches)
        for tensor, variable, known in zip(found, variables, before, strict=True):
            tensor.steps.append(_measure_step(known, _read_posterior(bench, variable), bench.optimizer.epsilon))
        taken = step
    return found


def _format_rows(found: Sequence[Tensor]) -> Iterator[list[str]]:
    for name, size, steps in found:
        if size >= SMALLEST:
            columns = zip(*steps, strict=True)
            yield [f"`{name}`", str(size), *(" ".join(f"{value:.1e}" for value in column) for column in columns)]


def _compute_mean_square(found: Sequence[Tensor]) -> float:
    """Of all elements of the first gradient that was seen."""
    return sum(size * steps[0].gradient ** 2 for _, size, steps in found) / sum(size for _, size, _ in found)


def write_page(page: Path, backend: str) -> None:
    """Train on the tasks of the sweep, and write what was seen into the page.

    Args:
        page: the Markdown page.
        backend: of Keras, which is imported with it.
    """
    parts = []
    for name in TASKS:
        task = tasks.find_task(name)
        steps = [*STEPS, task.steps]
        setting = Setting(
            name,
            sweep.DEFAULT,
            Trial(comparison.find_entrant(sweep.DEFAULT).base.learning_rate, "cosine"),
            sweep.SEEDS[0],
            backend,
        )
        found = watch_tensors(setting, steps)
        heads = [
            "tensor",
            "elements",
            "gradient, root mean square",
            "sigma, median",
            "gain, median",
            f"part with a gain below {STUCK}",
            "step / lr, root mean square",
        ]
        told = f"at steps {', '.join(map(str, steps))}; the first gradient's mean square is {_compute_mean_square(found):.1e}"
        parts.append(f"{task.title}, {told}:\n\n{format_table(heads, _format_rows(found))}")
    replace_section(page, "layers", parts)
