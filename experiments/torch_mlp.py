"""A small MLP in PyTorch, its data and its mini-batches, for the scripts on uncertainty and on priors."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from sklearn import datasets
from torch import Tensor, nn

BATCH_SIZE = 32


def load_digits() -> tuple[Tensor, Tensor]:
    """Load scikit-learn's 1797 digits of 8x8 pixels, scaled to [-1, 1], and their labels."""
    pixels, labels = datasets.load_digits(return_X_y=True)
    return torch.tensor(pixels, dtype=torch.float32) / 8 - 1, torch.tensor(labels)


def make_mnist_1d() -> tuple[Tensor, Tensor]:
    """Make MNIST-1D's 4000 training signals of 40 samples (Greydanus, 2020) and their labels.

    Raises:
        SystemExit: the package mnist1d is missing.
    """
    try:
        from mnist1d.data import get_dataset_args, make_dataset
    except ImportError as error:
        raise SystemExit("MNIST-1D needs mnist1d: pip install '.[examples]', or choose --data digits") from error
    made = make_dataset(get_dataset_args())
    return torch.tensor(made["x"], dtype=torch.float32), torch.tensor(made["y"])


#: The functions that return each data set, by name.
DATA = {"digits": load_digits, "MNIST-1D": make_mnist_1d}


def make_model(inputs: int) -> nn.Sequential:
    """Make a small MLP for ten classes."""
    return nn.Sequential(nn.Linear(inputs, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 10))


def draw_batches(n: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield the indices of mini-batches, in a new order in each epoch; drop each epoch's incomplete last batch."""
    while True:
        yield from torch.randperm(n, generator=generator).split(BATCH_SIZE)[: n // BATCH_SIZE]
