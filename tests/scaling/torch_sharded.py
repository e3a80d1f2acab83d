"""What each rank runs in the tests of sharded training: how far it strayed from one process, or what it saw."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from scaling.torch_problem import Case, Trained, apart, loss_of, mesh_of, network, reference, strayed, train, whole
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from vsgd.monitor import Monitor
from vsgd.torch import VSGD
from vsgd.torch.monitor import watch


def ddp(case: Case) -> tuple[float, list[Any]]:
    """How far it strayed, and the bytes of this rank's replica."""
    model = network(case)
    optimizer = case.optimizer(model.parameters())
    train(DistributedDataParallel(model), optimizer, case)
    bits = [tensor.view(torch.uint8).numpy().tobytes() for tensor in model.state_dict().values()]
    return strayed(Trained(model, optimizer), reference(case, dist.get_world_size())), bits


def zero(case: Case) -> tuple[float, int]:
    """How far it strayed, all state gathered on rank 0, and how many parameters have theirs here."""
    model = network(case)
    kind = type(case.optimizer(model.parameters()))
    optimizer = ZeroRedundancyOptimizer(model.parameters(), kind, weight_decay=0.1, **case.options)
    train(DistributedDataParallel(model), optimizer, case)
    ended = reference(case, dist.get_world_size())
    here = len(optimizer.optim.state)
    farthest = max(apart(*pair) for pair in zip(model.parameters(), ended.model.parameters(), strict=True))
    optimizer.consolidate_state_dict(to=0)
    if dist.get_rank() == 0:
        loaded = Trained(model, case.optimizer(model.parameters()))
        loaded.optimizer.load_state_dict(optimizer.state_dict())
        farthest = max(farthest, strayed(loaded, ended))
    return farthest, here


def shard(model: nn.Sequential, case: Case, *shape: int) -> None:
    """FSDP2 over all ranks; over rows and columns of them, hybrid."""
    policy = MixedPrecisionPolicy(param_dtype=case.computed_in, reduce_dtype=case.computed_in and torch.float32)
    for module in (*(layer for layer in model if isinstance(layer, nn.Linear)), model):
        fully_shard(module, mesh=mesh_of(*shape, device=case.device), mp_policy=policy)


def train_fsdp(case: Case, *shape: int) -> Trained:
    model = network(case)
    shard(model, case, *shape)
    optimizer = case.optimizer(model.parameters())
    train(model, optimizer, case)
    return Trained(model, optimizer)


def fsdp(case: Case, *shape: int) -> tuple[float, list[int]]:
    """How far it strayed, and how many elements of each parameter are here."""
    trained = train_fsdp(case, *shape)
    for param in trained.model.parameters():
        for name, state in trained.optimizer.state[param].items():
            assert name == "step" or state.placements == param.placements
    here = [param.to_local().numel() for param in trained.model.parameters()]
    return strayed(trained, reference(case, dist.get_world_size())), here


def tensor_parallel(case: Case) -> tuple[float, list[str]]:
    """How far it strayed, and how each parameter is placed."""
    model = network(case)
    plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    parallelize_module(model, mesh_of(dist.get_world_size()), plan)
    optimizer = case.optimizer(model.parameters())
    plain = network(case)
    other = case.optimizer(plain.parameters())
    for step in range(4):
        for each, steps in ((model, optimizer), (plain, other)):
            steps.zero_grad()
            x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step), dtype=case.dtype)
            each(x).square().mean().backward()
            steps.step()
    return strayed(Trained(model, optimizer), Trained(plain, other)), [
        str(param.placements) if isinstance(param, DTensor) else "whole" for param in model.parameters()
    ]


def placed(case: Case, placements: str, shape: tuple[int, ...], mesh: tuple[int, ...]) -> float:
    """How far a parameter strayed that lies so, by equal gradients: for each dimension of the mesh a digit, or w for whole."""
    where = [_placement(name) for name in placements]
    table = torch.linspace(-1, 1, torch.Size(shape).numel(), dtype=case.dtype).view(shape)
    ranks = mesh_of(*mesh)
    # Another parameter before it: what is rounded at random depends on a parameter's place in the optimizer.
    models = [
        nn.ParameterList([nn.Parameter(place(torch.ones_like(table))), nn.Parameter(place(table.clone()))])
        for place in (lambda tensor: distribute_tensor(tensor, ranks, where), lambda tensor: tensor)
    ]
    sharded, plain = (Trained(model, case.optimizer(model.parameters())) for model in models)
    for seed in range(4):
        for param, same in zip(sharded.model, plain.model, strict=True):
            same.grad = (same.detach().float() * 100 + seed).sin().to(case.dtype)
            param.grad = distribute_tensor(same.grad.clone(), ranks, where)
        sharded.optimizer.step()
        plain.optimizer.step()
    return strayed(sharded, plain)


def _placement(name: str) -> Placement:
    return Replicate() if name == "w" else Shard(int(name))


# Without its caches, in which a rank finds what another has compiled for a shard of another size.
@torch.compiler.config.patch(force_disable_caches=True)
def compiled() -> float:
    """How far a compiled step of an uneven shard strayed."""
    table = torch.linspace(-1, 1, 6).view(3, 2)
    plain = nn.Parameter(table.clone())
    sharded = nn.Parameter(distribute_tensor(table.clone(), mesh_of(2), [Shard(0)]))
    optimizers = VSGD([plain], foreach=False), VSGD([sharded], foreach=False)
    steps = optimizers[0].step, torch.compile(optimizers[1].step)
    for seed in range(3):
        plain.grad = (table * 100 + seed).sin()
        sharded.grad = distribute_tensor(plain.grad.clone(), sharded.device_mesh, sharded.placements)
        for step in steps:
            step()
    return apart(sharded, plain)


def two_dimensional(case: Case) -> float:
    """How far a weight strayed that tensor parallelism shards, and FSDP2 then again, in the same dimension."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    models = [network(case), network(case)]
    parallelize_module(models[0], mesh["tensor"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    fully_shard(models[0], mesh=mesh["data"])
    sharded, plain = (Trained(model, case.optimizer(model.parameters())) for model in models)
    for seed in range(4):
        for param, same in zip(sharded.model.parameters(), plain.model.parameters(), strict=True):
            same.grad = (same.detach().float() * 100 + seed).sin().to(case.dtype)
            param.grad = _laid_like(param, same.grad)
        sharded.optimizer.step()
        plain.optimizer.step()
    return strayed(sharded, plain)


def _laid_like(param: Any, values: torch.Tensor) -> DTensor:
    """Whole values, of which each rank takes what lies where its part of a sharded tensor does."""
    size, offset = compute_local_shape_and_global_offset(param.shape, param.device_mesh, param.placements)
    for dim, (length, start) in enumerate(zip(size, offset, strict=True)):
        values = values.narrow(dim, start, length)
    return DTensor.from_local(
        values.contiguous(), param.device_mesh, param.placements, shape=param.shape, stride=param.stride()
    )


def gradients_placed_otherwise() -> list[float]:
    """How far a step strayed by a gradient that is yet to be summed, and by one that is whole where its parameter is not."""
    mesh = mesh_of(2)
    values, grad = torch.linspace(-1, 1, 4), torch.tensor([0.5, -2.0, 0.25, 1.0])
    plain = nn.Parameter(values.clone())
    plain.grad = grad.clone()
    VSGD([plain], lr=0.1).step()
    share = 0.25 if dist.get_rank() == 0 else 0.75
    cases = [
        (Replicate(), DTensor.from_local(grad * share, mesh, [Partial()])),
        (Shard(0), distribute_tensor(grad, mesh, [Replicate()])),
    ]
    farthest = []
    for placement, given in cases:
        param = nn.Parameter(distribute_tensor(values.clone(), mesh, [placement]))
        param.grad = given
        VSGD([param], lr=0.1).step()
        farthest.append(apart(param, plain))
    return farthest


def communication(case: Case) -> dict[str, int]:
    """How many collectives a step has, and, so that some are seen, the norm of its gradients."""
    model, optimizer = train_fsdp(case, dist.get_world_size())
    loss_of(model, 0, dist.get_rank(), case).backward()
    grads = [param.grad for param in model.parameters()]
    counts = {}
    for name, call in (("step", optimizer.step), ("norm", lambda: nn.utils.get_total_norm(grads).full_tensor())):
        with CommDebugMode() as seen:
            call()
        counts[name] = seen.get_total_counts()
    return counts


def steps_counted_at_lr_0() -> list[float]:
    """The counts after a first step at lr 0, where one rank's gradients alone are zero, and where all are."""
    mesh = mesh_of(2)
    counts = []
    for values in ([0.0, 0.0, 1.0, 1.0], [0.0] * 4):
        param = nn.Parameter(distribute_tensor(torch.ones(4), mesh, [Shard(0)]))
        param.grad = distribute_tensor(torch.tensor(values), mesh, [Shard(0)])
        optimizer = VSGD([param], lr=0.0)
        optimizer.step()
        counts.append(optimizer.state[param]["step"].item())
    return counts


def seen(case: Case) -> dict[str, float]:
    """How far, relatively, what is said of the gradients strayed from what one process says."""
    views = []
    for trained in (train_fsdp(case, dist.get_world_size()), reference(case, dist.get_world_size())):
        model, optimizer = trained
        looks: list[Any] = []
        with watch(optimizer, Monitor(looks, every=1), model.named_parameters(), batch_size=16):
            scale = optimizer.noise_scale(batch_size=16)
            surprise = optimizer.surprise()
            posteriors = [optimizer.posterior(param) for param in model.parameters()]
            optimizer.step()
        (look,) = looks
        views.append(
            {
                "posterior": torch.cat([whole(part).reshape(-1) for known in posteriors for part in known]),
                "noise_scale": torch.stack([*scale.overall, *(part for each in scale.tensors.values() for part in each)]),
                "surprise": torch.stack([*surprise.values()]),
                "monitor.watch": torch.tensor([*look.scalars().values()]),
            }
        )
    return {name: _relatively_apart(views[0][name], views[1][name]) for name in views[0]}


def _relatively_apart(one: torch.Tensor, other: torch.Tensor) -> float:
    assert one.shape == other.shape
    one, other = one.double(), other.double()
    assert torch.equal(one.isfinite(), other.isfinite())
    return ((one - other).abs() / other.abs().clamp(min=1e-12)).nan_to_num(0.0).max().item()
