"""Train on each rank in the tests of sharded training, and return the deviation from one process, or observations."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import torch.distributed as dist
from scaling import torch_problem as problem
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from vsgd.monitor import Monitor
from vsgd.monitor.noise_scale import MeasuredNoiseScale
from vsgd.torch import VSGD, GradientObserver, prior_strength_from
from vsgd.torch.monitor import watch
from vsgd.torch.noise_scale import NoiseScaleMeter


def ddp(case: problem.Case) -> tuple[float, list[Any]]:
    """Return the deviation of DDP, and the bytes of this rank's replica."""
    model, optimizer = problem.trained_of(problem.network(case), case)
    problem.train(DistributedDataParallel(model), optimizer, case)
    bits = [tensor.view(torch.uint8).numpy().tobytes() for tensor in model.state_dict().values()]
    return problem.strayed(problem.Trained(model, optimizer), problem.reference(case, dist.get_world_size())), bits


def zero(case: problem.Case) -> tuple[float, int]:
    """Return the deviation of the parameters, and how many of them have their state on this rank."""
    model, plain = problem.trained_of(problem.network(case), case)
    optimizer = ZeroRedundancyOptimizer(model.parameters(), type(plain), weight_decay=0.1, **case.options)
    problem.train(DistributedDataParallel(model), optimizer, case)
    ended = problem.reference(case, dist.get_world_size()).model
    farthest = max(problem.apart(*pair) for pair in zip(model.parameters(), ended.parameters(), strict=True))
    return farthest, len(optimizer.optim.state)


def shard(model: nn.Sequential, case: problem.Case, *shape: int) -> None:
    """Shard with FSDP2 over all ranks, or hybrid over rows and columns of them."""
    policy = MixedPrecisionPolicy(param_dtype=case.computed_in, reduce_dtype=case.computed_in and torch.float32)
    for module in (*(layer for layer in model if isinstance(layer, nn.Linear)), model):
        fully_shard(module, mesh=problem.mesh_of(*shape, device=case.device), mp_policy=policy)


def train_fsdp(case: problem.Case, *shape: int) -> problem.Trained:
    model = problem.network(case)
    shard(model, case, *shape)
    trained = problem.trained_of(model, case)
    problem.train(*trained, case)
    return trained


def fsdp(case: problem.Case, *shape: int) -> tuple[float, list[int]]:
    """Return FSDP2's deviation and the size of this rank's shard of each parameter; assert that a step communicates nothing."""
    model, optimizer = trained = train_fsdp(case, *(shape or (dist.get_world_size(),)))
    for param in model.parameters():
        for name, state in optimizer.state[param].items():
            assert name == "step" or state.placements == param.placements
    far = problem.strayed(trained, problem.reference(case, dist.get_world_size()))
    problem.loss_of(model, 0, dist.get_rank(), case).backward()
    grads = [param.grad for param in model.parameters()]
    with CommDebugMode() as seen:
        optimizer.step()
    assert seen.get_total_counts() == 0
    with CommDebugMode() as seen:
        nn.utils.get_total_norm(grads).full_tensor()
    assert seen.get_total_counts() > 0  # shows that the mode counts communication
    return far, [param.to_local().numel() for param in model.parameters()]


def tensor_parallel(case: problem.Case, *shape: int) -> float:
    """Return the deviation of tensor parallelism on shared data.

    Over rows and columns, the gradients are equal, and FSDP2 also shards over rows.
    """
    mesh, models = problem.mesh_of(*shape), [problem.network(case), problem.network(case)]
    parallelize_module(models[0], mesh["shard"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    if mesh.ndim == 2:
        fully_shard(models[0], mesh=mesh["replicate"])
    sharded, plain = (problem.trained_of(model, case) for model in models)
    for each in (sharded, plain):
        if mesh.ndim == 2:
            problem.steps(each)
        else:
            problem.train(*each, case, rank=0)
    return problem.strayed(sharded, plain)


def placed(case: problem.Case, placements: str, compiled: bool = False) -> float:
    """Return the deviation of sharded parameters with equal gradients.

    `placements` has, for each dimension of the mesh, the sharded dimension of the parameters, or w for whole.
    """
    ranks = problem.mesh_of(*[2] * len(placements))
    where = [Replicate() if name == "w" else Shard(int(name)) for name in placements]
    # Use several parameters, because stochastic rounding depends on a parameter's place in the optimizer.
    values = [torch.linspace(-1, 1, torch.Size(shape).numel()).view(shape) for shape in ((7, 5), (3, 2, 5))]
    plain, sharded = (
        problem.trained_of(nn.ParameterList([nn.Parameter(place(each)) for each in values]), case)
        for place in (torch.clone, lambda tensor: distribute_tensor(tensor, ranks, where))
    )
    problem.steps(plain)
    with contextlib.ExitStack() as stack:
        if compiled:
            # Disable the caches, in which a rank would find code compiled by another for a shard of another size.
            name = "force_disable_caches"  # in another module in torch 2.6
            config = torch.compiler.config
            stack.enter_context((config if hasattr(config, name) else torch._inductor.config).patch({name: True}))
            sharded.optimizer.step = torch.compile(sharded.optimizer.step)
        problem.steps(sharded)
    return problem.strayed(sharded, plain)


def gradients_placed_otherwise() -> list[float]:
    """Return the deviations of a step by a gradient that is not yet summed, and by a whole one of a sharded parameter."""
    mesh = problem.mesh_of(2)
    values, grad = torch.linspace(-1, 1, 4), torch.tensor([0.5, -2.0, 0.25, 1.0])
    share = 0.25 if dist.get_rank() == 0 else 0.75
    params, grads = [values.clone()], [grad]
    for placement, given in (
        (Replicate(), DTensor.from_local(grad * share, mesh, [Partial()])),
        (Shard(0), distribute_tensor(grad, mesh, [Replicate()])),
    ):
        params.append(distribute_tensor(values.clone(), mesh, [placement]))
        grads.append(given)
    for param, param.grad in zip(params, grads, strict=True):
        VSGD([param.requires_grad_()], lr=0.1).step()
    return [problem.apart(param, params[0]) for param in params[1:]]


def steps_counted_at_lr_0() -> list[float]:
    """Return the counts after a first step at lr 0, when the gradients of one rank are zero, and when all are."""
    mesh = problem.mesh_of(2)
    counts = []
    for values in ([0.0, 0.0, 1.0, 1.0], [0.0] * 4):
        param = nn.Parameter(distribute_tensor(torch.ones(4), mesh, [Shard(0)]))
        param.grad = distribute_tensor(torch.tensor(values), mesh, [Shard(0)])
        optimizer = VSGD([param], lr=0.0)
        optimizer.step()
        counts.append(optimizer.state[param]["step"].item())
    return counts


def seen(case: problem.Case) -> dict[str, float]:
    """Return the relative deviations of monitor, noise scale, surprise and posterior from one process."""
    views = []
    for model, optimizer in (train_fsdp(case, dist.get_world_size()), problem.reference(case, dist.get_world_size())):
        looks: list[Any] = []
        with watch(optimizer, Monitor(looks, every=1), model.named_parameters(), batch_size=16):
            scale = optimizer.noise_scale(batch_size=16)
            surprise = optimizer.surprise()
            posteriors = [optimizer.posterior(param) for param in model.parameters()]
            optimizer.step()
        views.append(
            {
                "posterior": torch.cat([problem.whole(part).reshape(-1) for known in posteriors for part in known]),
                "noise_scale": torch.stack([*scale.overall, *(part for each in scale.tensors.values() for part in each)]),
                "surprise": torch.stack([*surprise.values()]),
                "monitor.watch": torch.tensor([*looks[0].scalars().values()]),
            }
        )
    return {name: _relatively_apart(views[0][name], views[1][name]) for name in views[0]}


def calibrated(case: problem.Case, *shape: int) -> tuple[float, float, list[int]]:
    """Return FSDP2's deviation, its unit divided by one process's, and how often each of the first two steps communicated."""
    model = problem.network(case)
    shard(model, case, *(shape or (dist.get_world_size(),)))
    trained = problem.trained_of(model, case)
    counts = []
    for seed in range(2):
        problem.loss_of(model, seed, dist.get_rank(), case).backward()
        with CommDebugMode() as communication:
            trained.optimizer.step()
        counts.append(communication.get_total_counts())
    again = train_fsdp(case, *(shape or (dist.get_world_size(),)))
    reference = problem.reference(case, dist.get_world_size())
    units = [each.optimizer.param_groups[0]["gradient_unit"] for each in (again, reference)]
    return problem.strayed(again, reference), units[0] / units[1] - 1, counts


def _relatively_apart(one: torch.Tensor, other: torch.Tensor) -> float:
    one, other = one.double(), other.double()
    assert torch.equal(one.isfinite(), other.isfinite())
    return ((one - other).abs() / other.abs().clamp(min=1e-12)).nan_to_num(0.0).max().item()


def strengths() -> dict[str, float]:
    """Return the prior strength of the same gradients, whole and in every placement; shards are even, uneven and empty."""
    generator = torch.Generator().manual_seed(0)
    whole = [torch.randn(shape, generator=generator) for shape in ((4, 6), (3, 5), (1,))]
    if torch.__version__ >= (2, 7):  # gloo of torch 2.6 does not support complex numbers
        whole.append(torch.complex(whole[0], whole[0].flip(0)))
    mesh = problem.mesh_of(dist.get_world_size())
    placed = {
        "whole": whole,
        "doubled": [2 * grad for grad in whole],
        "rows": [distribute_tensor(grad, mesh, [Shard(0)]) for grad in whole],
        "columns": [distribute_tensor(grad, mesh, [Shard(grad.dim() - 1)]) for grad in whole],
        "replicated": [distribute_tensor(grad, mesh, [Replicate()]) for grad in whole],
        "partial": [DTensor.from_local((3, -1)[dist.get_rank()] * grad, mesh, [Partial()]) for grad in whole],
    }
    return {name: prior_strength_from([grads]) for name, grads in placed.items()}


def noise_scale(micro_batches: int) -> tuple[MeasuredNoiseScale, int]:
    """Return what the meter measures under DDP, and how many collectives its step adds to DDP's."""
    case = problem.Case({}, dtype=torch.float64)
    model = DistributedDataParallel(problem.network(case))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rank = dist.get_rank()
    with NoiseScaleMeter(optimizer, micro_batch_size=8) as meter:
        for step in range(problem.STEPS):
            optimizer.zero_grad()
            for part in range(micro_batches):
                last = part == micro_batches - 1
                with contextlib.nullcontext() if last else model.no_sync():
                    problem.loss_of(model, step, micro_batches * rank + part, case).backward()
            with CommDebugMode() as seen:
                optimizer.step()
    return meter.read(), seen.get_total_counts()


def sharded_noise_scale() -> None:
    """Use the meter on a sharded model, which it rejects because its hooks see no gradients of a single rank."""
    case = problem.Case({})
    model = problem.network(case)
    shard(model, case, dist.get_world_size())
    NoiseScaleMeter(case.optimizer(model.parameters()), micro_batch_size=8)


def observed() -> tuple[float, float, list[int]]:
    """Return the deviations of posterior and surprise of sharded gradients from whole ones', and how often both communicate."""
    mesh = problem.mesh_of(dist.get_world_size(), device="cpu")
    whole = nn.Parameter(torch.zeros(7, 3, dtype=torch.float64))
    sharded = nn.Parameter(distribute_tensor(whole.detach(), mesh, [Shard(0)]))
    alone, together = (GradientObserver([("weight", param)]) for param in (whole, sharded))
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        whole.grad = torch.randn(7, 3, generator=generator, dtype=torch.float64)
        sharded.grad = distribute_tensor(whole.grad, mesh, [Shard(0)])
        alone.observe()
        with CommDebugMode() as observing:
            together.observe()
    with CommDebugMode() as asking:
        surprise = together.surprise()["weight"]
    pairs = zip(alone.posterior(whole), together.posterior(sharded), strict=True)
    apart = max(problem.apart(distribute_tensor(one, mesh, [Shard(0)]).to_local(), other) for one, other in pairs)
    counts = [each.get_total_counts() for each in (observing, asking)]
    return apart, abs(surprise / alone.surprise()["weight"] - 1).item(), counts
