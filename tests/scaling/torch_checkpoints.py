"""Save, load and continue on each rank in the tests of checkpoints, and return the deviation from one process."""

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

BEFORE, AFTER = range(3), range(3, 6)  # the seeds of the gradients before and after the checkpoint


def fresh(case: Case) -> Trained:
    """Return a new model, sharded if there are ranks."""
    model = network(case)
    if dist.is_initialized():
        shard(model, case, dist.get_world_size())
    return trained_of(model, case)


def before(trained: Trained) -> Trained:
    """Train up to the checkpoint."""
    steps(trained, BEFORE)
    return trained


def plain(case: Case) -> Trained:
    """Return one process's training up to the checkpoint."""
    return before(trained_of(network(case), case))


def continued(trained: Trained, case: Case) -> float:
    """Return the largest deviation, after loading and after some more steps."""
    other = plain(case)
    loaded = strayed(trained, other)
    for each in (trained, other):
        steps(each, AFTER)
    return max(loaded, strayed(trained, other))


def save(case: Case, folder: str, form: str) -> None:
    """Save a training at the checkpoint; if asynchronous, while the training continues."""
    trained = before(fresh(case))
    options = StateDictOptions(flatten_optimizer_state_dict=form == "flat")
    model, optimizer = get_state_dict(*trained, options=options)
    states = {"model": model, "optimizer": optimizer}
    if form != "asynchronous":
        dcp.save(states, checkpoint_id=folder)
        return
    # Use a separate group, so that its messages to other ranks do not mix with the training's.
    saving = dcp.async_save(states, checkpoint_id=folder, process_group=dist.new_group(backend="gloo"))
    steps(trained, AFTER)
    saving.result()


def load(case: Case, folder: str, form: str) -> float:
    """Load into a new model, and return its deviation, also after some more steps."""
    trained = fresh(case)
    options = StateDictOptions(flatten_optimizer_state_dict=form == "flat")
    model, optimizer = get_state_dict(*trained, options=options)
    states = {"model": model, "optimizer": optimizer}
    dcp.load(states, checkpoint_id=folder, no_dist=not dist.is_initialized())
    set_state_dict(*trained, model_state_dict=states["model"], optim_state_dict=states["optimizer"], options=options)
    return continued(trained, case)


def gathered(case: Case) -> float:
    """Return the deviation of a model that got its state from one rank, which had gathered it."""
    trained, other = before(fresh(case)), fresh(case)
    whole = get_optimizer_state_dict(*trained, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    with torch.no_grad():
        for param, same in zip(other.model.parameters(), trained.model.parameters(), strict=True):
            param.copy_(same)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_optimizer_state_dict(*other, optim_state_dict=whole, options=options)
    return continued(other, case)


def refused(case: Case) -> tuple[dict[str, str], float]:
    """Return the error messages for state that is sharded unlike the parameters, and the optimizers' deviation afterwards."""
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
