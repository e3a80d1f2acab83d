"""Compare VSGD with AdamW and SGD on a small network, and plot test accuracies and VSGD's gradient estimates.

The task is MNIST-1D (Greydanus, 2020): signals of 40 samples in 10 classes, made by a package without a download. The network
has three convolutions. All optimizers start from the same weights and use the same batches, at learning rates that fall to 0
along a cosine. The script prints means and standard deviations over five seeds:

    pip install '.[examples]'
    python -m experiments.quickstart

Each optimizer has one setting. Its learning rate is the best of four, each a factor of two apart, by the validation accuracy of
seeds 100 to 102 (`--screen` repeats that). The test signals played no part in the choice.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from mnist1d.data import get_dataset_args, make_dataset
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from reporting.plots import CYCLE, drawing, style_optimizers
from vsgd.torch import VSGD, ConstantVSGD

BATCH_SIZE = 100
EVALUATE_EVERY = 50  # steps
COMPILING_STEPS = 5  # excluded from the step times because they compile or allocate
SCREEN_SEEDS = (100, 101, 102)


class Entrant(NamedTuple):
    """An optimizer with its setting.

    Attributes:
        make: makes the optimizer, given parameters and a learning rate.
        lr: the highest learning rate.
        warm_up: the part of the training in which the learning rate rises.
    """

    make: Callable[..., torch.optim.Optimizer]
    lr: float
    warm_up: float


# All run fused kernels, so that step times are comparable; VSGD does so by default.
ENTRANTS: dict[str, Entrant] = {
    "Constant VSGD, auto": Entrant(partial(ConstantVSGD, prior_strength="auto", forgetting_floor=0.01), 0.016, 0.0),
    "VSGD": Entrant(VSGD, 0.032, 0.0),
    "AdamW, warm-up": Entrant(partial(torch.optim.AdamW, betas=(0.9, 0.99), fused=True), 0.064, 0.2),
    "SGD, momentum": Entrant(partial(torch.optim.SGD, momentum=0.9, fused=True), 0.2, 0.0),
}


class Data(NamedTuple):
    """Signals and labels: 4000 for training, 2000 each for validation and test."""

    train_x: Tensor
    train_y: Tensor
    validation_x: Tensor
    validation_y: Tensor
    test_x: Tensor
    test_y: Tensor


def load_data() -> Data:
    """Make the signals, the same for every seed."""
    arguments = get_dataset_args()
    arguments.num_samples, arguments.train_split = 8000, 0.5
    made = make_dataset(arguments)
    x = torch.tensor(np.concatenate([made["x"], made["x_test"]]), dtype=torch.float32)[:, None]
    y = torch.tensor(np.concatenate([made["y"], made["y_test"]]))
    return Data(x[:4000], y[:4000], x[4000:6000], y[4000:6000], x[6000:], y[6000:])


def make_network() -> nn.Sequential:
    """Make a network of three convolutions with 25 channels."""
    layers: list[nn.Module] = []
    for inputs, size in ((1, 5), (25, 3), (25, 3)):
        layers += [nn.Conv1d(inputs, 25, size, stride=2, padding=size // 2), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(125, 10))


LAYERS = {"convolution 1": 0, "convolution 2": 2, "convolution 3": 4, "head": 7}


@dataclass
class Run:
    """The results of one training."""

    accuracies: list[float] = field(default_factory=list)
    step_times: list[float] = field(default_factory=list)
    gains: dict[str, list[float]] = field(default_factory=dict)
    snrs: dict[str, list[float]] = field(default_factory=dict)
    scores: dict[str, float] = field(default_factory=dict)


def choose_rate(entrant: Entrant, part: float) -> float:
    """Return the learning rate when a part of the training is done, as a factor of the highest."""
    rise = min(1.0, part / entrant.warm_up) if entrant.warm_up else 1.0
    return rise * (1 + math.cos(math.pi * part)) / 2


def train(name: str, seed: int, data: Data, steps: int, lr: float | None = None) -> Run:
    """Train a new network with the named entrant; equal seeds give all entrants equal weights and batches."""
    torch.manual_seed(seed)
    entrant, network, run = ENTRANTS[name], make_network(), Run()
    optimizer = entrant.make(network.parameters(), lr=entrant.lr if lr is None else lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: choose_rate(entrant, (step + 1) / (steps + 1)))
    for step in range(1, steps + 1):
        batch = torch.randint(len(data.train_x), (BATCH_SIZE,))
        optimizer.zero_grad()
        functional.cross_entropy(network(data.train_x[batch]), data.train_y[batch]).backward()
        start = time.perf_counter()
        optimizer.step()
        run.step_times.append(time.perf_counter() - start)
        schedule.step()
        if step % EVALUATE_EVERY == 0 or step == steps:
            run.accuracies.append(compute_accuracy(network, data.test_x, data.test_y))
            if isinstance(optimizer, VSGD):
                record_posterior(network, optimizer, run)
    with torch.no_grad():
        loss = functional.cross_entropy(network(data.train_x), data.train_y).item()
    validation = compute_accuracy(network, data.validation_x, data.validation_y)
    run.scores = {"test accuracy (%)": run.accuracies[-1], "validation accuracy (%)": validation, "train loss": loss}
    return run


@torch.no_grad()
def compute_accuracy(network: nn.Module, x: Tensor, y: Tensor) -> float:
    """Return the accuracy in percent."""
    return 100 * (network(x).argmax(1) == y).double().mean().item()


def record_posterior(network: nn.Sequential, optimizer: VSGD, run: Run) -> None:
    """Record the medians of gain and signal-to-noise ratio over each layer's weights."""
    for layer, index in LAYERS.items():
        posterior = optimizer.posterior(network[index].weight)
        run.gains.setdefault(layer, []).append(posterior.gain.median().item())
        run.snrs.setdefault(layer, []).append(posterior.snr.median().item())


def compare(steps: int, seeds: Iterable[int]) -> dict[str, list[Run]]:
    """Train with each entrant and each seed, a run on each processor."""
    data = load_data()
    # One thread each: more barely speed up so small a network.
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        futures = {(name, seed): pool.submit(train, name, seed, data, steps) for seed in seeds for name in ENTRANTS}
        for _ in tqdm(as_completed(futures.values()), total=len(futures), unit="run"):
            pass
    return {name: [future.result() for (each, _), future in futures.items() if each == name] for name in ENTRANTS}


def screen(steps: int) -> str:
    """Return the mean validation accuracy of each entrant at four learning rates around its own."""
    data, lines = load_data(), []
    for name, entrant in ENTRANTS.items():
        for factor in (0.25, 0.5, 1, 2):
            runs = [train(name, seed, data, steps, lr=factor * entrant.lr) for seed in SCREEN_SEEDS]
            mean = statistics.fmean(run.scores["validation accuracy (%)"] for run in runs)
            lines.append(f"{name:<20} {factor * entrant.lr:<6g} {mean:.2f}")
    return "\n".join(lines)


def format_table(runs: Mapping[str, Sequence[Run]]) -> str:
    """Format the mean ± standard deviation of the final scores, and the median time of `optimizer.step()`."""
    formats = {"test accuracy (%)": ".2f", "train loss": ".4f"}
    rows = [["optimizer", "lr", *formats, "step (µs)"]]
    for name, done in runs.items():
        cells = [format_spread([run.scores[score] for run in done], form) for score, form in formats.items()]
        times = [seconds for run in done for seconds in run.step_times[COMPILING_STEPS:]]
        rows.append([name, f"{ENTRANTS[name].lr:g}", *cells, f"{1e6 * statistics.median(times):.0f}"])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def format_spread(values: Sequence[float], form: str) -> str:
    """Format mean ± standard deviation."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.fmean(values):{form}} ± {deviation:{form}}"


def draw(runs: Mapping[str, Sequence[Run]], steps: int, output: Path) -> None:
    """Draw the test accuracies above VSGD's gain and signal-to-noise ratio."""
    looks = sorted({*range(EVALUATE_EVERY, steps + 1, EVALUATE_EVERY), steps})
    with drawing(output, height=8) as figure:
        axes = figure.subplot_mosaic([["accuracy", "accuracy"], ["gain", "snr"]])
        draw_accuracies(axes["accuracy"], looks, runs)
        draw_layers(axes["gain"], looks, [run.gains for run in runs["VSGD"]])
        axes["gain"].set(title="VSGD's gain by layer")
        draw_layers(axes["snr"], looks, [run.snrs for run in runs["VSGD"]])
        # Weights behind units that are off have gradients of zero.
        axes["snr"].set(title="VSGD's signal to noise", yscale="log", ylim=(1e-8, None))
        for panel in axes.values():
            panel.set(xlabel="step", xlim=(0, steps))
        handles, labels = axes["gain"].get_legend_handles_labels()
        title = "median over a layer's weights and over the seeds"
        figure.legend(handles, labels, loc="outside lower center", ncols=2, title=title)


def draw_accuracies(axes: Any, looks: Sequence[int], runs: Mapping[str, Sequence[Run]]) -> None:
    """Draw one curve for each entrant: the mean over the seeds, and a standard deviation around it."""
    for name, style in style_optimizers(runs).items():
        curves = np.array([run.accuracies for run in runs[name]])
        mean, deviation = curves.mean(0), curves.std(0, ddof=1) if len(curves) > 1 else 0.0
        axes.fill_between(looks, mean - deviation, mean + deviation, color=style["color"], alpha=0.2, linewidth=0)
        axes.plot(looks, mean, label=f"{name}, lr {ENTRANTS[name].lr:g}", **style)
    axes.set(title="test accuracy on MNIST-1D, %")
    axes.legend(loc="lower right", title=f"mean and standard deviation, {len(runs['VSGD'])} seeds")


def draw_layers(axes: Any, looks: Sequence[int], seeds: Sequence[Mapping[str, Sequence[float]]]) -> None:
    """Draw one curve for each layer, the median over the seeds."""
    for layer, colour in zip(LAYERS, CYCLE, strict=False):
        curves: NDArray[np.float64] = np.array([curves[layer] for curves in seeds])
        axes.plot(looks, np.median(curves, axis=0), color=colour, label=layer)


def main() -> None:
    """Run the comparison from the command line."""
    parser = argparse.ArgumentParser(description="Compare VSGD with AdamW and SGD on MNIST-1D.")
    parser.add_argument("--steps", type=int, default=2000, help="of each training (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("quickstart.svg"), help="figure file (default: %(default)s)")
    parser.add_argument("--screen", action="store_true", help="print validation accuracies at four learning rates instead")
    arguments = parser.parse_args()
    if min(arguments.steps, arguments.seeds) < 1:
        parser.error(f"--steps is {arguments.steps} and --seeds is {arguments.seeds}, but both must be at least 1")
    if arguments.screen:
        print(screen(arguments.steps))
        return
    runs = compare(arguments.steps, range(arguments.seeds))
    print(format_table(runs))
    draw(runs, arguments.steps, arguments.output)
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
