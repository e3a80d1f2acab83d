"""One corrupted batch, with and without `outlier_threshold`: surprise, noise estimate and loss, on real data.

Trains an MLP on scikit-learn's digits, at one step with gradients 10,000 times as large. Draws `outliers.png` and writes the
table `outliers.txt`, both for `docs/uncertainty.md`:

    pip install '.[examples]'
    python docs/uncertainty/outliers.py
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")  # no display needed

import matplotlib.pyplot as plt
import torch
from torch.nn import functional

sys.path.append(str(Path(__file__).parent))

from noise_scale import BATCH_SIZE, batches, digits, make_model

from vsgd.monitor import Look, Monitor
from vsgd.torch import VSGD
from vsgd.torch.monitor import watch

AT = 200  # the step whose batch is corrupted
LATER = (1, 100, 1000)  # so many steps after it, what the table tells
RATES = (0.001, 0.01)


class Arm(NamedTuple):
    """A training.

    Attributes:
        factor: what multiplies the gradients of the corrupted batch.
        lasting: whether it multiplies all later ones too.
        threshold: `outlier_threshold`.
    """

    factor: float = 1.0
    lasting: bool = False
    threshold: float | None = None


UNDISTURBED = "undisturbed"
ARMS = {
    UNDISTURBED: Arm(),
    "one batch x 10,000": Arm(1e4),
    "one batch x 10,000, threshold 5": Arm(1e4, threshold=5.0),
    "undisturbed, threshold 5": Arm(threshold=5.0),
    "all later batches x 10": Arm(10.0, lasting=True),
    "all later batches x 10, threshold 5": Arm(10.0, lasting=True, threshold=5.0),
}


class Run(NamedTuple):
    """What was seen, step by step.

    Attributes:
        looks: before each step but the first.
        losses: on all the data, after each step.
    """

    looks: list[Look]
    losses: list[float]

    def trace(self, step: int) -> float:
        """The noise that the state told after a step."""
        return self.looks[step - 1].overall.noise_trace


def train(arm: Arm, lr: float, steps: int) -> Run:
    """Train, watched at every step."""
    x, y = digits()
    torch.manual_seed(0)
    model = make_model(x.shape[1])
    optimizer = VSGD(model.parameters(), lr=lr, outlier_threshold=arm.threshold)
    order = islice(batches(len(x), torch.Generator().manual_seed(0)), steps + 1)
    run = Run([], [])
    with watch(optimizer, Monitor(run.looks, every=1, smoothing=0), batch_size=BATCH_SIZE):
        for step, batch in enumerate(order, start=1):
            corrupted = step >= AT if arm.lasting else step == AT
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(x[batch]), y[batch]) * (arm.factor if corrupted else 1.0)
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                run.losses.append(functional.cross_entropy(model(x), y).item())
    return run


def table(runs: Mapping[tuple[float, str], Run], later: tuple[int, ...]) -> str:
    """Noise and loss, some steps after the corrupted one, in Markdown."""
    heads = [f"{what}, {count} step{'s' * (count > 1)} later" for what in ("noise / undisturbed", "loss") for count in later]
    lines = [f"| lr | training | {' | '.join(heads)} |", "|---:|---|" + "---:|" * len(heads)]
    for (lr, name), run in runs.items():
        steps = [AT + count for count in later]
        noise = [run.trace(step) / runs[lr, UNDISTURBED].trace(step) for step in steps]
        cells = noise + [run.losses[step - 1] for step in steps]
        lines.append(f"| {lr} | {name} | {' | '.join(f'{cell:.2g}' for cell in cells)} |")
    return "\n".join(lines) + "\n"


# Okabe and Ito's colours, which colour-blind readers tell apart.
STYLES = ({"color": "#BBBBBB", "linewidth": 4}, {"color": "#D55E00", "linewidth": 1}, {"color": "#0072B2", "linewidth": 1})


def draw(runs: Mapping[tuple[float, str], Run], output: Path) -> None:
    """Surprise, noise and loss over the steps, of the first arms at the first learning rate."""
    lr, _ = next(iter(runs))
    figure, axes = plt.subplots(3, 1, figsize=(9, 9), sharex=True, layout="constrained")
    for name, style in zip(ARMS, STYLES, strict=False):
        run = runs[lr, name]
        steps = [look.step for look in run.looks]
        columns = ([look.overall.surprise for look in run.looks], [run.trace(step) for step in steps], run.losses[:-1])
        for panel, values in zip(axes, columns, strict=True):
            panel.plot(steps, values, label=name, **style)
    axes[0].axhline(1, color="grey", linestyle=":", linewidth=1)
    labels = ("surprise before the step\n(dotted: 1, where the model fits)", "noise that the state tells,\ntrace per example")
    for panel, label in zip(axes, (*labels, "loss on all the data"), strict=True):
        panel.set(yscale="log", ylabel=label, xlim=(0, steps[-1]))
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.25)
    axes[0].set_title(f"VSGD on digits, lr {lr}, the batch of step {AT} corrupted")
    axes[0].legend(frameon=False)
    axes[-1].set_xlabel("step")
    figure.savefig(output, dpi=120)
    plt.close(figure)


def main() -> None:
    """Make the figure and the table from the command line."""
    parser = argparse.ArgumentParser(description="One corrupted batch, with and without outlier_threshold.")
    parser.add_argument("--rates", type=float, nargs="+", default=RATES, help="learning rates (default: %(default)s)")
    parser.add_argument("--later", type=int, nargs="+", default=LATER, help="steps after it (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent, help="folder (default: this file's)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # a second thread gains nothing on so small a model
    later = tuple(arguments.later)
    runs = {(lr, name): train(arm, lr, AT + max(later)) for lr in arguments.rates for name, arm in ARMS.items()}
    draw(runs, arguments.output / "outliers.png")
    (arguments.output / "outliers.txt").write_text(table(runs, later), encoding="utf-8")
    print(table(runs, later), end="")


if __name__ == "__main__":
    main()
