"""A small network, trained by several ranks, or by one process with the mean of the ranks' gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from scaling import compare
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from vsgd import torch as vsgd_torch

STEPS = 4
FSDP2_ON_CPU = hasattr(torch.cpu.current_stream(), "record_event")
fsdp2 = pytest.mark.skipif(not FSDP2_ON_CPU, reason="FSDP2 of this torch does not run on CPUs: their streams record no events")


class Case(NamedTuple):
    """What is trained, and how.

    Attributes:
        options: the optimizer's options.
        kind: the optimizer's class.
        dtype: the parameters' dtype.
        computed_in: the dtype of the forward and backward pass, if it differs.
        device: the device of the training.
    """

    options: dict[str, Any]
    kind: str = "VSGD"
    dtype: torch.dtype = torch.float32
    computed_in: torch.dtype | None = None
    device: str = "cpu"

    def with_options(self, options: dict[str, Any]) -> Case:
        return self._replace(options={**self.options, **options})

    def optimizer(self, params: Iterable[Any]) -> Any:
        return getattr(vsgd_torch, self.kind)(params, weight_decay=0.1, **self.options)


class Trained(NamedTuple):
    """A model and its optimizer."""

    model: nn.Module
    optimizer: Any


def trained_of(model: nn.Module, case: Case) -> Trained:
    return Trained(model, case.optimizer(model.parameters()))


def network(case: Case) -> nn.Sequential:
    """Return a network whose rows of weights 2 ranks can share evenly, unevenly, and not at all."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1))
    return model.to(case.device, case.dtype)


def loss_of(model: Callable[[Tensor], Tensor], step: int, rank: int, case: Case) -> Tensor:
    """Return the loss on a rank's examples at a step."""
    generator = torch.Generator().manual_seed(100 * step + rank)
    x, y = torch.randn(8, 6, generator=generator), torch.randn(8, 1, generator=generator)
    return (model(x.to(case.device, case.dtype)).double() - y.to(case.device)).square().mean()


def train(model: Callable[[Tensor], Tensor], optimizer: Any, case: Case, rank: int | None = None) -> None:
    """Run a rank's part of a training, by default this rank's; the model's wrapper must combine the gradients of all ranks."""
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(model, step, dist.get_rank() if rank is None else rank, case).backward()
        optimizer.step()


def reference(case: Case, ranks: int) -> Trained:
    """Run the same training in one process."""
    model, optimizer = trained_of(network(case), case)
    for step in range(STEPS):
        parts = [_gradients(model, case, step, rank) for rank in range(ranks)]
        for param, *grads in zip(model.parameters(), *parts, strict=True):
            param.grad = _mean([grad.to(param.dtype) for grad in grads])
        optimizer.step()
    return Trained(model, optimizer)


def _gradients(model: nn.Module, case: Case, step: int, rank: int) -> list[Tensor]:
    case = case._replace(dtype=case.computed_in or case.dtype)
    computing = network(case)
    computing.load_state_dict(model.state_dict())
    loss_of(computing, step, rank, case).backward()
    return [param.grad for param in computing.parameters()]


def _mean(parts: Sequence[Tensor]) -> Tensor:
    """Return the mean, summed in the order of a mesh of pairs, so that no bit differs."""
    sums = list(parts)
    while len(sums) > 1:
        sums = [one + other for one, other in zip(sums[::2], sums[1::2], strict=True)]
    return sums[0] / len(parts)


def steps(trained: Trained, seeds: Iterable[int] = range(STEPS)) -> None:
    """Take steps with gradients that depend only on the seed, however the parameters are sharded."""
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        for param in trained.model.parameters():
            param.grad = laid_like(param, torch.randn(param.shape, generator=generator).to(param.dtype))
        trained.optimizer.step()


def laid_like(param: Any, values: Tensor) -> Tensor:
    """Return whole values as a tensor sharded like the parameter, with each rank's own part."""
    if not isinstance(param, DTensor):
        return values
    size, offset = compute_local_shape_and_global_offset(param.shape, param.device_mesh, param.placements)
    for dim, (length, start) in enumerate(zip(size, offset, strict=True)):
        values = values.narrow(dim, start, length)
    where = {"shape": param.shape, "stride": param.stride()}
    return DTensor.from_local(values.contiguous(), param.device_mesh, param.placements, **where)


def whole(tensor: Any) -> Tensor:
    """Return a tensor, gathered if it is sharded."""
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach()


def strayed(one: Trained, other: Trained) -> float:
    """Return the largest difference of any parameter, state array or step count."""
    farthest = 0.0
    for param, same in zip(one.model.parameters(), other.model.parameters(), strict=True):
        state, same_state = one.optimizer.state[param], other.optimizer.state[same]
        assert sorted(state) == sorted(same_state)
        farthest = max(farthest, apart(param, same), *(apart(state[name], same_state[name]) for name in state))
    return farthest


def apart(one: Any, other: Any) -> float:
    """Return the largest difference of two tensors, relative to the other's largest value; infinity if dtypes differ."""
    one, other = whole(one), whole(other)
    if one.dtype != other.dtype:
        return math.inf
    return compare.apart(*(each.to(torch.complex128).cpu().numpy() for each in (one, other)))


def mesh_of(*shape: int, device: str = "cpu") -> DeviceMesh:
    """Return a mesh of all ranks, in rows and columns if two numbers are given."""
    return init_device_mesh(device, shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
