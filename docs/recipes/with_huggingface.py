"""VSGD with Hugging Face's Trainer: a small ConvNeXt on scikit-learn's handwritten digits (no download).

To run it:

    pip install '.[fused]' transformers accelerate scikit-learn
    python docs/recipes/with_huggingface.py
"""

from __future__ import annotations

from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.optim.lr_scheduler import LinearLR
from transformers import ConvNextConfig, ConvNextForImageClassification, Trainer, TrainingArguments, set_seed

from vsgd.torch import VSGD


def small_convnext() -> ConvNextForImageClassification:
    """Two layers of random weights."""
    config = ConvNextConfig(
        num_channels=1,
        patch_size=2,
        num_stages=2,
        depths=[1, 1],
        hidden_sizes=[16, 32],
        num_labels=10,
        initializer_range=0.1,
    )
    return ConvNextForImageClassification(config)


def digits() -> list[dict[str, Tensor]]:
    """Images of one channel, pixels scaled to [-1, 1], and their labels."""
    pixels, labels = load_digits(return_X_y=True)
    images = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1
    return [{"pixel_values": image, "labels": label} for image, label in zip(images, torch.tensor(labels), strict=True)]


def arguments(folder: str, **options: Any) -> TrainingArguments:
    """What both ways below share."""
    return TrainingArguments(
        folder, num_train_epochs=4, per_device_train_batch_size=64, logging_steps=29, use_cpu=True, report_to="none", **options
    )


def with_the_trainers_groups(folder: str = "huggingface") -> Trainer:
    """The Trainer makes the optimizer, which decays no bias and no norm, and a schedule from its arguments."""
    set_seed(0)
    trainer = Trainer(
        small_convnext(),
        arguments(folder, weight_decay=0.01, warmup_steps=10, lr_scheduler_type="cosine"),
        train_dataset=digits(),
        optimizer_cls_and_kwargs=(VSGD, {"lr": 0.01}),  # here, for learning_rate among the arguments is not asked
    )
    trainer.train()
    return trainer


def with_an_own_schedule(folder: str = "huggingface") -> Trainer:
    """Optimizer and schedule are made here; `weight_decay` and `lr_scheduler_type` among the arguments are not asked."""
    set_seed(0)
    model = small_convnext()
    optimizer = VSGD(model.parameters(), lr=0.01)
    schedule = LinearLR(optimizer, start_factor=0.1, total_iters=10)
    trainer = Trainer(model, arguments(folder), train_dataset=digits(), optimizers=(optimizer, schedule))
    trainer.train()
    return trainer


if __name__ == "__main__":
    with_the_trainers_groups()
    with_an_own_schedule()
