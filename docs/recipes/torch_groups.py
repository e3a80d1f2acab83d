"""Train with VSGD and decay only matrices, on scikit-learn's handwritten digits (8x8 pixels, no download).

To run it:

    pip install '.[torch]' scikit-learn
    python docs/recipes/torch_groups.py
"""

from __future__ import annotations

from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import nn

from vsgd.torch import VSGD


def decay_matrices_alone(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return parameter groups that decay only matrices; biases and norms' weights have one dimension."""
    params = [param for param in model.parameters() if param.requires_grad]
    return [
        {"params": [param for param in params if param.ndim >= 2], "weight_decay": weight_decay},
        {"params": [param for param in params if param.ndim < 2], "weight_decay": 0.0},
    ]


def main() -> tuple[nn.Module, VSGD]:
    """Train for 50 steps on all digits at once."""
    pixels, labels = load_digits(return_X_y=True)
    images, labels = torch.tensor(pixels, dtype=torch.float32) / 8 - 1, torch.tensor(labels)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.GELU(), nn.Linear(64, 10))
    optimizer = VSGD(decay_matrices_alone(model, weight_decay=0.1), lr=0.01)
    for _ in range(50):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
    print(f"loss {loss.item():.3f}")
    return model, optimizer


if __name__ == "__main__":
    main()
