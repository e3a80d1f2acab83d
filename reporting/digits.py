"""A small ConvMixer in PyTorch and scikit-learn's digits, for the scripts that watch a real training."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional

BATCH_SIZE = 64


class Residual(nn.Module):
    """Layers with a skip connection: the output is the input plus the layers' output."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """Add the layers' output to the input."""
        return x + self.layers(x)


def make_conv_mixer(width: int = 64, depth: int = 3) -> nn.Sequential:
    """Make a ConvMixer (Trockman and Kolter, 2022) for 8x8 images in 10 classes, with patches of 2x2 pixels."""

    def add_activation(convolution: nn.Conv2d) -> list[nn.Module]:
        return [convolution, nn.GELU(), nn.BatchNorm2d(width)]

    layers = add_activation(nn.Conv2d(1, width, kernel_size=2, stride=2))
    for _ in range(depth):
        layers.append(Residual(*add_activation(nn.Conv2d(width, width, kernel_size=3, padding=1, groups=width))))
        layers += add_activation(nn.Conv2d(width, width, kernel_size=1))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


class Digits(NamedTuple):
    """Images and labels of the training part and of the test part."""

    train_x: Tensor
    test_x: Tensor
    train_y: Tensor
    test_y: Tensor


def load_data() -> Digits:
    """Load the 1797 digits with pixels scaled to [-1, 1]; a fifth of each class is the test part, the same for every seed."""
    pixels, labels = load_digits(return_X_y=True)
    images = torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8) / 8 - 1
    parts = train_test_split(images.numpy(), labels, test_size=0.2, stratify=labels, random_state=0)
    return Digits(*map(torch.from_numpy, parts))


def draw_batches(n: int, epochs: int, seed: int) -> Iterator[Tensor]:
    """Yield the indices of the mini-batches: a new order in each epoch, without its incomplete last batch."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        yield from torch.randperm(n, generator=generator).split(BATCH_SIZE)[: n // BATCH_SIZE]


def list_layer_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return the weights of the convolutions and of the head by their role."""
    weights: dict[str, Tensor] = {}
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
    """Compute loss and accuracy (in percent) on both parts of the data."""
    model.eval()
    scores = {}
    for part, x, y in (("train", data.train_x, data.train_y), ("test", data.test_x, data.test_y)):
        logits = model(x)
        scores[f"{part} loss"] = functional.cross_entropy(logits, y).item()
        scores[f"{part} accuracy"] = 100 * (logits.argmax(1) == y).double().mean().item()
    return scores
