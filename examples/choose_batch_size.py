"""Choose a batch size: measure the gradient noise scale during a training, from the micro-batches of each step.

In theory (arXiv 1812.06162) a batch as large as the noise scale needs twice the fewest steps and twice the fewest samples. A
batch far below it wastes steps, and one far above it wastes samples. The noise scale usually grows during a training.

    pip install '.[examples]'
    python examples/choose_batch_size.py
"""

from __future__ import annotations

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional
from tqdm import tqdm

from vsgd.torch import ConstantVSGD
from vsgd.torch.noise_scale import NoiseScaleMeter

BATCH_SIZE, PARTS = 64, 4  # micro-batches of 16
REPORTS = 5


def main() -> None:
    """Train and print the noise scale from the command line."""
    parser = argparse.ArgumentParser(description="Measure the gradient noise scale of a training on scikit-learn's digits.")
    parser.add_argument("--steps", type=int, default=500, help="mini-batches (default: %(default)s)")
    steps = parser.parse_args().steps
    every = max(1, steps // REPORTS)

    pixels, digits = load_digits(return_X_y=True)
    x, y = torch.tensor(pixels / 8 - 1, dtype=torch.float32), torch.tensor(digits)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 10))
    optimizer = ConstantVSGD(model.parameters(), lr=0.008)  # any optimizer of torch works

    with NoiseScaleMeter(optimizer, micro_batch_size=BATCH_SIZE // PARTS, window=every) as meter:
        for step in tqdm(range(1, steps + 1), unit="step"):
            optimizer.zero_grad()
            for part in torch.randint(len(x), (BATCH_SIZE,)).chunk(PARTS):
                loss = functional.cross_entropy(model(x[part]), y[part]) / PARTS
                loss.backward()
            optimizer.step()
            if step % every == 0:
                noise = meter.read()
                tqdm.write(f"step {step}: loss {PARTS * loss:.3f}, noise scale {noise.scale:.0f} ± {noise.error:.0f} examples")
    print(f"the batch size was {BATCH_SIZE}")


if __name__ == "__main__":
    main()
