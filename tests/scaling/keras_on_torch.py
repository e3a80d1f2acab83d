"""What each rank of torch.distributed runs with Keras on torch: training by DDP."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import keras
import numpy as np
import torch
import torch.distributed as dist
from scaling.keras_distributed import write, write_later
from scaling.keras_network import BATCH, CASES, EPOCHS, SAMPLES, X, Y, apart, arrays, compiled, network
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from vsgd import torch as vsgd_torch


def train(model: Any, step: Callable[[], None], batches: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Train a Keras model on this rank's part of each batch: DDP makes each gradient the mean of the ranks'."""
    parallel = DistributedDataParallel(model)
    for x, y in batches:
        model.zero_grad()
        keras.ops.mean(keras.ops.square(parallel(x) - y)).backward()
        step()


def keras_step(model: Any) -> None:
    """A step of the model's optimizer by the gradients that its variables have."""
    variables = model.trainable_variables
    with torch.no_grad():
        model.optimizer.apply([each.value.grad for each in variables], variables)


def part(rank: int, ranks: int) -> Iterator[tuple[Tensor, Tensor]]:
    """What a rank has of each batch."""
    share = BATCH // ranks
    for start in list(range(rank * share, SAMPLES, BATCH)) * EPOCHS:
        yield tuple(keras.ops.convert_to_tensor(each[start : start + share]) for each in (X, Y))


def ddp(case: str) -> tuple[float, list[bytes]]:
    """How far a training by DDP strayed from one process that has the mean of the gradients, and this rank's replica."""
    model = compiled(case)
    train(model, partial(keras_step, model), part(dist.get_rank(), dist.get_world_size()))
    one = compiled(case)
    for grads in _means(one):
        one.optimizer.apply(grads, one.trainable_variables)
    return apart(arrays(model), arrays(one)), [each.tobytes() for each in arrays(model)]


def ddp_as_torch(case: str) -> tuple[float, list[bytes]]:
    """The same by the optimizer for torch."""
    model, one = network(case), network(case)
    optimizers = [_torch_optimizer(case, each) for each in (model, one)]
    train(model, optimizers[0].step, part(dist.get_rank(), dist.get_world_size()))
    for grads in _means(one):
        for each, grad in zip(one.trainable_variables, grads, strict=True):
            each.value.grad = grad
        optimizers[1].step()
    many, single = (_torch_arrays(*each) for each in zip((model, one), optimizers, strict=True))
    return apart(many, single), [each.tobytes() for each in many]


def _torch_optimizer(case: str, model: Any) -> Any:
    kernels = [each.value for each in model.trainable_variables if each.name == "kernel"]
    others = [each.value for each in model.trainable_variables if each.name != "kernel"]
    groups = [{"params": kernels, "weight_decay": 0.1}, {"params": others}]
    return getattr(vsgd_torch, CASES[case].kind)(groups, lr=0.05, **CASES[case].options)


def _torch_arrays(model: Any, optimizer: Any) -> list[np.ndarray]:
    params = [each.value for each in model.trainable_variables]
    state = [value for param in params for value in optimizer.state[param].values()]
    return [each.detach().float().cpu().numpy() for each in [*params, *state]]


def _means(model: Any) -> Iterator[list[Tensor]]:
    """The mean of all ranks' gradients, batch by batch, of a model that is stepped between."""
    ranks = dist.get_world_size()
    for batches in zip(*(part(rank, ranks) for rank in range(ranks)), strict=True):
        parts = [_gradients(model, *batch) for batch in batches]
        yield [sum(grads) / ranks for grads in zip(*parts, strict=True)]


def _gradients(model: Any, x: Tensor, y: Tensor) -> list[Tensor]:
    loss = keras.ops.mean(keras.ops.square(model(x) - y))
    return list(torch.autograd.grad(loss, [each.value for each in model.trainable_variables]))


def save_by_ddp(case: str, path: str) -> None:
    """As `save`, by the first rank of a training by DDP."""
    model = compiled(case)
    for write_it in (write, write_later):
        train(model, partial(keras_step, model), part(dist.get_rank(), dist.get_world_size()))
        if dist.get_rank() == 0:
            write_it(model, path)
    dist.barrier()
