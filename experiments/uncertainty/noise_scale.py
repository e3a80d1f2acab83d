"""Compare the noise scale in the optimizer's state with the two-batch-size estimator and the truth, over a training.

Trains an MLP on scikit-learn's digits and on MNIST-1D (Greydanus, 2020; made on the spot, no download) and writes the tables
`noise_scale.txt` and, for clipped gradients, `noise_scale_clipped.txt` for `docs/uncertainty.md`:

    pip install '.[examples]'
    python -m experiments.uncertainty.noise_scale
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
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional

from experiments.torch_mlp import BATCH_SIZE, DATA, draw_batches, make_model
from reporting.pages import format_table
from vsgd.posterior import NoiseScale
from vsgd.torch import VSGD, ConstantVSGD

OUTPUT = Path("docs/uncertainty")
BIG = 8  # times the batch size: the larger batch of the paper's estimator
PAIRS = 100  # of batches that each probe averages the paper's estimator over
WINDOW = 100  # steps that numerators and denominators are averaged over
HELD = 500  # steps with fixed weights; the average leaves out the first window
LOOKS = 5  # evaluations on the training data in a window
CLIPS = (math.inf, 1.0, 0.5, 0.1)  # norms to clip gradients to, in medians of a batch's norm
CLIPPED_AT = (100, 300)  # the steps at which to try the clips
PROBES = (100, 300, 1000, 4000)

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "VSGD": VSGD,
    "Constant VSGD": ConstantVSGD,
    "Constant VSGD, lr 0.001": partial(ConstantVSGD, lr=0.001),
}


def compute_example_gradients(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Compute the gradient of each example's loss, one row each."""
    weights = {name: param.detach() for name, param in model.named_parameters()}

    def loss(weights: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return functional.cross_entropy(functional_call(model, weights, (x,)), y)

    grads = vmap(grad(loss), in_dims=(None, 0, 0))(weights, x, y)
    return torch.cat([each.flatten(1) for each in grads.values()], dim=1)


def compute_noise_scale(grads: Tensor) -> NoiseScale:
    """Compute the exact noise scale of the training data from every example's gradient."""
    mean = grads.mean(dim=0)
    return NoiseScale((grads - mean).square().sum() / len(grads), mean.square().sum())


def estimate_from_two_batch_sizes(grads: Tensor, generator: torch.Generator) -> NoiseScale:
    """Estimate the noise scale by arXiv 1812.06162, appendix A, averaged over many pairs of batches."""
    small, big = (
        torch.stack(
            [grads[torch.randint(len(grads), (size,), generator=generator)].mean(0).square().sum() for _ in range(PAIRS)]
        ).mean()
        for size in (BATCH_SIZE, BIG * BATCH_SIZE)
    )
    trace = (small - big) / (1 / BATCH_SIZE - 1 / (BIG * BATCH_SIZE))
    return NoiseScale(trace, (BIG * big - small) / (BIG - 1))


class Row(NamedTuple):
    """Results at a step: loss, and noise scales as the means of trace and squared norm over the window before it.

    `last_truth` and `held` are of the weights after the step alone.
    """

    step: int
    loss: float
    truth: NoiseScale
    pairs: NoiseScale
    state: NoiseScale
    last_truth: NoiseScale
    held: NoiseScale


def average_scales(scales: Sequence[NoiseScale]) -> NoiseScale:
    """Average noise scales, traces and squared norms separately."""
    return NoiseScale(*(torch.stack(parts).mean() for parts in zip(*scales, strict=True)))


def take_step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, clip: float = math.inf) -> NoiseScale:
    """Take a step with the gradient clipped to a norm, and return the noise scale in the optimizer's state."""
    optimizer.zero_grad()
    functional.cross_entropy(model(x), y).backward()
    nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    return optimizer.noise_scale(batch_size=len(x)).overall


def estimate_at_fixed_weights(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    generator: torch.Generator,
    batch_size: int = BATCH_SIZE,
    clip: float = math.inf,
) -> NoiseScale:
    """Estimate the noise scale by Constant VSGD with fixed weights, almost no prior and independent batches."""
    model = copy.deepcopy(model)
    optimizer = ConstantVSGD(model.parameters(), lr=0.0, prior_strength=1e-20)
    found = []
    for _ in range(HELD):
        batch = torch.randint(len(x), (batch_size,), generator=generator)
        found.append(take_step(model, optimizer, x[batch], y[batch], clip))
    return average_scales(found[WINDOW:])


def follow(name: str, x: Tensor, y: Tensor, probes: tuple[int, ...], seed: int = 0) -> list[Row]:
    """Train, and compare the estimates at the steps in `probes`."""
    torch.manual_seed(seed)
    generator, other = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed + 1)
    model = make_model(x.shape[1])
    optimizer = OPTIMIZERS[name](model.parameters())
    of_state: deque[NoiseScale] = deque(maxlen=WINDOW)
    of_data: deque[tuple[NoiseScale, NoiseScale]] = deque(maxlen=LOOKS)
    rows = []
    for step, batch in enumerate(islice(draw_batches(len(x), generator), probes[-1]), start=1):
        of_state.append(take_step(model, optimizer, x[batch], y[batch]))
        if step in probes or (step % (WINDOW // LOOKS) == 0 and any(0 <= probe - step < WINDOW for probe in probes)):
            grads = compute_example_gradients(model, x, y)
            of_data.append((compute_noise_scale(grads), estimate_from_two_batch_sizes(grads, other)))
        if step in probes:
            with torch.no_grad():
                loss = functional.cross_entropy(model(x), y).item()
            of_all = map(average_scales, (*zip(*of_data, strict=True), of_state))
            rows.append(Row(step, loss, *of_all, of_data[-1][0], estimate_at_fixed_weights(model, x, y, other)))
    return rows


def format_rows(found: Mapping[tuple[str, str], Sequence[Row]]) -> str:
    """Format a Markdown table with one row for each probe."""
    scales = ("truth", "two batch sizes", "state")
    ratios = ("trace, state / truth", "squared norm, state / truth", "state, held still / truth")
    rows = []
    for (data, name), results in found.items():
        for row in results:
            cells = [f"{each.scale.item():.3g}" for each in (row.truth, row.pairs, row.state)]
            cells += [f"{(state / true).item():.2g}" for state, true in zip(row.state, row.truth, strict=True)]
            held = (row.held.scale / row.last_truth.scale).item()
            rows.append([data, name, str(row.step), f"{row.loss:.2g}", *cells, f"{held:.2g}"])
    return format_table(["data", "optimizer", "step", "loss", *scales, *ratios], rows, left=2) + "\n"


def follow_clipped(
    name: str, x: Tensor, y: Tensor, steps: Sequence[int]
) -> Iterator[tuple[int, float, NoiseScale, NoiseScale]]:
    """Yield step, clip, exact noise scale, and the estimate at fixed weights from clipped gradients."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model = make_model(x.shape[1])
    optimizer = OPTIMIZERS[name](model.parameters())
    for step, batch in enumerate(islice(draw_batches(len(x), generator), max(steps)), start=1):
        take_step(model, optimizer, x[batch], y[batch])
        if step in steps:
            grads = compute_example_gradients(model, x, y)
            picks = torch.randint(len(x), (PAIRS, BATCH_SIZE), generator=generator)
            norm = torch.stack([grads[pick].mean(0).norm() for pick in picks]).median().item()
            for clip in CLIPS:
                estimate = estimate_at_fixed_weights(model, x, y, generator, clip=clip * norm)
                yield step, clip, compute_noise_scale(grads), estimate


def format_clipped_rows(data: Mapping[str, tuple[Tensor, Tensor]], steps: Sequence[int]) -> str:
    """Format a Markdown table with one row for each clip."""
    rows = []
    for name, examples in data.items():
        for step, clip, exact, found in follow_clipped("Constant VSGD, lr 0.001", *examples, steps):
            parts = (*(estimate / true for estimate, true in zip(found, exact, strict=True)), found.scale / exact.scale)
            limit = "not" if clip == math.inf else f"{clip:g}"
            rows.append([name, str(step), limit, *(f"{part.item():.2g}" for part in parts)])
    heads = ["data", "step", "clipped to, median norms", "trace / truth", "squared norm / truth", "scale / truth"]
    return format_table(heads, rows, left=1) + "\n"


def main() -> None:
    """Write the tables as the command line says."""
    parser = argparse.ArgumentParser(description="Compare the noise scale in the optimizer's state with the truth.")
    parser.add_argument(
        "--probes", type=int, nargs="+", default=PROBES, help="steps at which to compare the estimates (default: %(default)s)"
    )
    clipping = "steps at which to clip gradients (default: %(default)s)"
    parser.add_argument("--clipped-at", type=int, nargs="+", default=CLIPPED_AT, help=clipping)
    parser.add_argument("--data", nargs="+", choices=DATA, default=list(DATA), help="what to train on (default: both)")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder (default: %(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # a second thread gains nothing on so small a model
    probes = tuple(sorted(arguments.probes))
    data = {name: DATA[name]() for name in arguments.data}  # first, so that a missing package is reported at once
    found = {(of, name): follow(name, *examples, probes) for of, examples in data.items() for name in OPTIMIZERS}
    tables = {
        "noise_scale.txt": format_rows(found),
        "noise_scale_clipped.txt": format_clipped_rows(data, arguments.clipped_at),
    }
    for name, text in tables.items():
        (arguments.output / name).write_text(text, encoding="utf-8")
    print("\n".join(tables.values()), end="")


if __name__ == "__main__":
    main()
