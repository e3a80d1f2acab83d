"""A training in plain torch, the reference for the trainers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Any

import torch
from scaling.torch_problem import Trained, strayed
from torch import Tensor, nn
from torch.optim.lr_scheduler import LinearLR

from vsgd.torch import VSGD

Batch = Any
Loss = Callable[[nn.Module, Batch], Tensor]
Clip = Callable[[Iterable[Tensor]], Any]


#: Options of a Lightning trainer that writes and prints nothing.
QUIET_LIGHTNING: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_model_summary": False,
    "enable_progress_bar": False,
}


def untouched(params: Iterable[Tensor]) -> None:
    """Leave gradients unclipped."""


#: How gradients may be clipped, by torch's functions.
CLIPS: dict[str, Clip] = {
    "nothing": untouched,
    "norm": partial(nn.utils.clip_grad_norm_, max_norm=1.0),
    "value": partial(nn.utils.clip_grad_value_, clip_value=0.01),
}


def loss_of(model: nn.Module, batch: list[Tensor]) -> Tensor:
    images, labels = batch
    return nn.functional.cross_entropy(model(images), labels)


def fresh(dtype: torch.dtype = torch.float32) -> tuple[Trained, LinearLR]:
    """Return a new model with its optimizer and warm-up, as in all recipes except Hugging Face's."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 10)).to(dtype)
    optimizer = VSGD(network.parameters(), lr=0.01, weight_decay=0.01)
    return Trained(network, optimizer), LinearLR(optimizer, start_factor=0.1, total_iters=20)


def train(
    trained: Trained,
    epochs: Iterable[Iterable[Batch]],
    *,
    loss_of: Loss = loss_of,
    accumulate: int = 1,
    clip: str = "nothing",
    schedulers: Sequence[Any] = (),
) -> Trained:
    """Train a model.

    Args:
        trained: the model and its optimizer.
        epochs: the batches of each epoch.
        loss_of: returns the loss of a model and a batch.
        accumulate: how many batches a step averages over; the remaining ones at an epoch's end keep the same weight.
        clip: how gradients are clipped, of `CLIPS`.
        schedulers: take a step after each step.
    """
    model, optimizer = trained
    for batches in epochs:
        for part in together(batches, accumulate):
            optimizer.zero_grad()
            for batch in part:
                (loss_of(model, batch) / accumulate).backward()
            CLIPS[clip](model.parameters())
            optimizer.step()
            for scheduler in schedulers:
                scheduler.step()
    return trained


def train_plainly(epochs: Iterable[Iterable[Batch]], dtype: torch.dtype = torch.float32, **how: Any) -> Trained:
    """Train the recipes' model, newly made, with their warm-up."""
    trained, warm_up = fresh(dtype)
    return train(trained, epochs, schedulers=[warm_up], **how)


def assert_ends(trained: Trained, epochs: Iterable[Iterable[Batch]], dtype: torch.dtype = torch.float32, **how: Any) -> None:
    """Assert that a trainer's training equals the plain one, bit for bit."""
    assert strayed(trained, train_plainly(epochs, dtype, **how)) == 0


def together(batches: Iterable[Batch], number: int) -> Iterator[list[Batch]]:
    """Yield lists of `number` batches; the last list has the remaining ones."""
    each = iter(batches)
    while part := list(islice(each, number)):
        yield part
