"""Train a small network with VSGD and Accelerate on scikit-learn's handwritten digits (8x8 pixels, no download).

To run it:

    pip install '.[torch]' accelerate scikit-learn
    python docs/recipes/with_accelerate.py
    torchrun --standalone --nproc-per-node 2 docs/recipes/with_accelerate.py
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from sklearn.datasets import load_digits
from torch import nn
from torch.optim.lr_scheduler import LinearLR
from torch.utils.data import DataLoader, TensorDataset

from vsgd.torch import VSGD


def make_loader() -> DataLoader[Any]:
    """Load the digits with pixels scaled to [-1, 1], in a new order in each epoch."""
    pixels, labels = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(pixels, dtype=torch.float32) / 8 - 1, torch.tensor(labels))
    return DataLoader(data, batch_size=64, shuffle=True, generator=torch.Generator().manual_seed(0))


def main() -> tuple[nn.Module, VSGD]:
    """Train; each step averages the gradients of two batches and clips them to a norm of 1."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    set_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 10))
    optimizer = VSGD(model.parameters(), lr=0.01, weight_decay=0.01)
    warm_up = LinearLR(optimizer, start_factor=0.1, total_iters=20)
    model, optimizer, warm_up, loader = accelerator.prepare(model, optimizer, warm_up, make_loader())
    for epoch in range(5):
        for images, labels in loader:
            with accelerator.accumulate(model):
                loss = nn.functional.cross_entropy(model(images), labels)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                warm_up.step()
                optimizer.zero_grad()
        accelerator.print(f"epoch {epoch + 1}: loss {loss.item():.3f}")
    return accelerator.unwrap_model(model), optimizer.optimizer


if __name__ == "__main__":
    main()
