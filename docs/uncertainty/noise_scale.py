"""The noise scale that the state tells, beside the two-batch-size estimator and the truth, over a training.

Trains an MLP on scikit-learn's digits and on MNIST-1D (Greydanus, 2020; made on the spot, no download) and writes the tables
`noise_scale.txt` and, of gradients that are clipped, `noise_scale_clipped.txt` for `docs/uncertainty.md`:

    pip install '.[examples]'
    python docs/uncertainty/noise_scale.py
"""

from __future__ import annotations

import argparse
import copy
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional

from vsgd.posterior import NoiseScale
from vsgd.torch import VSGD, ConstantVSGD

BATCH_SIZE = 32
BIG = 8  # times the batch size, for the larger batch of the paper's estimator
PAIRS = 100  # of batches that the paper's estimator averages over, at each look
WINDOW = 100  # steps that numerators and denominators are averaged over
HELD = 500  # steps with the weights held still; the first window of them is left out
LOOKS = 5  # at the training data in a window
CLIPS = (math.inf, 1.0, 0.5, 0.1)  # norms that gradients are clipped to, in medians of a batch's
CLIPPED_AT = (100, 300)  # the steps at which that is tried
PROBES = (100, 300, 1000, 4000)

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "VSGD": VSGD,
    "Constant VSGD": ConstantVSGD,
    "Constant VSGD, lr 0.001": partial(ConstantVSGD, lr=0.001),
}


def digits() -> tuple[Tensor, Tensor]:
    """The 1797 digits of 8x8 pixels, scaled to [-1, 1]."""
    pixels, labels = load_digits(return_X_y=True)
    return torch.tensor(pixels, dtype=torch.float32) / 8 - 1, torch.tensor(labels)


def mnist_1d() -> tuple[Tensor, Tensor]:
    """The 4000 training signals of 40 samples."""
    try:
        from mnist1d.data import get_dataset_args, make_dataset
    except ImportError as error:
        raise SystemExit("MNIST-1D needs mnist1d: pip install '.[examples]', or choose --data digits") from error
    made = make_dataset(get_dataset_args())
    return torch.tensor(made["x"], dtype=torch.float32), torch.tensor(made["y"])


DATA = {"digits": digits, "MNIST-1D": mnist_1d}


def make_model(inputs: int) -> nn.Sequential:
    """A small MLP for ten classes."""
    return nn.Sequential(nn.Linear(inputs, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 10))


def per_example(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The gradient of each example's loss, one row each."""
    weights = {name: param.detach() for name, param in model.named_parameters()}

    def loss(weights: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return functional.cross_entropy(functional_call(model, weights, (x,)), y)

    grads = vmap(grad(loss), in_dims=(None, 0, 0))(weights, x, y)
    return torch.cat([each.flatten(1) for each in grads.values()], dim=1)


def truth(grads: Tensor) -> NoiseScale:
    """The noise scale of the training data as they are."""
    mean = grads.mean(dim=0)
    return NoiseScale((grads - mean).square().sum() / len(grads), mean.square().sum())


def two_batch_sizes(grads: Tensor, generator: torch.Generator) -> NoiseScale:
    """The estimator of arXiv 1812.06162, appendix A, averaged over many pairs of batches."""
    small, big = (
        torch.stack(
            [grads[torch.randint(len(grads), (size,), generator=generator)].mean(0).square().sum() for _ in range(PAIRS)]
        ).mean()
        for size in (BATCH_SIZE, BIG * BATCH_SIZE)
    )
    trace = (small - big) / (1 / BATCH_SIZE - 1 / (BIG * BATCH_SIZE))
    return NoiseScale(trace, (BIG * big - small) / (BIG - 1))


class Row(NamedTuple):
    """What was found up to a step: means of the trace and of the squared norm over the window before it.

    The last two are of the weights after the step alone.
    """

    step: int
    loss: float
    truth: NoiseScale
    pairs: NoiseScale
    state: NoiseScale
    last_truth: NoiseScale
    held: NoiseScale


def mean(scales: Sequence[NoiseScale]) -> NoiseScale:
    """The mean of the estimates, numerator and denominator apart."""
    return NoiseScale(*(torch.stack(parts).mean() for parts in zip(*scales, strict=True)))


def batches(n: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Indices of the mini-batches, in a new order in each epoch, its incomplete last batch dropped."""
    while True:
        yield from torch.randperm(n, generator=generator).split(BATCH_SIZE)[: n // BATCH_SIZE]


def learn(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, clip: float = math.inf) -> NoiseScale:
    """Take a step, its gradient clipped to a norm, and tell the noise scale of the state."""
    optimizer.zero_grad()
    functional.cross_entropy(model(x), y).backward()
    nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    return optimizer.noise_scale(batch_size=len(x)).overall


def held_still(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    generator: torch.Generator,
    batch_size: int = BATCH_SIZE,
    clip: float = math.inf,
) -> NoiseScale:
    """What Constant VSGD tells of weights that it leaves as they are, with next to no prior, of batches drawn independently."""
    model = copy.deepcopy(model)
    optimizer = ConstantVSGD(model.parameters(), lr=0.0, prior_strength=1e-20)
    found = []
    for _ in range(HELD):
        batch = torch.randint(len(x), (batch_size,), generator=generator)
        found.append(learn(model, optimizer, x[batch], y[batch], clip))
    return mean(found[WINDOW:])


def follow(name: str, x: Tensor, y: Tensor, probes: tuple[int, ...], seed: int = 0) -> list[Row]:
    """Train, and compare the estimates at the steps of `probes`."""
    torch.manual_seed(seed)
    generator, other = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed + 1)
    model = make_model(x.shape[1])
    optimizer = OPTIMIZERS[name](model.parameters())
    of_state: deque[NoiseScale] = deque(maxlen=WINDOW)
    of_data: deque[tuple[NoiseScale, NoiseScale]] = deque(maxlen=LOOKS)
    rows = []
    for step, batch in enumerate(islice(batches(len(x), generator), probes[-1]), start=1):
        of_state.append(learn(model, optimizer, x[batch], y[batch]))
        if step in probes or (step % (WINDOW // LOOKS) == 0 and any(0 <= probe - step < WINDOW for probe in probes)):
            grads = per_example(model, x, y)
            of_data.append((truth(grads), two_batch_sizes(grads, other)))
        if step in probes:
            with torch.no_grad():
                loss = functional.cross_entropy(model(x), y).item()
            of_all = map(mean, (*zip(*of_data, strict=True), of_state))
            rows.append(Row(step, loss, *of_all, of_data[-1][0], held_still(model, x, y, other)))
    return rows


def table(found: dict[tuple[str, str], list[Row]]) -> str:
    """One row for each probe, in Markdown."""
    lines = [
        "| data | optimizer | step | loss | truth | two batch sizes | state | trace, state / truth "
        "| squared norm, state / truth | state, held still / truth |",
        "|---|---|" + "---:|" * 8,
    ]
    for (data, name), rows in found.items():
        for row in rows:
            scales = " | ".join(f"{each.scale.item():.3g}" for each in (row.truth, row.pairs, row.state))
            ratios = " | ".join(f"{(ours / true).item():.2g}" for ours, true in zip(row.state, row.truth, strict=True))
            held = (row.held.scale / row.last_truth.scale).item()
            lines.append(f"| {data} | {name} | {row.step} | {row.loss:.2g} | {scales} | {ratios} | {held:.2g} |")
    return "\n".join(lines) + "\n"


def clipped(name: str, x: Tensor, y: Tensor, steps: Sequence[int]) -> Iterator[tuple[int, float, NoiseScale, NoiseScale]]:
    """Step, clip, truth and what is told, the weights held still, of gradients that are clipped."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model = make_model(x.shape[1])
    optimizer = OPTIMIZERS[name](model.parameters())
    for step, batch in enumerate(islice(batches(len(x), generator), max(steps)), start=1):
        learn(model, optimizer, x[batch], y[batch])
        if step in steps:
            grads = per_example(model, x, y)
            picks = torch.randint(len(x), (PAIRS, BATCH_SIZE), generator=generator)
            norm = torch.stack([grads[pick].mean(0).norm() for pick in picks]).median().item()
            for clip in CLIPS:
                yield step, clip, truth(grads), held_still(model, x, y, generator, clip=clip * norm)


def clipped_table(data: Mapping[str, tuple[Tensor, Tensor]], steps: Sequence[int]) -> str:
    """One row for each clip, in Markdown."""
    lines = ["| data | step | clipped to, median norms | trace / truth | squared norm / truth | scale / truth |"]
    lines.append("|---|" + "---:|" * 5)
    for name, examples in data.items():
        for step, clip, exact, found in clipped("Constant VSGD, lr 0.001", *examples, steps):
            parts = (*(ours / true for ours, true in zip(found, exact, strict=True)), found.scale / exact.scale)
            limit = "not" if clip == math.inf else f"{clip:g}"
            lines.append(f"| {name} | {step} | {limit} | {' | '.join(f'{part.item():.2g}' for part in parts)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Make the tables from the command line."""
    parser = argparse.ArgumentParser(description="The noise scale that the state tells, beside the truth.")
    parser.add_argument(
        "--probes", type=int, nargs="+", default=PROBES, help="the steps that are looked at (default: %(default)s)"
    )
    clipping = "steps at which clipping is tried (default: %(default)s)"
    parser.add_argument("--clipped-at", type=int, nargs="+", default=CLIPPED_AT, help=clipping)
    parser.add_argument("--data", nargs="+", choices=DATA, default=list(DATA), help="what is trained on (default: both)")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent, help="folder (default: this file's)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # a second thread gains nothing on so small a model
    probes = tuple(sorted(arguments.probes))
    data = {name: DATA[name]() for name in arguments.data}  # first of all, for what is missing is to be told at once
    found = {(of, name): follow(name, *examples, probes) for of, examples in data.items() for name in OPTIMIZERS}
    tables = {"noise_scale.txt": table(found), "noise_scale_clipped.txt": clipped_table(data, arguments.clipped_at)}
    for name, text in tables.items():
        (arguments.output / name).write_text(text, encoding="utf-8")
    print("\n".join(tables.values()), end="")


if __name__ == "__main__":
    main()
