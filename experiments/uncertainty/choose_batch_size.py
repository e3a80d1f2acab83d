"""Compare the gradient noise scale with the measured cost of each batch size.

The script trains an MLP with Constant VSGD on scikit-learn's handwritten digits until it reaches a target loss. For each batch
size it counts the steps and the samples at the best learning rate of a small grid. At one batch size it measures the noise
scale during the training, from four micro-batches in each step. In theory (arXiv 1812.06162) the noise scale equals the fewest
samples divided by the fewest steps. A batch of that size needs twice the fewest steps and twice the fewest samples.

    pip install '.[examples]'
    python -m experiments.uncertainty.choose_batch_size

The script prints a table, and draws `choose_batch_size.svg` for `docs/uncertainty.md`: both counts over the batch size, and the
range of the noise scale.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.ticker import LogLocator
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from reporting.plots import CYCLE, INK, OPTIMIZERS, drawing
from vsgd.monitor.noise_scale import MeasuredNoiseScale
from vsgd.torch import ConstantVSGD
from vsgd.torch.noise_scale import NoiseScaleMeter

OUTPUT = Path("docs/uncertainty")
BATCH_SIZES = (4, 8, 16, 32, 64, 128, 256, 512, 1024)
LEARNING_RATES = (0.002, 0.004, 0.008, 0.016, 0.032, 0.064)
PROBE_SIZE = 64  # batch size for measuring the noise scale; you would take the one in use
PARTS = 4  # micro-batches in a step that measures the noise scale
TARGET = 0.1  # loss on all data
MOST_SAMPLES = 1_000_000
MOST_STEPS = 4000


def load_data() -> tuple[Tensor, Tensor]:
    """Load the 1797 digits with pixels scaled to [-1, 1]."""
    pixels, labels = load_digits(return_X_y=True)
    return torch.tensor(pixels, dtype=torch.float32) / 8 - 1, torch.tensor(labels)


def make_model(seed: int) -> nn.Sequential:
    """Make an MLP; equal seeds give equal weights."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 10))


def take_step(model: nn.Module, optimizer: ConstantVSGD, data: tuple[Tensor, Tensor], size: int, parts: int = 1) -> None:
    """Take a step on a batch of independently drawn examples, in micro-batches."""
    x, y = data
    optimizer.zero_grad()
    for part in torch.randint(len(x), (size,)).chunk(parts):
        (functional.cross_entropy(model(x[part]), y[part]) / parts).backward()
    optimizer.step()


@torch.no_grad()
def compute_loss(model: nn.Module, data: tuple[Tensor, Tensor]) -> float:
    """Compute the loss on all data."""
    return functional.cross_entropy(model(data[0]), data[1]).item()


def count_steps(size: int, lr: float, seed: int, data: tuple[Tensor, Tensor], target: float) -> float:
    """Count the steps to the target loss, checked every 2% of the steps so far; return infinity if it is not reached."""
    model = make_model(seed)
    optimizer = ConstantVSGD(model.parameters(), lr=lr)
    next_check = 1
    for step in range(1, min(MOST_STEPS, MOST_SAMPLES // size) + 1):
        take_step(model, optimizer, data, size)
        if step == next_check:
            if compute_loss(model, data) <= target:
                return step
            next_check = step + 1 + step // 50
    return math.inf


def track_noise_scale(lr: float, seed: int, data: tuple[Tensor, Tensor], target: float) -> list[Stretch]:
    """Measure the noise scale of each stretch of a training, on the way to the target."""
    model = make_model(seed)
    optimizer = ConstantVSGD(model.parameters(), lr=lr)
    found = []
    for goal in [*(goal for goal in (1.6, 0.8, 0.4) if goal > target), target]:
        with NoiseScaleMeter(optimizer, micro_batch_size=PROBE_SIZE // PARTS, window=MOST_STEPS) as meter:
            for _ in range(MOST_STEPS):
                take_step(model, optimizer, data, PROBE_SIZE, PARTS)
                loss = compute_loss(model, data)
                if loss <= goal:
                    break
        found.append(Stretch(loss, meter.read()))
    return found


class Stretch(NamedTuple):
    """The loss at the end of a stretch of a training, and the noise scale of its steps."""

    loss: float
    noise: MeasuredNoiseScale


class Cost(NamedTuple):
    """The best learning rate of a batch size, and its median number of steps over the seeds."""

    lr: float
    steps: float


def compute_critical_size(costs: dict[int, Cost]) -> float:
    """Compute the critical batch size: the fewest samples divided by the fewest steps."""
    return min(size * cost.steps for size, cost in costs.items()) / min(cost.steps for cost in costs.values())


def find_cost(
    size: int, rates: Sequence[float], seeds: int, data: tuple[Tensor, Tensor], target: float, bar: tqdm[None]
) -> Cost:
    """Find the learning rate with the fewest steps."""
    found = []
    for lr in rates:
        found.append(Cost(lr, statistics.median(count_steps(size, lr, seed, data, target) for seed in range(seeds))))
        bar.update()
    return min(found, key=lambda cost: cost.steps)


def format_table(costs: dict[int, Cost], stretches: list[Stretch]) -> str:
    """Format the costs and the noise scales."""
    rows = [("batch size", "best lr", "steps", "samples")]
    rows += [(str(size), f"{cost.lr:g}", f"{cost.steps:g}", f"{size * cost.steps:g}") for size, cost in costs.items()]
    lines = ["  ".join(cell.rjust(10) for cell in row) for row in rows]
    lines.append(f"fewest samples over fewest steps: {compute_critical_size(costs):.0f} examples")
    lines += [
        f"noise scale of {noise.steps} steps to a loss of {loss:.2f}: {noise.scale:.0f} ± {noise.error:.0f} examples"
        for loss, noise in stretches
    ]
    return "\n".join(lines)


def draw(costs: dict[int, Cost], stretches: list[Stretch], target: float, output: Path) -> None:
    """Draw steps and samples over the batch size on logarithmic axes, and the range of the noise scale."""
    reached = {size: cost.steps for size, cost in costs.items() if math.isfinite(cost.steps)}
    with drawing(output, height=6) as figure:
        axes = figure.subplots()
        samples = axes.twinx()
        colour = OPTIMIZERS["Constant VSGD"]
        lines = axes.plot(list(reached), list(reached.values()), "o-", color=colour, label="steps (left axis)")
        products = [size * steps for size, steps in reached.items()]
        lines += samples.plot(list(reached), products, "s--", color=colour, label="samples (right axis)")
        positive = [noise.scale for _, noise in stretches if noise.scale > 0]
        if positive:
            label = f"noise scale on the way: {min(positive):.0f} to {max(positive):.0f}"
            lines.append(axes.axvspan(min(positive), max(positive), color=CYCLE[0], alpha=0.3, label=label))
        label = f"fewest samples / fewest steps: {compute_critical_size(costs):.0f}"
        lines.append(axes.axvline(compute_critical_size(costs), color=INK, linestyle="dotted", label=label))
        axes.set(xscale="log", yscale="log", xlabel="batch size, examples")
        axes.set_xticks(list(costs), labels=list(map(str, costs)))
        samples.set(yscale="log")
        samples.grid(visible=False)
        samples.spines["right"].set_visible(True)
        axes.set_title(f"Constant VSGD on digits: cost of a loss of {target:g}")
        figure.legend(handles=lines, loc="outside lower center")
        for panel in (axes, samples):  # label 20, 50 and 100 instead of powers
            panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            panel.yaxis.set_major_formatter("{x:g}")
            panel.minorticks_off()


def main() -> None:
    """Run the comparison from the command line."""
    parser = argparse.ArgumentParser(description="Compare the gradient noise scale with the cost of each batch size.")
    parser.add_argument("--sizes", type=int, nargs="+", default=BATCH_SIZES, help="batch sizes (default: %(default)s)")
    parser.add_argument("--rates", type=float, nargs="+", default=LEARNING_RATES, help="learning rates (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds (default: %(default)s)")
    parser.add_argument("--target", type=float, default=TARGET, help="loss to reach (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder (default: %(default)s)")
    arguments = parser.parse_args()
    if min(*arguments.sizes, arguments.seeds) < 1:
        parser.error(f"--sizes is {arguments.sizes} and --seeds is {arguments.seeds}, but all must be at least 1")
    torch.set_num_threads(1)  # more threads barely speed up so small a model
    data = load_data()
    with tqdm(total=len(arguments.sizes) * len(arguments.rates), unit="training") as bar:
        options = (arguments.rates, arguments.seeds, data, arguments.target, bar)
        costs = {size: find_cost(size, *options) for size in arguments.sizes}
    middle = min(arguments.rates, key=lambda lr: abs(math.log(lr / 0.004)))
    stretches = track_noise_scale(middle, 0, data, arguments.target)
    print(format_table(costs, stretches))
    draw(costs, stretches, arguments.target, arguments.output / "choose_batch_size.svg")


if __name__ == "__main__":
    main()
