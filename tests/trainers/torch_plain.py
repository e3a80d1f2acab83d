"""A training in plain torch, beside which those of the trainers are held."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Any

from scaling.torch_problem import Trained
from torch import Tensor, nn

Batch = Any
Loss = Callable[[nn.Module, Batch], Tensor]
Clip = Callable[[Iterable[Tensor]], Any]

#: How gradients may be cut, as torch does it.
to_norm_1: Clip = partial(nn.utils.clip_grad_norm_, max_norm=1.0)
to_values_of_a_hundredth: Clip = partial(nn.utils.clip_grad_value_, clip_value=0.01)


def untouched(params: Iterable[Tensor]) -> None:
    """Gradients that are not cut."""


def train(
    trained: Trained,
    loss_of: Loss,
    batches: Iterable[Batch],
    *,
    accumulate: int = 1,
    clip: Clip = untouched,
    schedulers: Sequence[Any] = (),
) -> None:
    """One epoch.

    Args:
        trained: what is trained.
        loss_of: of a model and a batch.
        batches: of the epoch.
        accumulate: how many batches a step takes the mean gradient of; those left at the epoch's end weigh no more.
        clip: cuts the gradients of parameters.
        schedulers: counts the steps.
    """
    model, optimizer = trained
    for part in together(batches, accumulate):
        optimizer.zero_grad()
        for batch in part:
            (loss_of(model, batch) / accumulate).backward()
        clip(model.parameters())
        optimizer.step()
        for scheduler in schedulers:
            scheduler.step()


def together(batches: Iterable[Batch], number: int) -> Iterator[list[Batch]]:
    """The batches, so many at a time, the last time what is left."""
    each = iter(batches)
    while part := list(islice(each, number)):
        yield part
