"""Report VSGD's estimates for each weight tensor in training: sizes of gradients, sigma, gains, and sizes of steps."""

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
#: The steps to report, in addition to the last one.
STEPS = (1, 10, 100)
#: Smaller tensors, such as biases, have no row.
SMALLEST = 100
#: With a gain below this, the mean needs more than twenty gradients to follow.
STUCK = 0.05


class Step(NamedTuple):
    """Measurements of a step of a tensor.

    Attributes:
        gradient: root of the mean square of the mini-batch gradient.
        sigma: the median standard deviation of the posterior, which divides the step.
        gain: the median gain of the step.
        stuck: the part of the elements whose gain is below `STUCK`.
        step: root of the mean square of the step, divided by the learning rate.
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
    # Solve the update mu' = mu + gain (ghat - mu) for the gradient.
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
    """Measurements of a tensor.

    Attributes:
        name: its path in the model.
        size: the number of elements.
        steps: the measured steps.
    """

    name: str
    size: int
    steps: list[Step]


def watch_tensors(setting: Setting, steps: Sequence[int]) -> list[Tensor]:
    """Train with VSGD, and measure some steps of each tensor.

    Args:
        setting: a run of VSGD.
        steps: the steps to measure, in rising order, counted from 1.

    Returns:
        The measurements of each tensor.
    """
    keras.utils.clear_session()  # so that the names of layers do not continue those of earlier models
    bench = Bench(tasks.find_task(setting.task), comparison.find_entrant(setting.entrant).make())
    variables = bench.model.trainable_variables
    found = [Tensor(each.path, int(np.prod(each.shape)), []) for each in variables]
    batches, taken = bench.start(setting.seed), 0
    for step in steps:
        if taken < step - 1:
            bench.train(setting.rates[taken : step - 1], batches)
        before = [_read_posterior(bench, each) for each in variables]
        bench.train(setting.rates[step - 1 : step], batches)
        for tensor, variable, posterior in zip(found, variables, before, strict=True):
            tensor.steps.append(_measure_step(posterior, _read_posterior(bench, variable), bench.optimizer.epsilon))
        taken = step
    return found


def _format_rows(found: Sequence[Tensor]) -> Iterator[list[str]]:
    for name, size, steps in found:
        if size >= SMALLEST:
            columns = zip(*steps, strict=True)
            yield [f"`{name}`", str(size), *(" ".join(f"{value:.1e}" for value in column) for column in columns)]


def write_page(page: Path, backend: str) -> None:
    """Train on the tasks of the sweep, and write the measurements into the page.

    Args:
        page: the Markdown page.
        backend: of Keras, imported before.
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
        square = sum(size * first.gradient**2 for _, size, (first, *_) in found) / sum(size for _, size, _ in found)
        note = f"at steps {', '.join(map(str, steps))}; the first gradient's mean square is {square:.1e}"
        parts.append(f"{task.title}, {note}:\n\n{format_table(heads, _format_rows(found))}")
    replace_section(page, "layers", parts)
