"""Draw the monitor's plots for a training on real data: a ConvMixer on digits.

Draws `monitor.svg`, `monitor_noise_scale.svg` and `monitor_momenta.svg` and writes the table `monitor.txt`, all for
`docs/uncertainty.md`:

    pip install '.[examples]'
    python -m experiments.uncertainty.monitor
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from experiments.uncertainty.noise_scale import estimate_at_fixed_weights
from reporting import digits
from reporting.pages import format_table
from reporting.plots import INK, drawing, find_colour
from vsgd.monitor import Look, Monitor
from vsgd.monitor.plots import draw_heat_map, draw_momenta, draw_noise_scale
from vsgd.torch import VSGD, ConstantVSGD
from vsgd.torch.monitor import watch
from vsgd.torch.noise_scale import NoiseScaleMeter

OUTPUT = Path("docs/uncertainty")
EVERY = 5  # steps between two looks
PARTS, WINDOW = 2, 100  # micro-batches in a step that measures the noise scale, and the steps to average it over

DEFAULT, WEAK_PRIOR, CONSTANT = "VSGD", "VSGD, prior_strength 1e-12", "Constant VSGD, lr 0.0003"
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    DEFAULT: VSGD,
    WEAK_PRIOR: partial(VSGD, prior_strength=1e-12),
    CONSTANT: partial(ConstantVSGD, lr=0.0003),
}


class Run(NamedTuple):
    """Measurements of a training.

    Attributes:
        looks: of the monitor.
        held: pairs of a step and the noise scale at that step's weights, held fixed, of micro-batches.
        gains: of each layer's weights, at the end.
        first_square: the median squared element of the first step's gradient.
        loss: the mean over the last epoch's batches.
    """

    looks: list[Look]
    held: list[tuple[int, float]]
    gains: dict[str, Tensor]
    first_square: float
    loss: float


def name_parameters(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Name the parameters after what their layers do."""
    layers = {id(weight): layer for layer, weight in digits.list_layer_weights(model).items()}
    names: list[tuple[str, Tensor]] = []
    layer = ""
    for module in model.modules():
        own = dict(module.named_parameters(recurse=False))
        if own:
            norm = ", norm" if isinstance(module, nn.BatchNorm2d) else ""
            layer = layer if norm else layers[id(own["weight"])]
            names += [(f"{layer}{norm} {name}", param) for name, param in own.items()]
    return names


def train(name: str, data: Any, epochs: int, parts: int = 1, probes: int = 0) -> Run:
    """Train the ConvMixer with a monitor; measure the noise scale from micro-batches, and `probes` times at fixed weights."""
    torch.manual_seed(0)
    model = digits.make_conv_mixer()
    optimizer = OPTIMIZERS[name](model.parameters())
    generator = torch.Generator().manual_seed(1)
    order = list(digits.draw_batches(len(data.train_x), epochs, seed=0))
    probed = {len(order) * (probe + 1) // probes for probe in range(probes)}
    size = digits.BATCH_SIZE // parts
    meter = NoiseScaleMeter(optimizer, micro_batch_size=size, window=WINDOW) if parts > 1 else None
    looks: list[Look] = []
    held: list[tuple[int, float]] = []
    losses = []
    options = {"batch_size": digits.BATCH_SIZE, "noise_scale": meter}
    with watch(optimizer, Monitor(looks, every=EVERY), name_parameters(model), **options):
        for step, batch in enumerate(order, start=1):
            optimizer.zero_grad()
            for part in batch.split(size):
                loss = functional.cross_entropy(model(data.train_x[part]), data.train_y[part]) / parts
                loss.backward()
                losses.append(loss.item())
            if step == 1:
                first_square = torch.cat([param.grad.flatten() for param in model.parameters()]).square().median().item()
            optimizer.step()
            if step in probed:
                scale = estimate_at_fixed_weights(model, data.train_x, data.train_y, generator, size)
                held.append((step, scale.scale.item()))
    gains = {layer: optimizer.posterior(weight).gain for layer, weight in digits.list_layer_weights(model).items()}
    return Run(looks, held, gains, first_square, fmean(losses[-(len(order) // epochs) :]))


def format_rows(runs: Mapping[str, Run]) -> str:
    """Format a Markdown table of what the looks report for all tensors together."""
    rows = []
    for name, run in runs.items():
        seen = [look.overall for look in run.looks]
        halves = (seen[: len(seen) // 2], seen[len(seen) // 2 :])
        surprises = (fmean(each.surprise for each in half) for half in halves)
        cells = [run.loss, run.first_square, seen[0].gain, seen[-1].gain, *surprises]
        rows.append([name, *(f"{cell:.2g}" for cell in cells)])
    heads = ["optimizer", "loss, last epoch", "squared gradient, median at the first step"]
    heads += ["median gain, first look", "last look", "surprise, first half of the looks", "second half"]
    return format_table(heads, rows, left=1) + "\n"


def draw_heat_maps(runs: Mapping[str, Run], output: Path) -> None:
    """Draw gain and signal-to-noise ratio of each tensor, one row for each prior; labels name each layer's first tensor."""
    names, quantities = (DEFAULT, WEAK_PRIOR), {"gain": "median gain", "snr_50": r"median $\mu^2 / \sigma^2$"}
    with drawing(output, height=11) as figure:
        axes = figure.subplots(len(names), 2, sharey=True)
        for row, name in zip(axes, names, strict=True):
            for panel, (quantity, label) in zip(row, quantities.items(), strict=True):
                draw_heat_map(panel, runs[name].looks, quantity, bar_location="top")
                (mesh,) = panel.collections
                mesh.set_rasterized(True)  # one image for thousands of cells
                mesh.colorbar.set_label(label)
                panel.grid(visible=False)
                panel.set_ylabel("")
                panel.label_outer()
            row[0].set_title(name, loc="left")
            tensors = list(runs[name].looks[0].tensors)
            firsts = [place for place, tensor in enumerate(tensors) if tensor.endswith(" weight") and ", norm" not in tensor]
            row[0].set_yticks([place + 0.5 for place in firsts], [tensors[place].removesuffix(" weight") for place in firsts])


def draw_noise_scales(runs: Mapping[str, Run], output: Path) -> None:
    """Draw the noise scale during trainings in micro-batches, and the measurements at fixed weights."""
    names = (DEFAULT, CONSTANT)
    with drawing(output, height=9.5) as figure:
        axes = figure.subplots(len(names), 1, sharex=True, sharey=True)
        for panel, name in zip(axes, names, strict=True):
            panel.set_prop_cycle(color=[find_colour(name)])
            draw_noise_scale(panel, runs[name].looks, digits.BATCH_SIZE)
            found = [(step, scale) for step, scale in runs[name].held if scale > 0]
            if found:
                label = f"weights held still: positive at {len(found)} of {len(runs[name].held)} steps"
                panel.plot(*zip(*found, strict=True), "o", color=INK, label=label)
            panel.set(title=name, xlim=(0, 1.02 * max(look.step + EVERY for look in runs[name].looks)))
            panel.label_outer()
            gaps = panel.get_legend().get_title().get_text()
            panel.legend(title=gaps, loc="upper left", bbox_to_anchor=(0, -0.15))


def draw_histograms(runs: Mapping[str, Run], output: Path) -> None:
    """Draw the momenta at the end, in the first layers and the last."""
    names = (DEFAULT, WEAK_PRIOR)
    layers = ("patches", "depthwise 1", "pointwise 3", "head")
    with drawing(output, height=7.5) as figure:
        axes = figure.subplots(len(names), 1)
        for panel, name in zip(axes, names, strict=True):
            draw_momenta(panel, {layer: runs[name].gains[layer] for layer in layers}, bins=40)
            panel.set_title(name)


def main() -> None:
    """Run the command line: write the figures and the table."""
    parser = argparse.ArgumentParser(description="Draw the monitor's plots for a training on digits.")
    parser.add_argument("--epochs", type=int, default=20, help="passes over the training data (default: %(default)s)")
    parser.add_argument("--probes", type=int, default=8, help="how often to measure at fixed weights (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder (default: %(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # a second thread gains little on so small a model
    data = digits.load_data()
    runs = {name: train(name, data, arguments.epochs) for name in OPTIMIZERS}
    measured = {name: train(name, data, arguments.epochs, PARTS, arguments.probes) for name in (DEFAULT, CONSTANT)}
    draw_heat_maps(runs, arguments.output / "monitor.svg")
    draw_noise_scales(measured, arguments.output / "monitor_noise_scale.svg")
    draw_histograms(runs, arguments.output / "monitor_momenta.svg")
    text = format_rows(runs)
    (arguments.output / "monitor.txt").write_text(text, encoding="utf-8")
    print(text, end="")


if __name__ == "__main__":
    main()
