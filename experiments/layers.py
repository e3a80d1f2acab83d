"""What VSGD sees of each weight tensor as it trains: sizes of gradients, sigma, gain, and of the steps that it takes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

from benchmarks.report import replace_section, table
from experiments import comparison, sweep, tasks
from experiments.bench import Bench
from experiments.comparison import Setting, Trial

#: What of the steps is told, beside the last one.
STEPS = (1, 10, 100)
#: Tensors of less elements, such as biases, are left out.
SMALLEST = 500


class Seen(NamedTuple):
    """A step of a tensor.

    Attributes:
        gradient: root of the mean square of the mini-batch gradient.
        sigma: the median standard deviation of the posterior by which the step was divided.
        gain: the median gain of the step.
        step: root of the mean square of the step, over the learning rate.
    """

    gradient: float
    sigma: float
    gain: float
    step: float


def _root_mean_square(values: Any) -> float:
    return float(np.sqrt(np.mean(np.square(values, dtype=np.float64))))


def _known(bench: Bench, variable: Any) -> Any:
    return [ops.convert_to_numpy(each).astype(np.float64) for each in bench.optimizer.posterior(variable)]


def _seen(before: Sequence[Any], after: Sequence[Any], eps: float) -> Seen:
    mean, variance, _, _, gain, _ = before
    # The update is mu' = mu + gain (ghat - mu): so it tells the gradient.
    gradient = mean + (after[0] - mean) / gain
    step = after[0] / (np.sqrt(after[0] ** 2 + variance) + eps)
    return Seen(
        _root_mean_square(gradient), float(np.median(np.sqrt(variance))), float(np.median(gain)), _root_mean_square(step)
    )


def watch(setting: Setting, steps: Sequence[int]) -> dict[str, list[Seen]]:
    """What was seen of each large tensor, step by step, in a run.

    Args:
        setting: which run, of VSGD.
        steps: which steps, in rising order, counted from 1.
    """
    keras.utils.clear_session()  # that names of layers do not count on from models made before
    bench = Bench(tasks.named(setting.task), comparison.named(setting.entrant).make())
    large = [each for each in bench.model.trainable_variables if np.prod(each.shape) >= SMALLEST]
    found: dict[str, list[Seen]] = {each.path: [] for each in large}
    batches, taken = bench.start(setting.seed), 0
    for step in steps:
        if taken < step - 1:
            bench.train(setting.rates[taken : step - 1], batches)
        before = [_known(bench, each) for each in large]
        bench.train(setting.rates[step - 1 : step], batches)
        for variable, known in zip(large, before, strict=True):
            found[variable.path].append(_seen(known, _known(bench, variable), bench.optimizer.epsilon))
        taken = step
    return found


def _rows(found: dict[str, list[Seen]]) -> Iterator[list[str]]:
    for name, seen in found.items():
        yield [f"`{name}`", *(" ".join(f"{value:.1e}" for value in column) for column in zip(*seen, strict=True))]


def run(page: Path, backend: str) -> None:
    """Train on the tasks of the sweep, and write what was seen into the page.

    Args:
        page: the Markdown page.
        backend: of Keras, which is imported with it.
    """
    parts = []
    for name in sweep.TASKS:
        task = tasks.named(name)
        steps = [*STEPS, task.steps]
        setting = Setting(
            name, sweep.DEFAULT, Trial(comparison.named(sweep.DEFAULT).base.learning_rate, "cosine"), sweep.SEEDS[0], backend
        )
        rows = _rows(watch(setting, steps))
        heads = ["tensor", "gradient, root mean square", "sigma, median", "gain, median", "step / lr, root mean square"]
        parts.append(f"{task.title}, at steps {', '.join(map(str, steps))}:\n\n{table(heads, rows)}")
    replace_section(page, "layers", parts)
