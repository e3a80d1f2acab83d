"""Compare the noise scale in the optimizer's state with the truth, in a training and with the weights held still.

Trains an MLP on scikit-learn's digits and on MNIST-1D (Greydanus, 2020; made on the spot, no download) and writes the table
`noise_scale.txt` for `docs/uncertainty.md`:

    pip install '.[examples]'
    python -m experiments.uncertainty.noise_scale
"""

from __future__ import annotations

import argparse
import copy
from collections import deque
from collections.abc import Callable, Mapping, Sequence
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
WINDOW = 100  # steps that numerators and denominators are averaged over
HELD = 500  # steps with fixed weights; the average leaves out the first window
LOOKS = 5  # evaluations on the training data in a window
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


class Row(NamedTuple):
    """Results at a step: loss, and noise scales as the means of trace and squared norm over the window before it.

    `last_truth` and `held` are of the weights after the step alone.
    """

    step: int
    loss: float
    truth: NoiseScale
    state: NoiseScale
    last_truth: NoiseScale
    held: NoiseScale


def average_scales(scales: Sequence[NoiseScale]) -> NoiseScale:
    """Average noise scales, traces and squared norms separately."""
    return NoiseScale(*(torch.stack(parts).mean() for parts in zip(*scales, strict=True)))


def take_step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> NoiseScale:
    """Take a step, and return the noise scale in the optimizer's state."""
    optimizer.zero_grad()
    functional.cross_entropy(model(x), y).backward()
    optimizer.step()
    return optimizer.noise_scale(batch_size=len(x)).overall


def estimate_at_fixed_weights(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    generator: torch.Generator,
    batch_size: int = BATCH_SIZE,
) -> NoiseScale:
    """Estimate the noise scale by Constant VSGD with fixed weights, almost no prior and independent batches."""
    model = copy.deepcopy(model)
    optimizer = ConstantVSGD(model.parameters(), lr=0.0, prior_strength=1e-20)
    found = []
    for _ in range(HELD):
        batch = torch.randint(len(x), (batch_size,), generator=generator)
        found.append(take_step(model, optimizer, x[batch], y[batch]))
    return average_scales(found[WINDOW:])


def follow(name: str, x: Tensor, y: Tensor, probes: tuple[int, ...], seed: int = 0) -> list[Row]:
    """Train, and compare the estimates at the steps in `probes`."""
    torch.manual_seed(seed)
    generator, other = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed + 1)
    model = make_model(x.shape[1])
    optimizer = OPTIMIZERS[name](model.parameters())
    of_state: deque[NoiseScale] = deque(maxlen=WINDOW)
    of_data: deque[NoiseScale] = deque(maxlen=LOOKS)
    rows = []
    for step, batch in enumerate(islice(draw_batches(len(x), generator), probes[-1]), start=1):
        of_state.append(take_step(model, optimizer, x[batch], y[batch]))
        if step in probes or (step % (WINDOW // LOOKS) == 0 and any(0 <= probe - step < WINDOW for probe in probes)):
            of_data.append(compute_noise_scale(compute_example_gradients(model, x, y)))
        if step in probes:
            with torch.no_grad():
                loss = functional.cross_entropy(model(x), y).item()
            held = estimate_at_fixed_weights(model, x, y, other)
            rows.append(Row(step, loss, average_scales(of_data), average_scales(of_state), of_data[-1], held))
    return rows


def format_rows(found: Mapping[tuple[str, str], Sequence[Row]]) -> str:
    """Format a Markdown table with one row for each probe."""
    heads = ["data", "optimizer", "step", "loss", "truth", "trace, in training / truth", "squared norm, in training / truth"]
    rows = []
    for (data, name), results in found.items():
        for row in results:
            ratios = [state / true for state, true in zip(row.state, row.truth, strict=True)]
            cells = [f"{ratio.item():.2g}" for ratio in (*ratios, row.held.scale / row.last_truth.scale)]
            rows.append([data, name, str(row.step), f"{row.loss:.2g}", f"{row.truth.scale.item():.3g}", *cells])
    return format_table([*heads, "scale, held still / truth"], rows, left=2) + "\n"


def main() -> None:
    """Run the command line: write the table."""
    parser = argparse.ArgumentParser(description="Compare the noise scale in the optimizer's state with the truth.")
    parser.add_argument(
        "--probes", type=int, nargs="+", default=PROBES, help="steps at which to compare the estimates (default: %(default)s)"
    )
    parser.add_argument("--data", nargs="+", choices=DATA, default=list(DATA), help="what to train on (default: both)")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder (default: %(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # a second thread gains nothing on so small a model
    probes = tuple(sorted(arguments.probes))
    data = {name: DATA[name]() for name in arguments.data}  # first, so that a missing package is reported at once
    found = {(of, name): follow(name, *examples, probes) for of, examples in data.items() for name in OPTIMIZERS}
    table = format_rows(found)
    (arguments.output / "noise_scale.txt").write_text(table, encoding="utf-8")
    print(table, end="")


if __name__ == "__main__":
    main()
