"""What each rank runs in the tests of checkpoints: how far what was saved, loaded and continued strayed from one process."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from scaling.torch_problem import Case, Trained, apart, network, strayed
from scaling.torch_sharded import shard
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.tensor import distribute_tensor

BEFORE, AFTER = range(3), range(3, 6)  # the seeds of the gradients before the checkpoint, and after it


def fresh(case: Case) -> Trained:
    """A model that is sharded where there are ranks."""
    model = network(case)
    if dist.is_initialized():
        shard(model, case, dist.get_world_size())
    return Trained(model, case.optimizer(model.parameters()))


def forgotten(case: Case) -> Trained:
    """A model, sharded where there are ranks, of which nothing is left to continue with."""
    trained = fresh(case)
    with torch.no_grad():
        for param in trained.model.parameters():
            param.zero_()
    return trained


def steps(trained: Trained, seeds: Iterable[int]) -> None:
    """Steps on gradients that depend on the seed only, however the parameters are sharded."""
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        for param in trained.model.parameters():
            grad = torch.randn(param.shape, generator=generator).to(param.dtype)
            sharded = hasattr(param, "placements")
            param.grad = distribute_tensor(grad, param.device_mesh, param.placements) if sharded else grad
        trained.optimizer.step()


def plain(case: Case) -> Trained:
    """One process that has come as far as the checkpoint."""
    model = network(case)
    trained = Trained(model, case.optimizer(model.parameters()))
    steps(trained, BEFORE)
    return trained


def continued(trained: Trained, case: Case) -> tuple[float, float]:
    """How far it strayed where it was loaded, and some steps later."""
    other = plain(case)
    loaded = strayed(trained, other)
    for each in (trained, other):
        steps(each, AFTER)
    return loaded, strayed(trained, other)


def save(case: Case, folder: str, flat: bool = False, asynchronous: bool = False) -> None:
    """Save what has come so far; where asynchronously, while the training goes on."""
    trained = trained_before(case)
    model, optimizer = get_state_dict(*trained, options=StateDictOptions(flatten_optimizer_state_dict=flat))
    states = {"model": model, "optimizer": optimizer}
    if not asynchronous:
        dcp.save(states, checkpoint_id=folder)
        return
    # A group of its own: what it tells the other ranks must not mix with what the training does.
    saving = dcp.async_save(states, checkpoint_id=folder, process_group=dist.new_group(backend="gloo"))
    steps(trained, AFTER)
    saving.result()


def load(case: Case, folder: str, flat: bool = False) -> tuple[float, float]:
    """How far a new model strayed, loaded and continued."""
    trained = forgotten(case)
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    model, optimizer = get_state_dict(*trained, options=options)
    states = {"model": model, "optimizer": optimizer}
    dcp.load(states, checkpoint_id=folder, no_dist=not dist.is_initialized())
    set_state_dict(*trained, model_state_dict=states["model"], optim_state_dict=states["optimizer"], options=options)
    return continued(trained, case)


def whole_state(case: Case) -> tuple[float, int, float]:
    """How far the state strayed that one rank got whole; how many parameters' it got; and the ranks' that it was given to."""
    trained = trained_before(case)
    gathered = get_optimizer_state_dict(*trained, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    one = plain(case)
    names = dict(one.model.named_parameters())
    states = gathered.get("state", {})
    farthest = max(
        (apart(value, one.optimizer.state[names[name]][key]) for name, state in states.items() for key, value in state.items()),
        default=0.0,
    )
    other = fresh(case)
    with torch.no_grad():
        for param, same in zip(other.model.parameters(), trained.model.parameters(), strict=True):
            param.copy_(same)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_optimizer_state_dict(*other, optim_state_dict=gathered, options=options)
    return farthest, len(states), max(continued(other, case))


def refused(case: Case) -> dict[str, tuple[str, float]]:
    """What is said of state that is not sharded like the parameters, and how far the optimizer strayed by it."""
    sharded = trained_before(case)
    saved = sharded.optimizer.state_dict()
    return {
        "local shards": _loading(sharded, _with_state(saved, lambda value: value.to_local()), case),
        "whole": _loading(trained_before(case), plain(case).optimizer.state_dict(), case),
        "sharded": _loading(plain(case), saved, case),
    }


def trained_before(case: Case) -> Trained:
    """A model, sharded where there are ranks, that has come as far as the checkpoint."""
    trained = fresh(case)
    steps(trained, BEFORE)
    return trained


def _loading(trained: Trained, state_dict: dict[str, Any], case: Case) -> tuple[str, float]:
    try:
        trained.optimizer.load_state_dict(state_dict)
    except ValueError as error:
        return str(error), max(continued(trained, case))
    return "nothing", 0.0


def _with_state(state_dict: dict[str, Any], change: Callable[[Any], Any]) -> dict[str, Any]:
    states = {
        index: {name: value if name == "step" else change(value) for name, value in state.items()}
        for index, state in state_dict["state"].items()
    }
    return {**state_dict, "state": states}
