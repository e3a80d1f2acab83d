"""Train with Keras on torch and DDP, on each rank of torch.distributed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import keras
import numpy as np
import torch
import torch.distributed as dist
from scaling.keras_distributed import write
from scaling.keras_network import BATCH, CASES, EPOCHS, SAMPLES, X, Y, apart, arrays, compiled
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from vsgd import torch as vsgd_torch


def train(model: Any, step: Callable[[], None], batches: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Train a Keras model on this rank's part of each batch. DDP averages each gradient over the ranks."""
    parallel = DistributedDataParallel(model)
    for x, y in batches:
        model.zero_grad()
        keras.ops.mean(keras.ops.square(parallel(x) - y)).backward()
        step()


def keras_step(model: Any) -> None:
    """Take a step of the model's optimizer with the gradients of its variables."""
    variables = model.trainable_variables
    with torch.no_grad():
        model.optimizer.apply([each.value.grad for each in variables], variables)


def part(rank: int, ranks: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield a rank's part of each batch."""
    share = BATCH // ranks
    for start in list(range(rank * share, SAMPLES, BATCH)) * EPOCHS:
        yield tuple(keras.ops.convert_to_tensor(each[start : start + share]) for each in (X, Y))


def ddp(case: str, optimizer: str) -> tuple[float, list[bytes]]:
    """Return the deviation of DDP from one process with the mean gradient, and the bytes of this rank's replica."""
    make = {"vsgd.keras": _by_keras, "vsgd.torch": _by_torch}[optimizer]
    (model, step, read), (one, step_one, read_one) = make(case), make(case)
    ranks = dist.get_world_size()
    train(model, step, part(dist.get_rank(), ranks))
    values = [each.value for each in one.trainable_variables]
    for batches in zip(*(part(rank, ranks) for rank in range(ranks)), strict=True):
        parts = [torch.autograd.grad(keras.ops.mean(keras.ops.square(one(x) - y)), values) for x, y in batches]
        for value, *grads in zip(values, *parts, strict=True):
            value.grad = sum(grads) / ranks
        step_one()
    return apart(read(), read_one()), [each.tobytes() for each in read()]


def _by_keras(case: str) -> tuple[Any, Callable[[], None], Callable[[], list[np.ndarray]]]:
    """Return a model, its step, and a function that returns all its arrays."""
    model = compiled(case)
    return model, partial(keras_step, model), partial(arrays, model)


def _by_torch(case: str) -> tuple[Any, Callable[[], None], Callable[[], list[np.ndarray]]]:
    """Return the same as `_by_keras`, with the optimizer for torch."""
    model = compiled(case)
    values = [each.value for each in model.trainable_variables]
    kernels = [each.value for each in model.trainable_variables if each.name == "kernel"]
    others = [each.value for each in model.trainable_variables if each.name != "kernel"]
    groups = [{"params": kernels, "weight_decay": 0.1}, {"params": others}]
    optimizer = getattr(vsgd_torch, CASES[case].kind)(groups, lr=0.05, **CASES[case].options)

    def read() -> list[np.ndarray]:
        tensors = [*values, *(each for value in values for each in optimizer.state[value].values())]
        return [each.detach().float().cpu().numpy() for each in tensors]

    return model, optimizer.step, read


def save(path: str, case: str) -> None:
    """Save like `save` of `keras_distributed`, by the first rank of a training by DDP."""
    model = compiled(case)
    for where in (path, f"{path}-goes-on"):
        train(model, partial(keras_step, model), part(dist.get_rank(), dist.get_world_size()))
        if dist.get_rank() == 0:
            write(model, where)
    dist.barrier()
