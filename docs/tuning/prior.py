"""A prior in the gradients' own units, beside the default: scaled losses, a run-away, and the best learning rates.

Trains MLPs on scikit-learn's digits and on MNIST-1D (Greydanus, 2020; made on the spot, no download), and noisy least squares.
Writes the tables `prior_scale.txt`, `prior_run_away.txt` and `prior_rates.txt` for `docs/tuning.md`:

    pip install '.[examples]'
    python docs/tuning/prior.py
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.lr_scheduler import LambdaLR

sys.path.append(str(Path(__file__).parents[1] / "uncertainty"))

from noise_scale import DATA, batches, make_model

import vsgd.numpy
from vsgd.torch import VSGD, ConstantVSGD, prior_strength_from

LOOKED_AT = 10  # mini-batches that the prior is taken from
WINDOW = 100  # steps at the end whose loss is averaged, where the learning rate is constant
DEFAULT = "default"


class Prior(NamedTuple):
    """What the optimizer is given.

    Attributes:
        scale: of `prior_strength_from`; None: the default strength.
        shape: `prior_shape`.
    """

    scale: float | None = None
    shape: float | None = None


PRIORS = {DEFAULT: Prior(), "from gradients": Prior(10.0), "from gradients, prior_shape 0": Prior(10.0, 0.0)}
FREE = {
    DEFAULT: Prior(),
    **{f"from gradients, scale {scale:g}, prior_shape 0": Prior(scale, 0.0) for scale in (1.0, 10.0, 100.0)},
}
OPTIMIZERS = {"VSGD": VSGD, "Constant VSGD": ConstantVSGD}
FACTORS = {"1": 1.0, "2^-13": 2.0**-13, "1e-4": 1e-4, "2^13": 2.0**13, "1e4": 1e4}
RATES = (0.001, 0.003, 0.01, 0.03, 0.1)
CONSTANT_RATES = (0.003, 0.01)  # of the scaled losses
SQUARES_RATES = (0.01, 0.03, 0.1, 0.3, 1.0)


class Trained(NamedTuple):
    """What a training led to.

    Attributes:
        loss: on all the data, unscaled.
        weights: all of them.
    """

    loss: float
    weights: Tensor


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The mean cross-entropy."""
    return functional.cross_entropy(model(x), y)


def hyperparameters(prior: Prior, model: nn.Module, x: Tensor, y: Tensor, seed: int, factor: float) -> dict[str, Any]:
    """The prior's part of the optimizer's arguments, from gradients of the weights at the start."""
    if prior.scale is None:
        return {}
    params = list(model.parameters())
    some = islice(batches(len(x), torch.Generator().manual_seed(seed + 1)), LOOKED_AT)
    gradients = (torch.autograd.grad(factor * loss_of(model, x[batch], y[batch]), params) for batch in some)
    return {"prior_strength": prior_strength_from(gradients, prior.scale), "prior_shape": prior.shape}


def constant(step: int) -> float:
    """The learning rate at a step, over the first."""
    return 1.0


def decaying(step: int, steps: int) -> float:
    """The same, falling to 0 along a cosine."""
    return (1 + math.cos(math.pi * step / steps)) / 2


def train(
    kind: type[torch.optim.Optimizer],
    prior: Prior,
    data: tuple[Tensor, Tensor],
    lr: float,
    steps: int,
    seed: int = 0,
    factor: float = 1.0,
    schedule: Callable[[int], float] = constant,
) -> Trained:
    """Train on the loss times a factor, eps times it too."""
    x, y = data
    torch.manual_seed(seed)
    model = make_model(x.shape[1])
    optimizer = kind(model.parameters(), lr=lr, eps=1e-8 * factor, **hyperparameters(prior, model, x, y, seed, factor))
    scheduler = LambdaLR(optimizer, schedule)
    losses = []
    for step, batch in enumerate(islice(batches(len(x), torch.Generator().manual_seed(seed)), steps), start=1):
        optimizer.zero_grad()
        (factor * loss_of(model, x[batch], y[batch])).backward()
        optimizer.step()
        scheduler.step()
        if step == steps or (schedule is constant and step > steps - WINDOW and step % 10 == 0):
            with torch.no_grad():
                losses.append(loss_of(model, x, y).item())
    return Trained(statistics.fmean(losses), nn.utils.parameters_to_vector(model.parameters()).detach())


def scale_rows(data: Mapping[str, tuple[Tensor, Tensor]], rates: Sequence[float], steps: int) -> Iterator[list[str]]:
    """The loss for each factor, and how far the weights end from those of the plain run."""
    for name, examples in data.items():
        for kind, optimizer in OPTIMIZERS.items():
            for lr in rates:
                for prior, values in PRIORS.items():
                    runs = {factor: train(optimizer, values, examples, lr, steps, factor=FACTORS[factor]) for factor in FACTORS}
                    apart = {factor: (runs[factor].weights - runs["1"].weights).abs().max().item() for factor in FACTORS}
                    farthest = (max(apart["2^-13"], apart["2^13"]), max(apart["1e-4"], apart["1e4"]))
                    losses = [f"{run.loss:.2g}" for run in runs.values()]
                    yield [name, kind, f"{lr:g}", prior, *losses, *(f"{each:.1g}" for each in farthest)]


def scale_table(data: Mapping[str, tuple[Tensor, Tensor]], rates: Sequence[float], steps: int) -> str:
    """Scaled losses, in Markdown."""
    heads = [f"loss, x {factor}" for factor in FACTORS]
    apart = ["weights apart, powers of two", "weights apart, 1e-4 and 1e4"]
    return table(["data", "optimizer", "lr", "prior"], [*heads, *apart], scale_rows(data, rates, steps))


SAMPLES, FEATURES, BATCH, NOISE = 256, 20, 32, 0.5


class Fall(NamedTuple):
    """The losses of least squares, over that at the start.

    Attributes:
        highest: of all steps.
        last: the mean over the last window.
    """

    highest: float
    last: float


def least_squares(kind: str, prior: Prior, lr: float, steps: int, seed: int) -> Fall:
    """Minimize a noisy linear model's squared error from zero weights, at a constant learning rate."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((SAMPLES, FEATURES))
    y = x @ rng.standard_normal(FEATURES) + NOISE * rng.standard_normal(SAMPLES)
    weights = np.zeros(FEATURES)

    def gradient() -> np.ndarray:
        batch = rng.integers(SAMPLES, size=BATCH)
        return (2 / BATCH) * x[batch].T @ (x[batch] @ weights - y[batch])

    given: dict[str, Any] = {}
    if prior.scale is not None:
        strength = vsgd.numpy.prior_strength_from(([gradient()] for _ in range(LOOKED_AT)), prior.scale)
        given = {"prior_strength": strength, "prior_shape": prior.shape}
    optimizer = getattr(vsgd.numpy, kind.replace(" ", ""))([weights], lr=lr, **given)
    losses = []
    for _ in range(steps):
        optimizer.step([gradient()])
        losses.append(float(np.mean((x @ weights - y) ** 2) / np.mean(y**2)))
    return Fall(max(losses), statistics.fmean(losses[-WINDOW:]))


def run_away_rows(rates: Sequence[float], steps: int, seeds: int) -> Iterator[list[str]]:
    """The median over the seeds of both figures, for each prior."""
    for kind in OPTIMIZERS:
        for lr in rates:
            cells = []
            for prior in PRIORS.values():
                falls = [least_squares(kind, prior, lr, steps, seed) for seed in range(seeds)]
                cells += [f"{statistics.median(column):.2g}" for column in zip(*falls, strict=True)]
            yield [kind, f"{lr:g}", *cells]


def run_away_table(rates: Sequence[float], steps: int, seeds: int) -> str:
    """Least squares, in Markdown."""
    heads = [f"{figure}, {prior}" for prior in PRIORS for figure in ("highest", "last")]
    return table(["optimizer", "lr"], heads, run_away_rows(rates, steps, seeds))


def rates_rows(
    data: Mapping[str, tuple[Tensor, Tensor]], rates: Sequence[float], steps: int, seeds: int
) -> Iterator[list[str]]:
    """The median over the seeds of the loss at each rate, and at the best one the loss over the default's at its best."""
    for name, examples in data.items():
        for kind, optimizer in OPTIMIZERS.items():
            best: dict[str, list[float]] = {}
            for prior, values in FREE.items():
                run = partial(train, optimizer, values, examples, steps=steps, schedule=partial(decaying, steps=steps))
                losses = {lr: [run(lr=lr, seed=seed).loss for seed in range(seeds)] for lr in rates}
                medians = {lr: statistics.median(losses[lr]) for lr in rates}
                best_rate = min(rates, key=lambda lr, medians=medians: medians[lr])
                best[prior] = losses[best_rate]
                ratios = [ours / default for ours, default in zip(best[prior], best[DEFAULT], strict=True)]
                beside = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
                cells = [f"**{medians[lr]:.2g}**" if lr == best_rate else f"{medians[lr]:.2g}" for lr in rates]
                yield [name, kind, prior, *cells, beside]


def rates_table(data: Mapping[str, tuple[Tensor, Tensor]], rates: Sequence[float], steps: int, seeds: int) -> str:
    """The best learning rates, in Markdown."""
    heads = [*(f"lr {lr:g}" for lr in rates), "best / default's best"]
    return table(["data", "optimizer", "prior"], heads, rates_rows(data, rates, steps, seeds))


def table(left: Sequence[str], right: Sequence[str], rows: Iterator[list[str]]) -> str:
    """Markdown, some columns to the left and some to the right."""
    lines = [[*left, *right], ["---"] * len(left) + ["---:"] * len(right), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main() -> None:
    """Make the tables from the command line."""
    parser = argparse.ArgumentParser(description="A prior in the gradients' own units, beside the default.")
    parser.add_argument("--steps", type=int, default=1000, help="steps of each training (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=5, help="trainings of which the median is told (default: %(default)s)")
    parser.add_argument("--rates", type=float, nargs="+", default=RATES, help="learning rates tried (default: %(default)s)")
    parser.add_argument("--data", nargs="+", choices=DATA, default=list(DATA), help="what is trained on (default: both)")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent, help="folder (default: this file's)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # a second thread gains nothing on so small a model
    data = {name: DATA[name]() for name in arguments.data}  # first of all, for what is missing is to be told at once
    tables = {
        "prior_scale.txt": scale_table(data, CONSTANT_RATES, arguments.steps),
        "prior_run_away.txt": run_away_table(SQUARES_RATES, arguments.steps, arguments.seeds),
        "prior_rates.txt": rates_table(data, arguments.rates, arguments.steps, arguments.seeds),
    }
    for name, text in tables.items():
        (arguments.output / name).write_text(text, encoding="utf-8")
    print("\n".join(tables.values()), end="")


if __name__ == "__main__":
    main()
