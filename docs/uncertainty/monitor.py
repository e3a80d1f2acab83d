"""What the monitor's plots show of a training on real data: the quickstart's model, on its digits.

Draws `monitor.png`, `monitor_noise_scale.png` and `monitor_momenta.png` and writes the table `monitor.txt`, all for
`docs/uncertainty.md`:

    pip install '.[examples]'
    python docs/uncertainty/monitor.py
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")  # no display needed

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn
from torch.nn import functional

sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[2] / "examples")]

from noise_scale import held_still
from quickstart import BATCH_SIZE, Digits, batches, conv_mixer, layer_weights, load_data

from vsgd.monitor import Look, Monitor
from vsgd.monitor.plots import draw_heat_map, draw_momenta, draw_noise_scale
from vsgd.torch import VSGD, ConstantVSGD
from vsgd.torch.monitor import watch

EVERY = 5  # steps between two looks

DEFAULT, WEAK_PRIOR, CONSTANT = "VSGD", "VSGD, prior_strength 1e-12", "Constant VSGD, lr 0.0003"
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    DEFAULT: VSGD,
    WEAK_PRIOR: partial(VSGD, prior_strength=1e-12),
    CONSTANT: partial(ConstantVSGD, lr=0.0003),
}


class Run(NamedTuple):
    """What a training left behind.

    Attributes:
        looks: of the monitor.
        held: pairs of a step and the noise scale measured there, the weights held still.
        gains: of each layer's weights, at the end.
        first_square: of the elements of the first step's gradient, squared, the median.
        loss: of the last epoch, the mean over its batches.
    """

    looks: list[Look]
    held: list[tuple[int, float]]
    gains: dict[str, Tensor]
    first_square: float
    loss: float


def named(model: nn.Module) -> list[tuple[str, Tensor]]:
    """The parameters, called by what their layers do."""
    layers = {id(weight): layer for layer, weight in layer_weights(model).items()}
    names: list[tuple[str, Tensor]] = []
    layer = ""
    for module in model.modules():
        own = dict(module.named_parameters(recurse=False))
        if own:
            norm = ", norm" if isinstance(module, nn.BatchNorm2d) else ""
            layer = layer if norm else layers[id(own["weight"])]
            names += [(f"{layer}{norm} {name}", param) for name, param in own.items()]
    return names


def train(name: str, data: Digits, epochs: int, probes: int) -> Run:
    """Train the quickstart's model, watched, and hold its weights still so often on the way."""
    torch.manual_seed(0)
    model = conv_mixer()
    optimizer = OPTIMIZERS[name](model.parameters())
    generator = torch.Generator().manual_seed(1)
    order = list(batches(len(data.train_x), epochs, seed=0))
    probed = {len(order) * (probe + 1) // probes for probe in range(probes)}
    looks: list[Look] = []
    held: list[tuple[int, float]] = []
    losses = []
    with watch(optimizer, Monitor(looks, every=EVERY), named(model), batch_size=BATCH_SIZE):
        for step, batch in enumerate(order, start=1):
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(data.train_x[batch]), data.train_y[batch])
            loss.backward()
            if step == 1:
                first_square = torch.cat([param.grad.flatten() for param in model.parameters()]).square().median().item()
            optimizer.step()
            losses.append(loss.item())
            if step in probed:
                scale = held_still(model, data.train_x, data.train_y, generator, BATCH_SIZE).scale.item()
                held.append((step, scale))
    gains = {layer: optimizer.posterior(weight).gain for layer, weight in layer_weights(model).items()}
    return Run(looks, held, gains, first_square, fmean(losses[-(len(order) // epochs) :]))


def table(runs: Mapping[str, Run]) -> str:
    """What the looks tell of all tensors together, in Markdown."""
    lines = [
        "| optimizer | loss, last epoch | squared gradient, median at the first step | median gain, first look | last look "
        "| surprise, first half of the looks | second half | looks that found no gradient |",
        "|---|" + "---:|" * 7,
    ]
    for name, run in runs.items():
        seen = [look.overall for look in run.looks]
        halves = (seen[: len(seen) // 2], seen[len(seen) // 2 :])
        surprises = (fmean(each.surprise for each in half) for half in halves)
        cells = [run.loss, run.first_square, seen[0].gain, seen[-1].gain, *surprises]
        lost = sum(each.noise_squared_norm <= 0 for each in seen) / len(seen)
        lines.append(f"| {name} | {' | '.join(f'{cell:.2g}' for cell in cells)} | {lost:.0%} |")
    return "\n".join(lines) + "\n"


def draw_heat_maps(runs: Mapping[str, Run], output: Path) -> None:
    """Gain and signal to noise of each tensor, one row for each way to set the prior."""
    names = (DEFAULT, WEAK_PRIOR)
    figure, axes = plt.subplots(len(names), 2, figsize=(10, 13), sharey=True, layout="constrained")
    for row, name in zip(axes, names, strict=True):
        for panel, quantity in zip(row, ("gain", "snr_50"), strict=True):
            draw_heat_map(panel, runs[name].looks, quantity)
            panel.set_title(name)
            panel.label_outer()
    save(figure, output)


def draw_noise_scales(runs: Mapping[str, Run], output: Path) -> None:
    """The noise scale while the weights train, beside what is measured where they are held still."""
    names = (DEFAULT, CONSTANT)
    figure, axes = plt.subplots(1, len(names), figsize=(10, 4.5), sharey=True, layout="constrained")
    for panel, name in zip(axes, names, strict=True):
        draw_noise_scale(panel, runs[name].looks, BATCH_SIZE)
        found = [(step, scale) for step, scale in runs[name].held if scale > 0]
        label = f"weights held still: found at {len(found)} of {len(runs[name].held)} steps"
        panel.plot(*zip(*found, strict=True) if found else ([], []), "ko", label=label)
        panel.set(title=name, xlim=(0, 1.02 * max(look.step + EVERY for look in runs[name].looks)))
        panel.label_outer()
        panel.legend(frameon=False, loc="upper left", bbox_to_anchor=(0, -0.15))
    save(figure, output)


def draw_histograms(runs: Mapping[str, Run], output: Path) -> None:
    """The momenta at the end, in the first layers and the last."""
    names = (DEFAULT, WEAK_PRIOR)
    layers = ("patches", "depthwise 1", "pointwise 3", "head")
    figure, axes = plt.subplots(1, len(names), figsize=(10, 4.5), layout="constrained")
    for panel, name in zip(axes, names, strict=True):
        draw_momenta(panel, {layer: runs[name].gains[layer] for layer in layers}, bins=40)
        panel.set_title(name)
    save(figure, output)


def save(figure: plt.Figure, output: Path) -> None:
    """Write a figure."""
    figure.savefig(output, dpi=120)
    plt.close(figure)


def main() -> None:
    """Make the figures and the table from the command line."""
    parser = argparse.ArgumentParser(description="What the monitor's plots show of the quickstart's training.")
    parser.add_argument("--epochs", type=int, default=20, help="passes over the training data (default: %(default)s)")
    parser.add_argument("--probes", type=int, default=8, help="how often the weights are held still (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent, help="folder (default: this file's)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # a second thread gains little on so small a model
    data = load_data()
    runs = {name: train(name, data, arguments.epochs, 0 if name == WEAK_PRIOR else arguments.probes) for name in OPTIMIZERS}
    draw_heat_maps(runs, arguments.output / "monitor.png")
    draw_noise_scales(runs, arguments.output / "monitor_noise_scale.png")
    draw_histograms(runs, arguments.output / "monitor_momenta.png")
    (arguments.output / "monitor.txt").write_text(table(runs), encoding="utf-8")
    print(table(runs), end="")


if __name__ == "__main__":
    main()
