"""Train a small network with VSGD and Lightning on scikit-learn's handwritten digits (8x8 pixels, no download).

To run it:

    pip install '.[torch]' lightning scikit-learn
    python docs/recipes/with_lightning.py
"""

from __future__ import annotations

from typing import Any

import lightning
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.optim.lr_scheduler import LinearLR
from torch.utils.data import DataLoader, TensorDataset

from vsgd.torch import VSGD


class Digits(lightning.LightningModule):
    """The network with its loss and its optimizer."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 10))

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        """Compute and log the loss of a batch."""
        images, labels = batch
        loss = nn.functional.cross_entropy(self.network(images), labels)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> dict[str, Any]:
        """Return VSGD and a warm-up that advances with every step."""
        optimizer = VSGD(self.parameters(), lr=0.01, weight_decay=0.01)
        warm_up = LinearLR(optimizer, start_factor=0.1, total_iters=20)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": warm_up, "interval": "step"}}


def make_loader() -> DataLoader[Any]:
    """Load the digits with pixels scaled to [-1, 1], in a new order in each epoch."""
    pixels, labels = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(pixels, dtype=torch.float32) / 8 - 1, torch.tensor(labels))
    return DataLoader(data, batch_size=64, shuffle=True, generator=torch.Generator().manual_seed(0))


def main() -> lightning.Trainer:
    """Train; each step averages the gradients of two batches and clips them to a norm of 1."""
    lightning.seed_everything(0)
    trainer = lightning.Trainer(accelerator="cpu", max_epochs=5, accumulate_grad_batches=2, gradient_clip_val=1.0, logger=False)
    trainer.fit(Digits(), make_loader())
    print(f"loss {trainer.callback_metrics['loss']:.3f} after {trainer.global_step} steps")
    return trainer


if __name__ == "__main__":
    main()
