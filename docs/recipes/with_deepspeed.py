"""Train a small network with VSGD and DeepSpeed on scikit-learn's handwritten digits (8x8 pixels, no download).

To run it:

    pip install '.[torch]' deepspeed scikit-learn
    torchrun --standalone --nproc-per-node 2 docs/recipes/with_deepspeed.py
"""

from __future__ import annotations

from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.optim.lr_scheduler import LinearLR
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from vsgd.torch import VSGD

CONFIG = {
    "train_micro_batch_size_per_gpu": 64,
    "zero_optimization": {"stage": 2},
    "zero_allow_untested_optimizer": True,  # required for optimizers outside DeepSpeed
    "gradient_clipping": 0.0,  # off; DeepSpeed's default clips to a norm of 1
}


def make_loader() -> DataLoader[Any]:
    """Load this process's share of the digits with pixels scaled to [-1, 1], in a new order in each epoch."""
    pixels, labels = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(pixels, dtype=torch.float32) / 8 - 1, torch.tensor(labels))
    return DataLoader(data, batch_size=64, sampler=DistributedSampler(data))


def make_engine(config: dict[str, Any]) -> Any:
    """Make a network and DeepSpeed's engine for it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 10))
    optimizer = VSGD(model.parameters(), lr=0.01, weight_decay=0.01)
    warm_up = LinearLR(optimizer, start_factor=0.1, total_iters=20)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, lr_scheduler=warm_up, config=config)
    return engine


def train(engine: Any, loader: DataLoader[Any], epoch: int) -> None:
    """Train for one epoch."""
    loader.sampler.set_epoch(epoch)
    for images, labels in loader:
        loss = nn.functional.cross_entropy(engine(images.to(engine.device)), labels.to(engine.device))
        engine.backward(loss)
        engine.step()
    if dist.get_rank() == 0:
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}")


def main() -> Any:
    """Train with state and gradients sharded among the processes."""
    engine = make_engine(CONFIG)
    loader = make_loader()
    for epoch in range(5):
        train(engine, loader, epoch)
    return engine


if __name__ == "__main__":
    main()
