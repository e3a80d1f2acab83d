"""Compare the noise scale that `NoiseScaleMeter` measures during training with the truth from all examples.

Trains an MLP on MNIST-1D (Greydanus, 2020; made on the spot) and a transformer on the characters of Python's help, by AdamW
with four micro-batches a step. Writes `noise_scale_training.txt` and `noise_scale_windows.txt` for `docs/uncertainty.md`:

    pip install '.[examples]'
    python -m experiments.uncertainty.noise_scale_training
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from math import sqrt
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from experiments import tasks
from experiments.torch_mlp import make_mnist_1d, make_model
from experiments.uncertainty.noise_scale import compute_example_gradients
from reporting.pages import format_table
from vsgd.monitor.noise_scale import MeasuredNoiseScale
from vsgd.posterior import NoiseScale
from vsgd.torch.noise_scale import NoiseScaleMeter

OUTPUT = Path("docs/uncertainty")
PARTS, MICRO_BATCH_SIZE = 4, 16
LONG, SHORT = 400, 100  # steps to average over
CONTEXT, WINDOWS = 32, 1000  # characters in a window, and the windows to train on
CHUNK = 250  # examples whose gradients are in memory at once


class Transformer(nn.Module):
    """A causal transformer of two blocks that returns the logits of the next character at each place."""

    def __init__(self, characters: int, width: int = 32) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, width)
        self.positions = nn.Parameter(0.02 * torch.randn(CONTEXT, width))
        block = partial(nn.TransformerEncoderLayer, width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.blocks = nn.ModuleList(block() for _ in range(2))
        self.head = nn.Linear(width, characters)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(CONTEXT))

    def forward(self, x: Tensor) -> Tensor:
        """Return a row for each place of each window.

        Args:
            x: windows of characters, or a single one.
        """
        y = self.embedding(x) + self.positions
        for block in self.blocks:
            y = block(y, src_mask=self.mask)
        return self.head(y).flatten(0, -2)


class Training(NamedTuple):
    """A model, its examples, and how it is trained.

    Attributes:
        model: the model.
        x: the inputs of all examples.
        y: their targets.
        lr: AdamW's learning rate.
        steps: the number of steps.
        every: the number of steps between two truths.
        in_epochs: whether batches are drawn without replacement.
    """

    model: nn.Module
    x: Tensor
    y: Tensor
    lr: float
    steps: int
    every: int
    in_epochs: bool = False

    def draw_batches(self) -> Iterator[Tensor]:
        """Yield the indices of the examples of each step, a row for each micro-batch."""
        size = PARTS * MICRO_BATCH_SIZE
        while True:
            order = torch.randperm(len(self.x)) if self.in_epochs else torch.randint(len(self.x), (size,))
            for batch in order.split(size)[: len(order) // size]:
                yield batch.view(PARTS, MICRO_BATCH_SIZE)


def make_mlp_training(in_epochs: bool = False) -> Training:
    """Make the training of an MLP on MNIST-1D."""
    x, y = make_mnist_1d()
    return Training(make_model(x.shape[1]), x, y, lr=0.003, steps=2400, every=5, in_epochs=in_epochs)


def make_transformer_training() -> Training:
    """Make the training of a transformer on characters."""
    characters = {character: place for place, character in enumerate(tasks.list_characters())}
    text = torch.tensor([characters[each] for each in tasks.read_text()[: WINDOWS * (CONTEXT + 1)]]).view(WINDOWS, -1)
    return Training(Transformer(len(characters)), text[:, :-1], text[:, 1:], lr=0.003, steps=1200, every=4)


def compute_loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Compute the mean loss of examples."""
    return functional.cross_entropy(model(x), y.flatten())


@sdpa_kernel(SDPBackend.MATH)  # `vmap` has no rule for the others
def compute_truth(training: Training) -> NoiseScale:
    """Compute the noise scale of the training data from the gradient of each example."""
    total, squares = 0.0, 0.0
    for x, y in zip(training.x.split(CHUNK), training.y.split(CHUNK), strict=True):
        grads = compute_example_gradients(training.model, x, y)
        total, squares = total + grads.sum(0), squares + grads.square().sum().item()
    squared_norm = (total / len(training.x)).square().sum().item()
    return NoiseScale(squares / len(training.x) - squared_norm, squared_norm)


class Look(NamedTuple):
    """What the meter reports of some steps, and the truth.

    Attributes:
        step: the last step.
        loss: of all examples, at this step.
        truth: the truth of these steps, traces and squared norms averaged separately.
        measured: the meter's report.
    """

    step: int
    loss: float
    truth: float
    measured: MeasuredNoiseScale

    @property
    def ratio(self) -> float:
        """The measured noise scale over the truth."""
        return self.measured.scale / self.truth

    @property
    def error(self) -> float:
        """The standard error of `ratio`."""
        return self.measured.error / self.truth


def follow(training: Training, windows: Sequence[int] = (LONG, SHORT)) -> dict[int, list[Look]]:
    """Train, and look at the end of each window."""
    model = training.model
    optimizer = torch.optim.AdamW(model.parameters(), lr=training.lr)
    meters = {window: NoiseScaleMeter(optimizer, micro_batch_size=MICRO_BATCH_SIZE, window=window) for window in windows}
    found: dict[int, list[Look]] = {window: [] for window in windows}
    truths: list[NoiseScale] = []
    for step, batch in zip(range(1, training.steps + 1), training.draw_batches(), strict=False):
        if step % training.every == 0:  # at the weights of this step's gradients
            truths.append(compute_truth(training))
        optimizer.zero_grad()
        for part in batch:
            (compute_loss(model, training.x[part], training.y[part]) / PARTS).backward()
        optimizer.step()
        for window, meter in meters.items():
            if step % window == 0:
                trace, squared_norm = map(fmean, zip(*truths[-(window // training.every) :], strict=True))
                with torch.no_grad():
                    loss = compute_loss(model, training.x, training.y).item()
                found[window].append(Look(step, loss, trace / squared_norm, meter.read()))
    return found


TRAININGS: dict[str, Callable[..., Training]] = {
    "MLP, batches drawn independently": make_mlp_training,
    "MLP, batches in epochs": partial(make_mlp_training, in_epochs=True),
    "transformer, batches drawn independently": make_transformer_training,
}


def format_looks(found: Mapping[str, Mapping[int, Sequence[Look]]]) -> str:
    """Format a Markdown table with a row for each long window, and the short one at its end."""
    rows = []
    for name, looks in found.items():
        last = {look.step: look for look in looks[SHORT]}
        for look in looks[LONG]:
            ratios = (f"{each.ratio:.2f} ± {each.error:.2f}" for each in (look, last[look.step]))
            rows.append([name, str(look.step), f"{look.loss:.2g}", f"{look.truth:.0f}", *ratios])
    heads = ["training", "step", "loss", f"truth, {LONG} steps", f"measured / truth, {LONG} steps", f"last {SHORT} steps"]
    return format_table(heads, rows, left=1) + "\n"


def format_windows(found: Mapping[str, Mapping[int, Sequence[Look]]]) -> str:
    """Format a Markdown table of how far all windows are from the truth, also in standard errors."""
    rows = []
    for name, windows in found.items():
        for window, looks in windows.items():
            ratios, errors = [look.ratio for look in looks], [(look.ratio - 1) / look.error for look in looks]
            spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
            within = sum(abs(error) <= 2 for error in errors)
            size = sqrt(fmean(error**2 for error in errors))
            rows.append([name, str(window), spread, f"{within} of {len(looks)}", f"{size:.2f}"])
    heads = ["training", "steps", "measured / truth", "within 2 standard errors", "error in standard errors, root mean square"]
    return format_table(heads, rows, left=1) + "\n"


def main() -> None:
    """Run the command line: write the tables."""
    parser = argparse.ArgumentParser(description="Compare the noise scale that is measured during training with the truth.")
    parser.add_argument("--steps", type=int, help="of each training (default: 2400 of the MLP, 1200 of the transformer)")
    parser.add_argument(
        "--trainings", nargs="+", choices=TRAININGS, default=list(TRAININGS), help="which to run (default: all)"
    )
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder (default: %(default)s)")
    arguments = parser.parse_args()
    if arguments.steps is not None and arguments.steps < LONG:
        parser.error(f"--steps is {arguments.steps}, but must be at least {LONG}")
    torch.set_num_threads(1)  # a second thread gains little on so small models
    found = {}
    for name in arguments.trainings:
        torch.manual_seed(0)
        training = TRAININGS[name]()
        found[name] = follow(training._replace(steps=arguments.steps or training.steps))
    tables = {"noise_scale_training.txt": format_looks(found), "noise_scale_windows.txt": format_windows(found)}
    for name, text in tables.items():
        (arguments.output / name).write_text(text, encoding="utf-8")
    print("\n".join(tables.values()), end="")


if __name__ == "__main__":
    main()
