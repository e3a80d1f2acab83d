"""Compare a prior in the gradients' own units with the default: scaled losses, a run-away, and the best learning rates.

Trains MLPs on scikit-learn's digits and on MNIST-1D (Greydanus, 2020; made on the spot, no download), and noisy least squares.
Writes the tables `prior_scale.txt`, `prior_run_away.txt` and `prior_rates.txt` for `docs/calibration.md`:

    pip install '.[examples]'
    python -m experiments.tuning.prior
"""

from __future__ import annotations

import argparse
import math
import statistics
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

import vsgd.numpy
from experiments.torch_mlp import DATA, draw_batches, make_model
from reporting.pages import format_table
from vsgd.torch import VSGD, ConstantVSGD, prior_strength_from

OUTPUT = Path("docs/tuning")
LOOKED_AT = 10  # mini-batches to take the prior from
WINDOW = 100  # last steps to average the loss over, where the learning rate is constant
DEFAULT = "default"


class Prior(NamedTuple):
    """Settings of an optimizer's prior.

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
    """The end of a training.

    Attributes:
        loss: on all the data, unscaled.
        weights: all of them, as one vector.
    """

    loss: float
    weights: Tensor


def compute_loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Compute the mean cross-entropy."""
    return functional.cross_entropy(model(x), y)


def make_hyperparameters(prior: Prior, model: nn.Module, x: Tensor, y: Tensor, seed: int, factor: float) -> dict[str, Any]:
    """Return the optimizer's arguments for a prior, computed from gradients at the initial weights."""
    if prior.scale is None:
        return {}
    params = list(model.parameters())
    some = islice(draw_batches(len(x), torch.Generator().manual_seed(seed + 1)), LOOKED_AT)
    gradients = (torch.autograd.grad(factor * compute_loss(model, x[batch], y[batch]), params) for batch in some)
    return {"prior_strength": prior_strength_from(gradients, prior.scale), "prior_shape": prior.shape}


def keep_rate(step: int) -> float:
    """Return 1, a constant factor on the learning rate."""
    return 1.0


def decay_rate(step: int, steps: int) -> float:
    """Return the factor on the learning rate at a step: a cosine from 1 to 0."""
    return (1 + math.cos(math.pi * step / steps)) / 2


def train(
    make_optimizer: type[torch.optim.Optimizer],
    prior: Prior,
    data: tuple[Tensor, Tensor],
    lr: float,
    steps: int,
    seed: int = 0,
    factor: float = 1.0,
    schedule: Callable[[int], float] = keep_rate,
) -> Trained:
    """Train on the loss times a factor, with eps times that factor."""
    x, y = data
    torch.manual_seed(seed)
    model = make_model(x.shape[1])
    given = make_hyperparameters(prior, model, x, y, seed, factor)
    optimizer = make_optimizer(model.parameters(), lr=lr, eps=1e-8 * factor, **given)
    scheduler = LambdaLR(optimizer, schedule)
    losses = []
    for step, batch in enumerate(islice(draw_batches(len(x), torch.Generator().manual_seed(seed)), steps), start=1):
        optimizer.zero_grad()
        (factor * compute_loss(model, x[batch], y[batch])).backward()
        optimizer.step()
        scheduler.step()
        if step == steps or (schedule is keep_rate and step > steps - WINDOW and step % 10 == 0):
            with torch.no_grad():
                losses.append(compute_loss(model, x, y).item())
    return Trained(statistics.fmean(losses), nn.utils.parameters_to_vector(model.parameters()).detach())


def make_scale_rows(data: Mapping[str, tuple[Tensor, Tensor]], rates: Sequence[float], steps: int) -> Iterator[list[str]]:
    """Yield rows of the loss for each factor, and the largest difference between the weights and those without a factor."""
    for name, examples in data.items():
        for title, optimizer in OPTIMIZERS.items():
            for lr in rates:
                for prior, values in PRIORS.items():
                    runs = {factor: train(optimizer, values, examples, lr, steps, factor=FACTORS[factor]) for factor in FACTORS}
                    apart = {factor: (runs[factor].weights - runs["1"].weights).abs().max().item() for factor in FACTORS}
                    farthest = (max(apart["2^-13"], apart["2^13"]), max(apart["1e-4"], apart["1e4"]))
                    losses = [f"{run.loss:.2g}" for run in runs.values()]
                    yield [name, title, f"{lr:g}", prior, *losses, *(f"{each:.1g}" for each in farthest)]


def format_scale_table(data: Mapping[str, tuple[Tensor, Tensor]], rates: Sequence[float], steps: int) -> str:
    """Format the Markdown table of scaled losses."""
    heads = [f"loss, x {factor}" for factor in FACTORS]
    apart = ["weights apart, powers of two", "weights apart, 1e-4 and 1e4"]
    rows = make_scale_rows(data, rates, steps)
    return format_table(["data", "optimizer", "lr", "prior", *heads, *apart], rows, left=4) + "\n"


SAMPLES, FEATURES, BATCH, NOISE = 256, 20, 32, 0.5


class Fall(NamedTuple):
    """Losses of least squares, divided by the loss at the start.

    Attributes:
        highest: the highest loss of all steps.
        last: the mean over the last window.
    """

    highest: float
    last: float


def fit_least_squares(name: str, prior: Prior, lr: float, steps: int, seed: int) -> Fall:
    """Minimize the squared error of a noisy linear model from zero weights, at a constant learning rate."""
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
    optimizer = getattr(vsgd.numpy, name.replace(" ", ""))([weights], lr=lr, **given)
    losses = []
    for _ in range(steps):
        optimizer.step([gradient()])
        losses.append(float(np.mean((x @ weights - y) ** 2) / np.mean(y**2)))
    return Fall(max(losses), statistics.fmean(losses[-WINDOW:]))


def make_run_away_rows(rates: Sequence[float], steps: int, seeds: int) -> Iterator[list[str]]:
    """Yield rows of the medians over the seeds of both losses, for each prior."""
    for name in OPTIMIZERS:
        for lr in rates:
            cells = []
            for prior in PRIORS.values():
                falls = [fit_least_squares(name, prior, lr, steps, seed) for seed in range(seeds)]
                cells += [f"{statistics.median(column):.2g}" for column in zip(*falls, strict=True)]
            yield [name, f"{lr:g}", *cells]


def format_run_away_table(rates: Sequence[float], steps: int, seeds: int) -> str:
    """Format the Markdown table of least squares."""
    heads = [f"{figure}, {prior}" for prior in PRIORS for figure in ("highest", "last")]
    return format_table(["optimizer", "lr", *heads], make_run_away_rows(rates, steps, seeds), left=2) + "\n"


def make_rates_rows(
    data: Mapping[str, tuple[Tensor, Tensor]], rates: Sequence[float], steps: int, seeds: int
) -> Iterator[list[str]]:
    """Yield rows of the median loss at each rate, and the ratio of the best loss to that of the default prior."""
    for name, examples in data.items():
        for title, optimizer in OPTIMIZERS.items():
            best: dict[str, list[float]] = {}
            for prior, values in FREE.items():
                run = partial(train, optimizer, values, examples, steps=steps, schedule=partial(decay_rate, steps=steps))
                losses = {lr: [run(lr=lr, seed=seed).loss for seed in range(seeds)] for lr in rates}
                medians = {lr: statistics.median(losses[lr]) for lr in rates}
                best_rate = min(rates, key=lambda lr, medians=medians: medians[lr])
                best[prior] = losses[best_rate]
                ratios = [loss / default for loss, default in zip(best[prior], best[DEFAULT], strict=True)]
                compared = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
                cells = [f"**{medians[lr]:.2g}**" if lr == best_rate else f"{medians[lr]:.2g}" for lr in rates]
                yield [name, title, prior, *cells, compared]


def format_rates_table(data: Mapping[str, tuple[Tensor, Tensor]], rates: Sequence[float], steps: int, seeds: int) -> str:
    """Format the Markdown table of the best learning rates."""
    heads = [*(f"lr {lr:g}" for lr in rates), "best / default's best"]
    rows = make_rates_rows(data, rates, steps, seeds)
    return format_table(["data", "optimizer", "prior", *heads], rows, left=3) + "\n"


def main() -> None:
    """Run the command line: write the tables."""
    parser = argparse.ArgumentParser(description="Compare a prior in the gradients' own units with the default.")
    parser.add_argument("--steps", type=int, default=1000, help="steps of each training (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=5, help="trainings to take the median of (default: %(default)s)")
    parser.add_argument("--rates", type=float, nargs="+", default=RATES, help="learning rates to try (default: %(default)s)")
    parser.add_argument("--data", nargs="+", choices=DATA, default=list(DATA), help="what to train on (default: both)")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder (default: %(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # a second thread gains nothing on so small a model
    data = {name: DATA[name]() for name in arguments.data}  # first, so that a missing package is reported at once
    tables = {
        "prior_scale.txt": format_scale_table(data, CONSTANT_RATES, arguments.steps),
        "prior_run_away.txt": format_run_away_table(SQUARES_RATES, arguments.steps, arguments.seeds),
        "prior_rates.txt": format_rates_table(data, arguments.rates, arguments.steps, arguments.seeds),
    }
    for name, text in tables.items():
        (arguments.output / name).write_text(text, encoding="utf-8")
    print("\n".join(tables.values()), end="")


if __name__ == "__main__":
    main()
