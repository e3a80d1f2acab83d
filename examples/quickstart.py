"""Compare VSGD with AdamW and SGD on real data, and plot VSGD's gradient estimates.

The script trains a small ConvMixer on scikit-learn's handwritten digits (8x8 pixels, no download). All optimizers start from
the same weights and use the same batches. The script prints the mean and the standard deviation over the seeds. It draws the
loss curves, and for each layer VSGD's gain and signal-to-noise ratio:

    pip install '.[examples]'
    python examples/quickstart.py

VSGD uses its defaults. AdamW's learning rate is the best of 0.001, 0.003, 0.01 and 0.03, SGD's the best of 0.01, 0.03, 0.1 and
0.3, by validation loss: five-fold cross-validation within the training images, 20 epochs. The test images played no part in the
choice. All learning rates are constant.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")  # no display needed

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from vsgd.torch import VSGD

BATCH_SIZE = 64
COMPILING_STEPS = 5  # excluded from the step times because they compile or allocate
WINDOW = 20  # steps in the curves' moving average, about an epoch

# All use fused kernels so that step times are comparable; VSGD selects its kernel by default.
OPTIMIZERS: dict[str, Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]] = {
    "VSGD": VSGD,
    "AdamW": partial(torch.optim.AdamW, lr=0.003, fused=True),
    "SGD": partial(torch.optim.SGD, lr=0.1, momentum=0.9, fused=True),
}


class Residual(nn.Module):
    """Layers with a skip connection: the output is the input plus the layers' output."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """Add the layers' output to the input."""
        return x + self.layers(x)


def conv_mixer(width: int = 64, depth: int = 3) -> nn.Sequential:
    """Make a ConvMixer (Trockman and Kolter, 2022) for 8x8 images in 10 classes, with patches of 2x2 pixels."""

    def add_activation(convolution: nn.Conv2d) -> list[nn.Module]:
        return [convolution, nn.GELU(), nn.BatchNorm2d(width)]

    layers = add_activation(nn.Conv2d(1, width, kernel_size=2, stride=2))
    for _ in range(depth):
        layers.append(Residual(*add_activation(nn.Conv2d(width, width, kernel_size=3, padding=1, groups=width))))
        layers += add_activation(nn.Conv2d(width, width, kernel_size=1))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


class Digits(NamedTuple):
    """Images and labels of the training part and of the test part."""

    train_x: Tensor
    test_x: Tensor
    train_y: Tensor
    test_y: Tensor


def load_data() -> Digits:
    """Load the 1797 digits with pixels scaled to [-1, 1]; a fifth of each class is the test part, the same for every seed."""
    pixels, labels = load_digits(return_X_y=True)
    images = torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8) / 8 - 1
    parts = train_test_split(images.numpy(), labels, test_size=0.2, stratify=labels, random_state=0)
    return Digits(*map(torch.from_numpy, parts))


def batches(n: int, epochs: int, seed: int) -> Iterator[Tensor]:
    """Yield the indices of the mini-batches: a new order in each epoch, without its incomplete last batch."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        yield from torch.randperm(n, generator=generator).split(BATCH_SIZE)[: n // BATCH_SIZE]


@dataclass
class Run:
    """The results of one training."""

    lr: float
    losses: list[float] = field(default_factory=list)
    step_times: list[float] = field(default_factory=list)
    gains: dict[str, list[float]] = field(default_factory=dict)
    snrs: dict[str, list[float]] = field(default_factory=dict)
    scores: dict[str, float] = field(default_factory=dict)


def train(name: str, seed: int, data: Digits, epochs: int, bar: tqdm[None]) -> Run:
    """Train a new model with the named optimizer; equal seeds give all optimizers equal weights and batches."""
    torch.manual_seed(seed)
    model = conv_mixer()
    optimizer = OPTIMIZERS[name](model.parameters())
    run = Run(lr=optimizer.defaults["lr"])
    for batch in batches(len(data.train_x), epochs, seed):
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(data.train_x[batch]), data.train_y[batch])
        loss.backward()
        start = time.perf_counter()
        optimizer.step()
        run.step_times.append(time.perf_counter() - start)
        run.losses.append(loss.item())
        if isinstance(optimizer, VSGD):
            record_posterior(model, optimizer, run)
        bar.update()
    run.scores = evaluate(model, data)
    return run


def record_posterior(model: nn.Module, optimizer: VSGD, run: Run) -> None:
    """Record the medians of gain and signal-to-noise ratio over each layer's weights."""
    for layer, weight in layer_weights(model).items():
        posterior = optimizer.posterior(weight)
        run.gains.setdefault(layer, []).append(posterior.gain.median().item())
        run.snrs.setdefault(layer, []).append(posterior.snr.median().item())


def layer_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return the weights of the convolutions and of the head by their role."""
    weights: dict[str, Tensor] = {}
    for module in model.modules():
        if isinstance(module, nn.Linear):
            weights["head"] = module.weight
        elif isinstance(module, nn.Conv2d):
            kind = "pointwise" if module.kernel_size == (1, 1) else "depthwise" if module.groups > 1 else "patches"
            depth = sum(label.startswith(kind) for label in weights)
            weights["patches" if kind == "patches" else f"{kind} {depth + 1}"] = module.weight
    return weights


@torch.no_grad()
def evaluate(model: nn.Module, data: Digits) -> dict[str, float]:
    """Compute loss and accuracy (in percent) on both parts of the data."""
    model.eval()
    scores = {}
    for part, x, y in (("train", data.train_x, data.train_y), ("test", data.test_x, data.test_y)):
        logits = model(x)
        scores[f"{part} loss"] = functional.cross_entropy(logits, y).item()
        scores[f"{part} accuracy"] = 100 * (logits.argmax(1) == y).double().mean().item()
    return scores


def compare(epochs: int, seeds: int) -> dict[str, list[Run]]:
    """Train with each optimizer and each seed."""
    data = load_data()
    runs: dict[str, list[Run]] = {name: [] for name in OPTIMIZERS}
    steps = epochs * (len(data.train_x) // BATCH_SIZE)
    with tqdm(total=steps * seeds * len(OPTIMIZERS), unit="step") as bar:
        for seed in range(seeds):
            for name, done in runs.items():
                bar.set_description(f"{name}, seed {seed}")
                done.append(train(name, seed, data, epochs, bar))
    return runs


def format_table(runs: dict[str, list[Run]]) -> str:
    """Format the mean ± standard deviation of the final scores, and the median time of `optimizer.step()`."""
    formats = {"train loss": ".5f", "train accuracy": ".2f", "test loss": ".4f", "test accuracy": ".2f"}
    rows = [["optimizer", "lr", *(f"{score} (%)" if "accuracy" in score else score for score in formats), "step (µs)"]]
    for name, done in runs.items():
        cells = [format_spread([run.scores[score] for run in done], form) for score, form in formats.items()]
        times = [seconds for run in done for seconds in run.step_times[COMPILING_STEPS:]]
        rows.append([name, f"{done[0].lr:g}", *cells, f"{1e6 * statistics.median(times):.0f}"])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def format_spread(values: list[float], form: str) -> str:
    """Format mean ± standard deviation."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.fmean(values):{form}} ± {deviation:{form}}"


# Okabe and Ito's colours suit colour-blind readers; dashes show the depth of layers of one kind.
COLOURS = {"VSGD": "#0072B2", "AdamW": "#D55E00", "SGD": "#009E73"}
LAYER_COLOURS = {"patches": "#000000", "depthwise": "#0072B2", "pointwise": "#E69F00", "head": "#CC79A7"}
DASHES = ["-", "--", ":"]


def draw(runs: dict[str, list[Run]], output: Path) -> None:
    """Draw the loss curves above VSGD's gain and signal-to-noise ratio."""
    figure, axes = plt.subplot_mosaic([["loss", "loss"], ["gain", "snr"]], figsize=(10, 7.5), layout="constrained")
    draw_losses(axes["loss"], runs)
    draw_layers(axes["gain"], [run.gains for run in runs["VSGD"]])
    axes["gain"].set(title="VSGD: the gain it learned", ylabel=r"gain  $b_g\,/\,(b_g + b_{\hat g})$")
    draw_layers(axes["snr"], [run.snrs for run in runs["VSGD"]])
    axes["snr"].set(
        title="VSGD: how sure it is of the gradient", ylabel=r"signal to noise  $\mu_g^2\,/\,\sigma^2$", yscale="log"
    )
    for panel in axes.values():
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.25)
        panel.set(xlabel="step", xlim=(0, None))
    handles, labels = axes["gain"].get_legend_handles_labels()
    title = f"layer, from input to output: median over its weights and over the seeds, geometric mean of {WINDOW} steps"
    legend = {"title": title, "frameon": False, "fontsize": "small", "columnspacing": 1.2, "handlelength": 1.8}
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), **legend)
    figure.savefig(output, dpi=150)
    plt.close(figure)


def draw_losses(axes: Axes, runs: dict[str, list[Run]]) -> None:
    """Draw one curve for each optimizer, with the range over the seeds."""
    for name, done in runs.items():
        curves = smooth([run.losses for run in done])
        steps = range(WINDOW, WINDOW + curves.shape[1])
        axes.fill_between(steps, curves.min(0), curves.max(0), color=COLOURS[name], alpha=0.2, linewidth=0)
        axes.plot(steps, np.median(curves, axis=0), color=COLOURS[name], label=f"{name}, lr {done[0].lr:g}")
    axes.set(yscale="log", title="A small ConvMixer on digits", ylabel=f"train loss, mean of {WINDOW} steps")
    axes.legend(frameon=False, title=f"median and range, {len(runs['VSGD'])} seeds")


def draw_layers(axes: Axes, seeds: list[dict[str, list[float]]]) -> None:
    """Draw one curve for each layer, the median over the seeds."""
    for layer in seeds[0]:
        logs = smooth([list(map(math.log, curves[layer])) for curves in seeds])
        kind, _, depth = layer.partition(" ")
        steps = range(WINDOW, WINDOW + logs.shape[1])
        axes.plot(steps, np.exp(np.median(logs, axis=0)), DASHES[int(depth or 1) - 1], color=LAYER_COLOURS[kind], label=layer)


def smooth(curves: list[list[float]]) -> NDArray[np.float64]:
    """Compute moving averages over WINDOW steps, one row for each curve."""
    return np.array([np.convolve(curve, np.full(WINDOW, 1 / WINDOW), "valid") for curve in curves])


def main() -> None:
    """Run the comparison from the command line."""
    parser = argparse.ArgumentParser(description="Compare VSGD with AdamW and SGD on scikit-learn's digits.")
    parser.add_argument("--epochs", type=int, default=20, help="passes over the training data (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("quickstart.png"), help="figure file (default: %(default)s)")
    arguments = parser.parse_args()
    if min(arguments.epochs, arguments.seeds) < 1:
        parser.error(f"--epochs is {arguments.epochs} and --seeds is {arguments.seeds}, but both must be at least 1")
    torch.set_num_threads(1)  # more threads barely speed up so small a model, and slow it on busy cores
    runs = compare(arguments.epochs, arguments.seeds)
    print(format_table(runs))
    draw(runs, arguments.output)
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
