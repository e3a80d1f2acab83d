"""Sharded training that survives: VSGD on FSDP2, with distributed checkpoints, resumed by itself where a process dies.

Trains a small network on scikit-learn's handwritten digits (8x8 pixels, no download) in as many processes as torchrun starts,
on CPUs or GPUs, parameters and VSGD's state sharded among them:

    pip install '.[examples]'
    torchrun --standalone --nproc-per-node 2 examples/torch_distributed.py

It begins with the last whole checkpoint in `--checkpoints`, where there is one. To see it, let a process kill itself in
mid-training, and torchrun start all anew; the last line, a digest of all parameters and of the optimizer's state, is that of a
run without a break, for the batches depend on the seed and on the step only:

    torchrun --standalone --nproc-per-node 2 --max-restarts 1 examples/torch_distributed.py --die-at 90
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import signal
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional

from vsgd.torch import VSGD

BATCH_SIZE = 64  # of all processes together


def sharded_network(device: str) -> nn.Sequential:
    """Each layer sharded among all processes; equal seeds give equal weights whatever their number."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64), nn.GELU(), nn.Linear(64, 10)).to(device)
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def load_data(device: str) -> tuple[Tensor, Tensor]:
    """The 1797 digits, pixels scaled to [-1, 1], and their labels."""
    pixels, labels = load_digits(return_X_y=True)
    return torch.tensor(pixels, dtype=torch.float32, device=device) / 8 - 1, torch.tensor(labels, device=device)


def batch_of(step: int, examples: int, seed: int) -> Tensor:
    """Indices of a step's mini-batch: a new order in each epoch, its incomplete last batch dropped.

    Of the seed and the step alone, so that a resumed run sees what it would have seen.
    """
    epoch, place = divmod(step, examples // BATCH_SIZE)
    order = torch.randperm(examples, generator=torch.Generator().manual_seed(1_000_003 * seed + epoch))
    return order[place * BATCH_SIZE : (place + 1) * BATCH_SIZE]


class Training(Stateful):
    """All that a checkpoint holds.

    Args:
        model: sharded or not.
        optimizer: of its parameters.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.optimizer, self.step = model, optimizer, 0

    def state_dict(self) -> dict[str, Any]:
        """Names instead of places, and sharded tensors that say which part they are: any number of processes can load it."""
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer, "step": self.step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        set_state_dict(
            self.model, self.optimizer, model_state_dict=state_dict["model"], optim_state_dict=state_dict["optimizer"]
        )
        self.step = state_dict["step"]


def last_checkpoint(folder: Path) -> Path | None:
    """The one with the most steps, of those that are whole: their metadata are written last."""
    whole = [path.parent for path in folder.glob("step-*/.metadata")]
    return max(whole, key=lambda path: int(re.findall(r"\d+", path.name)[-1]), default=None)


def train(training: Training, arguments: argparse.Namespace, device: str) -> None:
    """Train up to the last step, with a checkpoint every so many."""
    images, labels = load_data(device)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    while training.step < arguments.steps:
        if training.step == arguments.die_at and rank == ranks - 1 and os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0":
            os.kill(os.getpid(), signal.SIGKILL)
        mine = batch_of(training.step, len(images), arguments.seed)[rank::ranks]
        training.optimizer.zero_grad()
        loss = functional.cross_entropy(training.model(images[mine]), labels[mine])
        loss.backward()
        training.optimizer.step()
        training.step += 1
        if training.step % arguments.every == 0 or training.step == arguments.steps:
            dcp.save({"training": training}, checkpoint_id=arguments.checkpoints / f"step-{training.step}")
            say(f"step {training.step}: loss {loss.item():.4f} on rank 0, saved")


def say(what: str) -> None:
    """Print it once."""
    if dist.get_rank() == 0:
        print(what, flush=True)


def join_group(device: str) -> None:
    """Join the process group that torchrun wants."""
    store, rank, ranks = next(dist.rendezvous("env://"))
    # A restart finds the same store, in which the addresses of the dead still stand.
    store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
    # gloo too on GPUs: the checkpoints' plans travel by the CPU.
    backend = "cuda:nccl,cpu:gloo" if device == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=ranks)


def digest(training: Training) -> str:
    """Of every bit of the parameters and of the optimizer's state; the same on all ranks."""
    result = hashlib.sha256()
    for name, param in sorted(training.model.named_parameters()):
        for key, value in sorted([("param", param), *training.optimizer.state[param].items()]):
            whole = value.full_tensor() if hasattr(value, "full_tensor") else value
            result.update(f"{name} {key}".encode() + whole.detach().cpu().numpy().tobytes())
    return result.hexdigest()


def main() -> None:
    """Train from the command line, under torchrun."""
    parser = argparse.ArgumentParser(description="VSGD on FSDP2, with checkpoints.")
    parser.add_argument("--steps", type=int, default=200, help="mini-batches (default: %(default)s)")
    parser.add_argument("--every", type=int, default=40, help="steps between two checkpoints (default: %(default)s)")
    parser.add_argument("--checkpoints", type=Path, default=Path("checkpoints"), help="where (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the order of the data (default: %(default)s)")
    parser.add_argument("--die-at", type=int, metavar="STEP", help="the last process kills itself there, the first time")
    arguments = parser.parse_args()
    if min(arguments.steps, arguments.every) < 1:
        parser.error("--steps and --every must be at least 1")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    else:
        torch.set_num_threads(1)  # so small a model gains nothing by more
    join_group(device)
    model = sharded_network(device)
    training = Training(model, VSGD(model.parameters()))
    checkpoint = last_checkpoint(arguments.checkpoints)
    if checkpoint is not None:
        dcp.load({"training": training}, checkpoint_id=checkpoint)
        say(f"resumed at step {training.step}")
    train(training, arguments, device)
    say(f"ended at step {training.step}: {digest(training)}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
