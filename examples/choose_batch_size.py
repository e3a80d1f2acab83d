"""Which batch size? The gradient noise scale's advice beside what batch sizes really cost, on real data.

Trains an MLP on scikit-learn's handwritten digits to a target loss with Constant VSGD, at several batch sizes, and counts the
steps and the samples that each needs at the best learning rate of a small grid. The noise scale is read from the state at one
batch size, the weights held still at a few losses on the way. By theory (arXiv 1812.06162) a batch as large as that needs twice
the fewest steps and twice the fewest samples, and is as large as the fewest samples over the fewest steps.

    pip install '.[examples]'
    python examples/choose_batch_size.py

It prints a table and draws both counts over the batch size, with the advice.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")  # no display needed

import matplotlib.pyplot as plt
import torch
from matplotlib.ticker import LogLocator
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from vsgd.posterior import NoiseScale
from vsgd.torch import ConstantVSGD

BATCH_SIZES = (4, 8, 16, 32, 64, 128, 256, 512, 1024)
LEARNING_RATES = (0.002, 0.004, 0.008, 0.016, 0.032, 0.064)
PROBED = 64  # the batch size at which the noise scale is measured, as a user would at the one in use
TARGET = 0.1  # loss on all the data
MOST_SAMPLES = 1_000_000
MOST_STEPS = 4000
HELD = 300  # steps with the weights held still, at the end of which the noise scale is read


def load_data() -> tuple[Tensor, Tensor]:
    """The 1797 digits, pixels scaled to [-1, 1]."""
    pixels, labels = load_digits(return_X_y=True)
    return torch.tensor(pixels, dtype=torch.float32) / 8 - 1, torch.tensor(labels)


def make_model(seed: int) -> nn.Sequential:
    """An MLP; equal seeds give equal weights."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 10))


def learn(model: nn.Module, optimizer: ConstantVSGD, data: tuple[Tensor, Tensor], size: int) -> None:
    """Take a step on a batch of independent draws."""
    x, y = data
    batch = torch.randint(len(x), (size,))
    optimizer.zero_grad()
    functional.cross_entropy(model(x[batch]), y[batch]).backward()
    optimizer.step()


@torch.no_grad()
def loss_of(model: nn.Module, data: tuple[Tensor, Tensor]) -> float:
    """The loss on all the data."""
    return functional.cross_entropy(model(data[0]), data[1]).item()


def steps_to_target(size: int, lr: float, seed: int, data: tuple[Tensor, Tensor], target: float) -> float:
    """How many steps it takes to the target, looked for every 2% of the steps so far; infinity where it is not reached."""
    model = make_model(seed)
    optimizer = ConstantVSGD(model.parameters(), lr=lr)
    look = 1
    for step in range(1, min(MOST_STEPS, MOST_SAMPLES // size) + 1):
        learn(model, optimizer, data, size)
        if step == look:
            if loss_of(model, data) <= target:
                return step
            look = step + 1 + step // 50
    return math.inf


def noise_scale(lr: float, seed: int, data: tuple[Tensor, Tensor], target: float) -> list[tuple[float, float]]:
    """Pairs of loss and noise scale on the way to the target.

    Measured with the weights held still: while they move, the mean lags and the state's own estimate is far off.
    """
    model = make_model(seed)
    optimizer = ConstantVSGD(model.parameters(), lr=lr)
    found = []
    loss = loss_of(model, data)
    for goal in (1.6, 0.8, 0.4, target):
        for _ in range(MOST_STEPS):
            if loss <= goal:
                break
            learn(model, optimizer, data, PROBED)
            loss = loss_of(model, data)
        found.append((loss, held_still(model, data)))
    return found


def held_still(model: nn.Module, data: tuple[Tensor, Tensor]) -> float:
    """The noise scale of the model as it is: numerator and denominator averaged apart over the later steps, at no step size."""
    prober = ConstantVSGD(model.parameters(), lr=0.0, prior_strength=1e-20)
    trace = squared_norm = 0.0
    for step in range(HELD):
        learn(model, prober, data, PROBED)
        if step >= HELD // 4:
            overall = prober.noise_scale(batch_size=PROBED).overall
            trace, squared_norm = trace + overall.trace.item(), squared_norm + overall.squared_norm.item()
    return NoiseScale(trace, squared_norm).scale


def measured(costs: dict[int, Cost]) -> float:
    """The critical batch size that the costs show: the fewest samples over the fewest steps."""
    return min(size * each.steps for size, each in costs.items()) / min(each.steps for each in costs.values())


class Cost(NamedTuple):
    """What a batch size costs at its best learning rate: the median over the seeds."""

    lr: float
    steps: float


def cost(size: int, rates: Sequence[float], seeds: int, data: tuple[Tensor, Tensor], target: float, bar: tqdm[None]) -> Cost:
    """The learning rate with the fewest steps."""
    found = []
    for lr in rates:
        found.append(Cost(lr, statistics.median(steps_to_target(size, lr, seed, data, target) for seed in range(seeds))))
        bar.update()
    return min(found, key=lambda each: each.steps)


def table(costs: dict[int, Cost], scales: list[tuple[float, float]]) -> str:
    """The costs, and the noise scales."""
    rows = [("batch size", "best lr", "steps", "samples")]
    rows += [(str(size), f"{each.lr:g}", f"{each.steps:g}", f"{size * each.steps:g}") for size, each in costs.items()]
    lines = ["  ".join(cell.rjust(10) for cell in row) for row in rows]
    lines.append(f"fewest samples over fewest steps: {measured(costs):.0f} examples")
    return "\n".join(lines + [f"noise scale at a loss of {loss:.2f}: {scale:.0f} examples" for loss, scale in scales])


def draw(costs: dict[int, Cost], scales: list[tuple[float, float]], target: float, output: Path) -> None:
    """Steps and samples over the batch size, in logarithms, and the range of the advice."""
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    reached = {size: each.steps for size, each in costs.items() if math.isfinite(each.steps)}
    samples = axes.twinx()
    lines = axes.plot(list(reached), list(reached.values()), "o-", color="#0072B2", label="steps (left)")
    lines += samples.plot(
        list(reached), [size * steps for size, steps in reached.items()], "s--", color="#D55E00", label="samples (right)"
    )
    advice = [scale for _, scale in scales if scale > 0]
    if advice:
        label = f"noise scale on the way: {min(advice):.0f} to {max(advice):.0f}"
        lines.append(axes.axvspan(min(advice), max(advice), color="#009E73", alpha=0.2, label=label))
    label = f"fewest samples / fewest steps: {measured(costs):.0f}"
    lines.append(axes.axvline(measured(costs), color="black", linestyle=":", label=label))
    axes.set(xscale="log", yscale="log", xlabel="batch size (examples)", ylabel=f"steps to a loss of {target:g}")
    axes.set_xticks(list(costs), labels=list(map(str, costs)))
    samples.set(yscale="log", ylabel=f"samples to a loss of {target:g}")
    axes.set_title("Constant VSGD on digits, each batch size at its best learning rate")
    figure.legend(handles=lines, frameon=False, loc="outside lower center", ncols=2)
    for panel in (axes, samples):  # 20, 50 and 100 rather than powers
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_major_formatter("{x:g}")
        panel.minorticks_off()
    axes.grid(alpha=0.25)
    figure.savefig(output, dpi=150)
    plt.close(figure)


def main() -> None:
    """Run the comparison from the command line."""
    parser = argparse.ArgumentParser(description="The noise scale's advice beside what batch sizes cost.")
    parser.add_argument("--sizes", type=int, nargs="+", default=BATCH_SIZES, help="batch sizes (default: %(default)s)")
    parser.add_argument("--rates", type=float, nargs="+", default=LEARNING_RATES, help="learning rates (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="how many seeds to train from (default: %(default)s)")
    parser.add_argument("--target", type=float, default=TARGET, help="the loss to reach (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("choose_batch_size.png"), help="the figure (default: %(default)s)")
    arguments = parser.parse_args()
    if min(*arguments.sizes, arguments.seeds) < 1:
        parser.error("--sizes and --seeds must be at least 1")
    torch.set_num_threads(1)  # a second thread gains little on so small a model
    data = load_data()
    with tqdm(total=len(arguments.sizes) * len(arguments.rates), unit="training") as bar:
        costs = {size: cost(size, arguments.rates, arguments.seeds, data, arguments.target, bar) for size in arguments.sizes}
    middle = min(arguments.rates, key=lambda lr: abs(math.log(lr / 0.004)))
    scales = noise_scale(middle, 0, data, arguments.target)
    print(table(costs, scales))
    draw(costs, scales, arguments.target, arguments.output)
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
