"""Measure how honest the gradient observer is: on synthetic streams, and over trainings by four optimizers.

Writes the tables `observer_streams.txt` and `observer_trainings.txt` for `docs/uncertainty.md`:

    pip install '.[examples]'
    python -m experiments.uncertainty.observer
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import vsgd.numpy
from experiments.torch_mlp import make_mnist_1d, make_model
from experiments.uncertainty.forgetting import LEVEL, SETTLED, Look
from experiments.uncertainty.noise_scale_training import compute_loss, make_transformer_training
from reporting import digits
from reporting.pages import format_table
from vsgd import observer
from vsgd.observer import Hyperparameters, State
from vsgd.posterior import Posterior
from vsgd.torch import VSGD, ConstantVSGD, GradientObserver

Array = NDArray[np.float64]

OUTPUT = Path("docs/uncertainty")
LEVELS = (0.5, 0.9, 0.99)

# Synthetic streams

STREAM_STEPS, STREAM_ELEMENTS = 40_000, 1200
#: Variances of drift over noise, from one of these numbers to the next.
DRIFTS = {"slow": (1e-4, 2e-3), "middle": (2e-3, 5e-2), "fast": (5e-2, 1.0)}


class ObservedStream:
    """The observer on NumPy, with the methods that VSGD's optimizers have."""

    def __init__(self, elements: int) -> None:
        self.update = observer.make_update(np)
        self.state = State(*(np.full(elements, value) for value in observer.INITIAL_STATE))
        self.count = 0

    def step(self, grads: Sequence[Array]) -> None:
        """Observe one gradient."""
        self.count += 1
        self.state = self.update(grads[0], self.state, observer.compute_coefficients(self.count, Hyperparameters()))

    def posterior(self, index: int) -> Posterior:
        """Return the posterior of the gradient."""
        return observer.compute_posterior(self.state)


def hold_still(make: Callable[..., vsgd.numpy.VSGD | vsgd.numpy.ConstantVSGD], elements: int) -> vsgd.numpy._RuleOptimizer:
    """Return an optimizer that only filters."""
    return make([np.zeros(elements)], lr=0.0)


STREAM_FILTERS: dict[str, Callable[[int], ObservedStream | vsgd.numpy._RuleOptimizer]] = {
    "GradientObserver": ObservedStream,
    "Constant VSGD, floor 0.01": partial(hold_still, partial(vsgd.numpy.ConstantVSGD, forgetting_floor=0.01)),
    "Constant VSGD": partial(hold_still, vsgd.numpy.ConstantVSGD),
    "VSGD": partial(hold_still, vsgd.numpy.VSGD),
}


class StreamResult(NamedTuple):
    """Averages over the second half of a stream, for elements of one kind.

    Attributes:
        covered: for each level, the share of intervals that contain the true gradient.
        noise: the noise variance over the true one.
        error: the squared error of the mean over that of the Kalman filter that has the variances.
    """

    covered: Array
    noise: float
    error: float


def follow_streams(steps: int = STREAM_STEPS, seed: int = 0) -> dict[tuple[str, str], StreamResult]:
    """Filter random walks with noise, each element with its own drift and scale, by all filters."""
    rng = np.random.default_rng(seed)
    each = STREAM_ELEMENTS // len(DRIFTS)
    drift = np.exp(np.concatenate([rng.uniform(*np.log(bounds), each) for bounds in DRIFTS.values()]))
    scale = 10 ** rng.uniform(-3, 0, STREAM_ELEMENTS)
    gain = (-drift + np.sqrt(drift**2 + 4 * drift)) / 2  # of the stationary Kalman filter
    filters = {name: make(STREAM_ELEMENTS) for name, make in STREAM_FILTERS.items()}
    widths = np.array([[NormalDist().inv_cdf((1 + level) / 2)] for level in LEVELS])
    truth, kalman, least = (np.zeros(STREAM_ELEMENTS) for _ in range(3))
    sums = {name: np.zeros((len(LEVELS) + 2, STREAM_ELEMENTS)) for name in filters}
    for step in range(1, steps + 1):
        truth += scale * np.sqrt(drift) * rng.standard_normal(STREAM_ELEMENTS)
        grad = truth + scale * rng.standard_normal(STREAM_ELEMENTS)
        kalman += gain * (grad - kalman)
        for filtering in filters.values():
            filtering.step([grad])
        if step <= steps // 2:
            continue
        least += ((kalman - truth) / scale) ** 2
        for name, filtering in filters.items():
            found = filtering.posterior(0)
            error = np.abs(found.mean - truth)
            sums[name] += np.vstack(
                [error <= widths * np.sqrt(found.variance), found.noise_variance / scale**2, (error / scale) ** 2]
            )
    results = {}
    for name, total in sums.items():
        for place, kind in enumerate(DRIFTS):
            part = slice(place * each, (place + 1) * each)
            *covered, noise, error = (total[:, part] / (steps - steps // 2)).mean(axis=1)
            results[name, kind] = StreamResult(np.array(covered), noise, error / (least[part] / (steps - steps // 2)).mean())
    return results


def format_streams(results: Mapping[tuple[str, str], StreamResult]) -> str:
    """Format a Markdown table with a row for each filter and kind of elements."""
    rows = [
        [name, kind, *(f"{share:.1%}" for share in each.covered), f"{each.noise:.3g}", f"{each.error:.3g}"]
        for (name, kind), each in results.items()
    ]
    levels = [f"{level:.0%} interval covers" for level in LEVELS]
    return format_table(["filter", "drift", *levels, "noise / truth", "squared error / best"], rows, left=2) + "\n"


# Trainings

STEPS, EVERY = 3000, 300
#: The bars that a training passes at every look.
COVER_BAR, NOISE_BAR = (0.85, 0.96), (0.7, 1.4)


class Network(NamedTuple):
    """A network and its examples.

    Attributes:
        model: the network.
        x: the inputs of all examples.
        y: their targets.
        batch_size: examples in a batch.
        epochs: how many epochs the truth averages; one is exact unless examples of a batch act on one another.
    """

    model: nn.Module
    x: Tensor
    y: Tensor
    batch_size: int
    epochs: int = 1

    def draw_epoch(self) -> Iterator[Tensor]:
        """Yield the indices of each batch of an epoch."""
        yield from torch.randperm(len(self.x)).split(self.batch_size)[: len(self.x) // self.batch_size]


def make_mlp() -> Network:
    """Make the MLP on MNIST-1D."""
    x, y = make_mnist_1d()
    return Network(make_model(x.shape[1]), x, y, batch_size=32)


def make_cnn() -> Network:
    """Make a network of three convolutions on MNIST-1D."""
    x, y = make_mnist_1d()
    layers: list[nn.Module] = []
    for channels, size in ((1, 5), (25, 3), (25, 3)):
        layers += [nn.Conv1d(channels, 25, size, stride=2, padding=size // 2), nn.ReLU()]
    return Network(nn.Sequential(*layers, nn.Flatten(), nn.Linear(125, 10)), x[:, None], y, batch_size=50)


def make_conv_mixer() -> Network:
    """Make a ConvMixer on digits, whose batch normalization lets the examples of a batch act on one another."""
    data = digits.load_data()
    return Network(digits.make_conv_mixer(width=32, depth=2), data.train_x, data.train_y, batch_size=64, epochs=10)


def make_transformer() -> Network:
    """Make a transformer on characters."""
    made = make_transformer_training()
    return Network(made.model, made.x, made.y, batch_size=8)


NETWORKS = {
    "MNIST-1D, MLP": make_mlp,
    "MNIST-1D, CNN": make_cnn,
    "digits, ConvMixer": make_conv_mixer,
    "characters, transformer": make_transformer,
}
#: Each optimizer with its constant rate, and the one from which a cosine falls to zero.
OPTIMIZERS: dict[str, tuple[Callable[..., torch.optim.Optimizer], float, float]] = {
    "AdamW": (torch.optim.AdamW, 0.003, 0.01),
    "SGD with momentum": (partial(torch.optim.SGD, momentum=0.9), 0.02, 0.05),
    "VSGD": (VSGD, 0.008, 0.016),
    "Constant VSGD": (ConstantVSGD, 0.008, 0.016),
}


def compute_gradient(network: Network, batch: Tensor) -> None:
    """Compute the gradient of a batch into the parameters."""
    network.model.zero_grad()
    compute_loss(network.model, network.x[batch], network.y[batch]).backward()


def compute_truth(network: Network) -> tuple[list[Tensor], float]:
    """Compute the mean gradient over batches, and the sum of the variances of a batch's gradient around it."""
    params = list(network.model.parameters())
    total, squares, count = [torch.zeros_like(param) for param in params], 0.0, 0
    for _ in range(network.epochs):
        for batch in network.draw_epoch():
            compute_gradient(network, batch)
            grads = [param.grad for param in params if param.grad is not None]
            torch._foreach_add_(total, grads)
            squares += sum(grad.square().sum().item() for grad in grads)
            count += 1
    mean = [each / count for each in total]
    # The batches of one epoch are their own mean's, which takes one of their degrees of freedom.
    return mean, (squares - count * sum(each.square().sum().item() for each in mean)) / (count - 1)


def follow_training(network_name: str, optimizer_name: str, falls: bool, steps: int = STEPS, seed: int = 0) -> list[Look]:
    """Train a network, and compare the observer with the truth at equal distances."""
    torch.set_num_threads(1)  # small networks gain nothing from a second one
    torch.manual_seed(seed)
    network = NETWORKS[network_name]()
    make, constant, high = OPTIMIZERS[optimizer_name]
    lr = high if falls else constant
    optimizer = make(network.model.parameters(), lr=lr)
    watching = GradientObserver(network.model.named_parameters())
    looks = []
    batches = itertools.chain.from_iterable(network.draw_epoch() for _ in itertools.count())
    for step, batch in enumerate(itertools.islice(batches, steps), start=1):
        if falls:
            optimizer.param_groups[0]["lr"] = lr * (1 + math.cos(math.pi * (step - 1) / steps)) / 2
        compute_gradient(network, batch)
        watching.observe()
        grads = [param.grad for param in network.model.parameters()]
        if step % EVERY == 0 and step > SETTLED:  # at the weights of the last gradient
            looks.append(look_at(watching, network, step))
        for param, grad in zip(network.model.parameters(), grads, strict=True):
            param.grad = grad
        optimizer.step()
    return looks


def look_at(watching: GradientObserver, network: Network, step: int) -> Look:
    """Compare the observer's posterior with the true gradient and noise."""
    truth, noise = compute_truth(network)
    bound = NormalDist().inv_cdf((1 + LEVEL) / 2)
    estimate, covered = 0.0, []
    for param, mean in zip(network.model.parameters(), truth, strict=True):
        found = watching.posterior(param)
        estimate += found.noise_variance.sum().item()
        covered.append(((found.mean - mean).abs() <= bound * found.variance.sqrt()).ravel())
    return Look(step, estimate / noise, torch.cat(covered).double().mean().item())


def format_looks(found: Mapping[tuple[str, str, bool], Sequence[Look]]) -> str:
    """Format a Markdown table with a row for each training."""
    rows = []
    for (network, optimizer, falls), looks in found.items():
        shares, noises = [look.covered for look in looks], [look.noise for look in looks]
        passes = all(
            low <= each <= high for (low, high), column in ((COVER_BAR, shares), (NOISE_BAR, noises)) for each in column
        )
        spread = [f"{100 * min(shares):.0f} to {100 * max(shares):.0f}", f"{min(noises):.2f} to {max(noises):.2f}"]
        _, constant, high = OPTIMIZERS[optimizer]
        rate = f"cosine from {high}" if falls else f"constant {constant}"
        rows.append([network, optimizer, rate, *spread, "yes" if passes else "no"])
    heads = ["network", "optimizer", "rate", "90% interval covers, %", "noise / truth", "within the bars"]
    return format_table(heads, rows, left=3) + "\n"


def main() -> None:
    """Run the command line: write the tables."""
    parser = argparse.ArgumentParser(description="Compare the gradient observer with the truth.")
    parser.add_argument("--steps", type=int, default=STEPS, help="of each training (default: %(default)s)")
    parser.add_argument("--stream-steps", type=int, default=STREAM_STEPS, help="of the streams (default: %(default)s)")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS), help="(default: all)")
    parser.add_argument("--processes", type=int, default=2, help="that train (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder (default: %(default)s)")
    arguments = parser.parse_args()
    streams = format_streams(follow_streams(arguments.stream_steps))
    (arguments.output / "observer_streams.txt").write_text(streams, encoding="utf-8")
    print(streams, end="", flush=True)
    keys = list(itertools.product(arguments.networks, OPTIMIZERS, (False, True)))
    with ProcessPoolExecutor(arguments.processes) as pool:
        looks = pool.map(partial(follow_training, steps=arguments.steps), *zip(*keys, strict=True))
        table = format_looks(dict(zip(keys, looks, strict=True)))
    (arguments.output / "observer_trainings.txt").write_text(table, encoding="utf-8")
    print(table, end="")


if __name__ == "__main__":
    main()
