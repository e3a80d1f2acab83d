"""What each rank runs in the tests of checkpoints: how far what was saved, loaded and continued strayed from one process."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from scaling.torch_problem import Case, Trained, network, steps, strayed, trained_of
from scaling.torch_sharded import shard
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)

BEFORE, AFTER = range(3), range(3, 6)  # the seeds of the gradients before the checkpoint, and after it


def fresh(case: Case) -> Trained:
    """A model that is sharded where there are ranks."""
    model = network(case)
    if dist.is_initialized():
        shard(model, case, dist.get_world_size())
    return trained_of(model, case)


def before(trained: Trained) -> Trained:
    """What has come as far as the checkpoint."""
    steps(trained, BEFORE)
    return trained


def plain(case: Case) -> Trained:
    """One process that has come as far as the checkpoint."""
    return before(trained_of(network(case), case))


def continued(trained: Trained, case: Case) -> float:
    """How far it strayed where it was loaded, and some steps later."""
    other = plain(case)
    loaded = strayed(trained, other)
    for each in (trained, other):
        steps(each, AFTER)
    return max(loaded, strayed(trained, other))


def save(case: Case, folder: str, form: str) -> None:
    """Save what has come so far; where asynchronously, while the training goes on."""
    trained = before(fresh(case))
    options = StateDictOptions(flatten_optimizer_state_dict=form == "flat")
    model, optimizer = get_state_dict(*trained, options=options)
    states = {"model": model, "optimizer": optimizer}
    if form != "asynchronous":
        dcp.save(states, checkpoint_id=folder)
        return
    # A group of its own: what it tells the other ranks must not mix with what the training does.
    saving = dcp.async_save(states, checkpoint_id=folder, process_group=dist.new_group(backend="gloo"))
    steps(trained, AFTER)
    saving.result()


def load(case: Case, folder: str, form: str) -> float:
    """How far a new model strayed, loaded and continued."""
    trained = fresh(case)
    options = StateDictOptions(flatten_optimizer_state_dict=form == "flat")
    model, optimizer = get_state_dict(*trained, options=options)
    states = {"model": model, "optimizer": optimizer}
    dcp.load(states, checkpoint_id=folder, no_dist=not dist.is_initialized())
    set_state_dict(*trained, model_state_dict=states["model"], optim_state_dict=states["optimizer"], options=options)
    return continued(trained, case)


def gathered(case: Case) -> float:
    """How far a model strayed that was given the state that one rank had got whole."""
    trained, other = before(fresh(case)), fresh(case)
    whole = get_optimizer_state_dict(*trained, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    with torch.no_grad():
        for param, same in zip(other.model.parameters(), trained.model.parameters(), strict=True):
            param.copy_(same)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_optimizer_state_dict(*other, optim_state_dict=whole, options=options)
    return continued(other, case)


def refused(case: Case) -> tuple[dict[str, str], float]:
    """What is said of state that is not sharded like the parameters, and how far the optimizers strayed by it."""
    sharded, one = before(fresh(case)), plain(case)
    saved = sharded.optimizer.state_dict()
    local = {
        index: {name: value if name == "step" else value.to_local() for name, value in state.items()}
        for index, state in saved["state"].items()
    }
    said = {}
    for name, trained, given in (
        ("local shards", sharded, {**saved, "state": local}),
        ("whole", sharded, one.optimizer.state_dict()),
        ("sharded", one, saved),
    ):
        with pytest.raises(ValueError, match="parameter") as error:
            trained.optimizer.load_state_dict(given)
        said[name] = str(error.value)
    return said, max(continued(trained, case) for trained in (sharded, one))
