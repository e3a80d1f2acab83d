"""Train on one corrupted batch, with and without `outlier_threshold`: surprise, noise estimate and loss, on real data.

Trains an MLP on scikit-learn's digits, at one step with gradients 10,000 times as large. Draws `outliers.svg` and writes the
table `outliers.txt`, both for `docs/uncertainty.md`:

    pip install '.[examples]'
    python -m experiments.uncertainty.outliers
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.nn import functional

from experiments.torch_mlp import BATCH_SIZE, draw_batches, load_digits, make_model
from reporting.pages import format_table
from reporting.plots import INK, OPTIMIZERS, drawing
from vsgd.monitor import Look, Monitor
from vsgd.torch import VSGD
from vsgd.torch.monitor import watch

OUTPUT = Path("docs/uncertainty")
AT = 200  # the step whose batch is corrupted
LATER = (1, 100, 1000)  # how many steps after it the table reports
RATES = (0.001, 0.01)


class Arm(NamedTuple):
    """Settings of a training.

    Attributes:
        factor: multiplies the gradients of the corrupted batch.
        lasting: whether the factor also multiplies all later ones.
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
    """Measurements of a training, step by step.

    Attributes:
        looks: before each step but the first.
        losses: on all the data, after each step.
    """

    looks: list[Look]
    losses: list[float]

    def trace(self, step: int) -> float:
        """Return the noise estimate in the optimizer's state after a step."""
        return self.looks[step - 1].overall.noise_trace


def train(arm: Arm, lr: float, steps: int) -> Run:
    """Train, with a monitor that looks at every step."""
    x, y = load_digits()
    torch.manual_seed(0)
    model = make_model(x.shape[1])
    optimizer = VSGD(model.parameters(), lr=lr, outlier_threshold=arm.threshold)
    order = islice(draw_batches(len(x), torch.Generator().manual_seed(0)), steps + 1)
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


def format_rows(runs: Mapping[tuple[float, str], Run], later: Sequence[int]) -> str:
    """Format a Markdown table of noise and loss, some steps after the corrupted one."""
    heads = [f"{what}, {count} step{'s' * (count > 1)} later" for what in ("noise / undisturbed", "loss") for count in later]
    rows = []
    for (lr, name), run in runs.items():
        steps = [AT + count for count in later]
        noise = [run.trace(step) / runs[lr, UNDISTURBED].trace(step) for step in steps]
        cells = noise + [run.losses[step - 1] for step in steps]
        rows.append([str(lr), name, *(f"{cell:.2g}" for cell in cells)])
    return format_table(["lr", "training", *heads], rows, left=2) + "\n"


STYLES: tuple[dict[str, Any], ...] = (
    {"color": INK, "linewidth": 4, "alpha": 0.6},
    {"color": OPTIMIZERS["VSGD"], "linewidth": 1, "linestyle": "dotted"},
    {"color": OPTIMIZERS["VSGD"], "linewidth": 1},
)


def draw_runs(runs: Mapping[tuple[float, str], Run], output: Path) -> None:
    """Draw surprise, noise and loss over the steps, for the first arms at the first learning rate."""
    lr, _ = next(iter(runs))
    with drawing(output, height=9) as figure:
        axes = figure.subplots(3, 1, sharex=True)
        for name, style in zip(ARMS, STYLES, strict=False):
            run = runs[lr, name]
            steps = [look.step for look in run.looks]
            columns = ([look.overall.surprise for look in run.looks], [run.trace(step) for step in steps], run.losses[:-1])
            for panel, values in zip(axes, columns, strict=True):
                panel.plot(steps, values, label=name, **style)
        axes[0].axhline(1, color=INK, linestyle="dashed", linewidth=1)
        titles = ("surprise before the step (dashed: expected)", "noise estimate, trace per example", "loss on all the data")
        for panel, title in zip(axes, titles, strict=True):
            panel.set(yscale="log", title=title, xlim=(0, steps[-1]))
        axes[-1].set_xlabel("step")
        title = f"VSGD on digits, lr {lr}, batch {AT} corrupted"
        figure.legend(handles=axes[0].get_legend_handles_labels()[0], title=title, loc="outside lower center")


def main() -> None:
    """Run the command line: write the figure and the table."""
    parser = argparse.ArgumentParser(description="Train on one corrupted batch, with and without outlier_threshold.")
    parser.add_argument("--rates", type=float, nargs="+", default=RATES, help="learning rates (default: %(default)s)")
    parser.add_argument("--later", type=int, nargs="+", default=LATER, help="steps after it (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder (default: %(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # a second thread gains nothing on so small a model
    runs = {(lr, name): train(arm, lr, AT + max(arguments.later)) for lr in arguments.rates for name, arm in ARMS.items()}
    draw_runs(runs, arguments.output / "outliers.svg")
    text = format_rows(runs, arguments.later)
    (arguments.output / "outliers.txt").write_text(text, encoding="utf-8")
    print(text, end="")


if __name__ == "__main__":
    main()
