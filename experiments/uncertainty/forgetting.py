"""Measure the noise estimates and the intervals of filters that forget in different ways, over four trainings of an MLP.

Each training is followed by all filters, which see its gradients and move nothing. Writes the table `forgetting.txt` for
`docs/uncertainty.md`:

    pip install '.[examples]'
    python -m experiments.uncertainty.forgetting
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import NormalDist
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from experiments.torch_mlp import BATCH_SIZE, draw_batches, make_mnist_1d, make_model
from experiments.uncertainty.noise_scale import compute_example_gradients
from reporting.pages import format_table
from vsgd.torch import VSGD, ConstantVSGD

OUTPUT = Path("docs/uncertainty")
STEPS, LOOKS = 4000, 16
#: Looks before this step are not in the table.
SETTLED = 500
LEVEL = 0.9


class Training(NamedTuple):
    """An optimizer and its learning rate, which stays or falls to zero as a cosine."""

    optimizer: Callable[..., torch.optim.Optimizer]
    lr: float
    falls: bool


TRAININGS = {
    "AdamW, constant 0.001": Training(torch.optim.AdamW, 0.001, False),
    "AdamW, cosine from 0.01": Training(torch.optim.AdamW, 0.01, True),
    "SGD with momentum, constant 0.05": Training(partial(torch.optim.SGD, momentum=0.9), 0.05, False),
    "VSGD, cosine from 0.01": Training(VSGD, 0.01, True),
}
FILTERS: dict[str, Callable[..., VSGD | ConstantVSGD]] = {
    "VSGD": VSGD,
    "VSGD, floor 0.01": partial(VSGD, forgetting_floor=0.01),
    "Constant VSGD": ConstantVSGD,
    "Constant VSGD, floor 0.01": partial(ConstantVSGD, forgetting_floor=0.01),
}


class Look(NamedTuple):
    """The estimates of a filter after a step, next to the truth.

    Attributes:
        step: the step.
        noise: its noise variance over the true one, both summed over all elements.
        covered: the share of elements whose 90% interval contains the true gradient.
    """

    step: int
    noise: float
    covered: float


def compute_truth(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, float]:
    """Compute the gradient of all examples, and the sum of the variances of a mini-batch's gradient around it."""
    grads = compute_example_gradients(model, x, y)
    mean = grads.mean(dim=0)
    # A batch holds no example twice.
    share = (len(x) - BATCH_SIZE) / (len(x) - 1) / BATCH_SIZE
    return mean, ((grads - mean).square().sum() / len(grads)).item() * share


def look_at(observer: VSGD | ConstantVSGD, step: int, truth: tuple[Tensor, float]) -> Look:
    """Compare a filter's posterior with the true gradient and noise."""
    found = [observer.posterior(param) for param in observer.param_groups[0]["params"]]
    mean, variance, noise = (
        torch.cat([getattr(each, name).ravel() for each in found]) for name in ("mean", "variance", "noise_variance")
    )
    bound = NormalDist().inv_cdf((1 + LEVEL) / 2)
    covered = (mean - truth[0]).abs() <= bound * variance.sqrt()
    return Look(step, noise.sum().item() / truth[1], covered.double().mean().item())


def follow(training: Training, steps: int = STEPS, looks: int = LOOKS, seed: int = 0) -> dict[str, list[Look]]:
    """Train on MNIST-1D, and look at all filters at equal distances."""
    x, y = make_mnist_1d()
    torch.manual_seed(seed)
    model = make_model(x.shape[1])
    optimizer = training.optimizer(model.parameters(), lr=training.lr)
    copies = {name: [param.detach().clone() for param in model.parameters()] for name in FILTERS}
    observers = {name: make(copies[name], lr=0.0) for name, make in FILTERS.items()}
    found: dict[str, list[Look]] = {name: [] for name in FILTERS}
    batches = draw_batches(len(x), torch.Generator().manual_seed(seed))
    for step, batch in enumerate(islice(batches, steps), start=1):
        if training.falls:
            optimizer.param_groups[0]["lr"] = training.lr * (1 + math.cos(math.pi * (step - 1) / steps)) / 2
        optimizer.zero_grad()
        functional.cross_entropy(model(x[batch]), y[batch]).backward()
        for name, observer in observers.items():
            for own, param in zip(copies[name], model.parameters(), strict=True):
                own.grad = param.grad
            observer.step()
        if step % (steps // looks) == 0:  # at the weights of the last gradient
            truth = compute_truth(model, x, y)
            for name, observer in observers.items():
                found[name].append(look_at(observer, step, truth))
        optimizer.step()
    return found


def format_looks(found: Mapping[str, Mapping[str, Sequence[Look]]], settled: int = SETTLED) -> str:
    """Format a Markdown table with a row for each training and filter."""
    rows = []
    for training, filters in found.items():
        for name, looks in filters.items():
            kept = [look for look in looks if look.step > settled]
            noises, shares = [look.noise for look in kept], [100 * look.covered for look in kept]
            spread = f"{min(noises):.2f} to {max(noises):.2f}"
            rows.append([training, name, spread, f"{noises[-1]:.2f}", f"{min(shares):.0f} to {max(shares):.0f}"])
    heads = ["training", "filter", "noise / truth", "at the end", "90% interval covers, %"]
    return format_table(heads, rows, left=2) + "\n"


def main() -> None:
    """Run the command line: write the table."""
    parser = argparse.ArgumentParser(description="Compare filters that forget in different ways, over trainings.")
    parser.add_argument("--steps", type=int, default=STEPS, help="of each training (default: %(default)s)")
    parser.add_argument("--settled", type=int, default=SETTLED, help="leave out looks up to this step (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder (default: %(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # a second thread gains nothing on so small a model
    found = {name: follow(each, arguments.steps, seed=arguments.seed) for name, each in TRAININGS.items()}
    table = format_looks(found, arguments.settled)
    (arguments.output / "forgetting.txt").write_text(table, encoding="utf-8")
    print(table, end="")


if __name__ == "__main__":
    main()
