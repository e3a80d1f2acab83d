"""Train a small ConvNeXt with VSGD and Hugging Face's Trainer on scikit-learn's handwritten digits (no download).

To run it:

    pip install '.[torch]' transformers accelerate scikit-learn
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


def make_convnext() -> ConvNextForImageClassification:
    """Make a network of two layers with random weights."""
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


def load_data() -> list[dict[str, Tensor]]:
    """Load images of one channel with pixels scaled to [-1, 1], and their labels."""
    pixels, labels = load_digits(return_X_y=True)
    images = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1
    return [{"pixel_values": image, "labels": label} for image, label in zip(images, torch.tensor(labels), strict=True)]


def make_arguments(folder: str, **options: Any) -> TrainingArguments:
    """Make the arguments that both trainings below share."""
    return TrainingArguments(
        folder, num_train_epochs=4, per_device_train_batch_size=64, logging_steps=29, use_cpu=True, report_to="none", **options
    )


def train_with_trainer_groups(folder: str = "huggingface") -> Trainer:
    """Let the Trainer make an optimizer that decays no bias and no norm, and a schedule from its arguments."""
    set_seed(0)
    trainer = Trainer(
        make_convnext(),
        make_arguments(folder, weight_decay=0.01, warmup_steps=10, lr_scheduler_type="cosine"),
        train_dataset=load_data(),
        optimizer_cls_and_kwargs=(VSGD, {"lr": 0.01}),  # not as learning_rate, which the Trainer ignores
    )
    trainer.train()
    return trainer


def train_with_own_schedule(folder: str = "huggingface") -> Trainer:
    """Pass an optimizer and a schedule; the Trainer ignores the arguments `weight_decay` and `lr_scheduler_type`."""
    set_seed(0)
    model = make_convnext()
    optimizer = VSGD(model.parameters(), lr=0.01)
    schedule = LinearLR(optimizer, start_factor=0.1, total_iters=10)
    trainer = Trainer(model, make_arguments(folder), train_dataset=load_data(), optimizers=(optimizer, schedule))
    trainer.train()
    return trainer


if __name__ == "__main__":
    train_with_trainer_groups()
    train_with_own_schedule()
