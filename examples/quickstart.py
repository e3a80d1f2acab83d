"""VSGD beside AdamW and SGD on real data, and what VSGD learns of its gradients on the way.

Trains a small ConvMixer on scikit-learn's handwritten digits (8x8 pixels, no download), from the same initial weights, on the
same batches, with each optimizer. It prints a table, mean and standard deviation over the seeds, and draws the loss curves
and, layer by layer, VSGD's gain and signal-to-noise ratio:

    pip install 'vsgd[examples]'
    python examples/quickstart.py

TODO learning rates
"""

from __future__ import annotations

import argparse
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
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from vsgd import core
from vsgd.torch import VSGD

BATCH_SIZE = 64
PROBE_EVERY = 5  # steps between two looks at VSGD's state
COMPILING_STEPS = 5  # left out of the step times: the first ones compile or allocate

# Each one's fused kernel, so that step times compare like with like; VSGD picks its own by default.
OPTIMIZERS: dict[str, Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]] = {
    "VSGD": VSGD,
    "AdamW": partial(torch.optim.AdamW, lr=0.003, fused=True),
    "SGD": partial(torch.optim.SGD, lr=0.1, momentum=0.9, fused=True),
}


class Residual(nn.Sequential):
    """Adds its input to what its layers make of it."""

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layers."""
        return x + super().forward(x)


def conv_mixer(width: int = 64, depth: int = 3) -> nn.Sequential:
    """A ConvMixer (Trockman and Kolter, 2022) for 8x8 images in 10 classes, with patches of 2x2 pixels."""

    def activated(convolution: nn.Conv2d) -> list[nn.Module]:
        return [convolution, nn.GELU(), nn.BatchNorm2d(width)]

    layers = activated(nn.Conv2d(1, width, kernel_size=2, stride=2))
    for _ in range(depth):
        layers.append(Residual(*activated(nn.Conv2d(width, width, kernel_size=3, padding=1, groups=width))))
        layers += activated(nn.Conv2d(width, width, kernel_size=1))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


class Digits(NamedTuple):
    """Images and labels, the test part held out."""

    train_x: Tensor
    test_x: Tensor
    train_y: Tensor
    test_y: Tensor


def load_data() -> Digits:
    """The 1797 digits, pixels scaled to [-1, 1], a fifth of each class held out; the same split whatever the seed."""
    pixels, labels = load_digits(return_X_y=True)
    images = torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8) / 8 - 1
    parts = train_test_split(images.numpy(), labels, test_size=0.2, stratify=labels, random_state=0)
    return Digits(*map(torch.from_numpy, parts))


def batches(n: int, epochs: int, seed: int) -> Iterator[Tensor]:
    """Indices of the mini-batches: a new order in each epoch, its incomplete last batch dropped."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        yield from torch.randperm(n, generator=generator).split(BATCH_SIZE)[: n // BATCH_SIZE]


class Probe(NamedTuple):
    """What VSGD believes of one layer's gradient at one step: the medians over its weights."""

    step: int
    layer: str
    gain: float
    snr: float


@dataclass
class Run:
    """What one training left behind."""

    lr: float
    losses: list[float] = field(default_factory=list)
    step_times: list[float] = field(default_factory=list)
    probes: list[Probe] = field(default_factory=list)
    scores: dict[str, float] = field(default_factory=dict)


def train(name: str, seed: int, data: Digits, epochs: int, bar: tqdm[None]) -> Run:
    """Train a new model with the optimizer of this name; equal seeds give equal weights and batches to all of them."""
    torch.manual_seed(seed)
    model = conv_mixer()
    optimizer = OPTIMIZERS[name](model.parameters())
    run = Run(lr=optimizer.defaults["lr"])
    for step, batch in enumerate(batches(len(data.train_x), epochs, seed), start=1):
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(data.train_x[batch]), data.train_y[batch])
        loss.backward()
        start = time.perf_counter()
        optimizer.step()
        run.step_times.append(time.perf_counter() - start)
        run.losses.append(loss.item())
        if isinstance(optimizer, VSGD) and step % PROBE_EVERY == 0:
            run.probes += probe(model, optimizer, step)
        bar.update()
    run.scores = evaluate(model, data)
    return run


def probe(model: nn.Module, optimizer: VSGD, step: int) -> Iterator[Probe]:
    """Read, from the optimizer's state, how each layer's gradient is filtered."""
    for layer, weight in layer_weights(model).items():
        state = optimizer.state[weight]
        gain = state["b_g"] / (state["b_g"] + state["b_ghat"])
        variance = gain * state["b_ghat"] / core.shape(core.Hyperparameters())
        yield Probe(step, layer, gain.median().item(), (state["mu_g"].square() / variance).median().item())


def layer_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights of the convolutions and of the head, by what they do."""
    weights: dict[str, nn.Parameter] = {}
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
    """Loss and accuracy (in percent) on both parts of the data."""
    model.eval()
    scores = {}
    for part, x, y in (("train", data.train_x, data.train_y), ("test", data.test_x, data.test_y)):
        logits = model(x)
        scores[f"{part} loss"] = functional.cross_entropy(logits, y).item()
        scores[f"{part} accuracy"] = 100 * (logits.argmax(1) == y).double().mean().item()
    return scores
