"""Train a small network with VSGD in PyTorch, and print what the optimizer learned about each layer's gradient.

The data are MNIST-1D (Greydanus, 2020): signals of 40 samples in 10 classes, which a package makes without a download.

    pip install '.[examples]'
    python examples/quickstart.py

`python -m experiments.quickstart` compares VSGD with AdamW and SGD on this network.
"""

from __future__ import annotations

import argparse

import torch
from mnist1d.data import get_dataset_args, make_dataset
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from vsgd.torch import VSGD

BATCH_SIZE = 100


def load_data(part: str) -> tuple[Tensor, Tensor]:
    """Make the signals and labels of a part of the data: "" for training, "_test" for the test."""
    made = make_dataset(get_dataset_args())
    return torch.tensor(made[f"x{part}"], dtype=torch.float32)[:, None], torch.tensor(made[f"y{part}"])


def make_network() -> nn.Sequential:
    """Make a network of three convolutions with 25 channels."""
    layers: list[nn.Module] = []
    for inputs, size in ((1, 5), (25, 3), (25, 3)):
        layers += [nn.Conv1d(inputs, 25, size, stride=2, padding=size // 2), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(125, 10))


def main() -> None:
    """Train and print from the command line."""
    parser = argparse.ArgumentParser(description="Train a small network with VSGD in PyTorch.")
    parser.add_argument("--steps", type=int, default=2000, help="mini-batches (default: %(default)s)")
    steps = parser.parse_args().steps

    torch.manual_seed(0)
    x, y = load_data("")
    network = make_network()
    optimizer = VSGD(network.parameters(), lr=0.016)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    bar = tqdm(range(steps), unit="step")
    for _ in bar:
        batch = torch.randint(len(x), (BATCH_SIZE,))
        optimizer.zero_grad()
        loss = functional.cross_entropy(network(x[batch]), y[batch])
        loss.backward()
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)

    test_x, test_y = load_data("_test")
    accuracy = (network(test_x).argmax(1) == test_y).double().mean().item()
    print(f"test accuracy {accuracy:.1%}")
    for name, param in network.named_parameters():
        posterior = optimizer.posterior(param)
        print(f"{name:9} median gain {posterior.gain.median():.3f}, signal to noise {posterior.snr.median():.1e}")


if __name__ == "__main__":
    main()
