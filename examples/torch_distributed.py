"""Train with VSGD on FSDP2, save distributed checkpoints, and resume automatically after a process dies.

The script trains a small network on scikit-learn's handwritten digits (8x8 pixels, no download) in as many processes as
torchrun starts, on CPUs or GPUs. The processes share the parameters and VSGD's state:

    pip install '.[examples]'
    torchrun --standalone --nproc-per-node 2 examples/torch_distributed.py

A run resumes from the last complete checkpoint in `--checkpoints`, if there is one. To try it, let a process kill itself during
training; torchrun then restarts all processes. The last line is a digest of all parameters and of the optimizer's state. It
equals the digest of an uninterrupted run because the batches depend only on the seed and the step:

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


def make_sharded_network(device: str) -> nn.Sequential:
    """Shard each layer among all processes; equal seeds give equal weights for any number of processes."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64), nn.GELU(), nn.Linear(64, 10)).to(device)
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def load_data(device: str) -> tuple[Tensor, Tensor]:
    """Load the 1797 digits with pixels scaled to [-1, 1], and their labels."""
    pixels, labels = load_digits(return_X_y=True)
    return torch.tensor(pixels, dtype=torch.float32, device=device) / 8 - 1, torch.tensor(labels, device=device)


def select_batch(step: int, examples: int, seed: int) -> Tensor:
    """Return the indices of a step's mini-batch: a new order in each epoch, without its incomplete last batch.

    The indices depend only on the seed and the step, so a resumed run uses the same batches as an uninterrupted one.
    """
    epoch, place = divmod(step, examples // BATCH_SIZE)
    order = torch.randperm(examples, generator=torch.Generator().manual_seed(1_000_003 * seed + epoch))
    return order[place * BATCH_SIZE : (place + 1) * BATCH_SIZE]


class Training(Stateful):
    """The contents of a checkpoint.

    Args:
        model: the model, sharded or not.
        optimizer: the optimizer of the model's parameters.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.optimizer, self.step = model, optimizer, 0

    def state_dict(self) -> dict[str, Any]:
        """Return state by parameter names, in sharded tensors, so that any number of processes can load it."""
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer, "step": self.step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the model, the optimizer and the step."""
        set_state_dict(
            self.model, self.optimizer, model_state_dict=state_dict["model"], optim_state_dict=state_dict["optimizer"]
        )
        self.step = state_dict["step"]


def find_last_checkpoint(folder: Path) -> Path | None:
    """Find the complete checkpoint with the most steps; `.metadata` is written last."""
    complete = [path.parent for path in folder.glob("step-*/.metadata")]
    return max(complete, key=lambda path: int(re.findall(r"\d+", path.name)[-1]), default=None)


def train(training: Training, arguments: argparse.Namespace, device: str) -> None:
    """Train up to the last step and save a checkpoint every `--every` steps."""
    images, labels = load_data(device)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    while training.step < arguments.steps:
        if training.step == arguments.die_at and rank == ranks - 1 and os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0":
            os.kill(os.getpid(), signal.SIGKILL)
        share = select_batch(training.step, len(images), arguments.seed)[rank::ranks]
        training.optimizer.zero_grad()
        loss = functional.cross_entropy(training.model(images[share]), labels[share])
        loss.backward()
        training.optimizer.step()
        training.step += 1
        if training.step % arguments.every == 0 or training.step == arguments.steps:
            dcp.save({"training": training}, checkpoint_id=arguments.checkpoints / f"step-{training.step}")
            print_once(f"step {training.step}: loss {loss.item():.4f} on rank 0, saved")


def print_once(text: str) -> None:
    """Print a text on rank 0 only."""
    if dist.get_rank() == 0:
        print(text, flush=True)


def join_group(device: str) -> None:
    """Join the process group that torchrun describes."""
    store, rank, ranks = next(dist.rendezvous("env://"))
    # After a restart the store still holds addresses of the dead processes.
    store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
    # Checkpoints exchange their plans on the CPU, so GPUs need gloo, too.
    backend = "cuda:nccl,cpu:gloo" if device == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=ranks)


def compute_digest(training: Training) -> str:
    """Hash every bit of the parameters and of the optimizer's state; all ranks return the same digest."""
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
    parser.add_argument("--checkpoints", type=Path, default=Path("checkpoints"), help="folder (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the data's order (default: %(default)s)")
    parser.add_argument("--die-at", type=int, metavar="STEP", help="kill the last process at this step, before any restart")
    arguments = parser.parse_args()
    if min(arguments.steps, arguments.every) < 1:
        parser.error(f"--steps is {arguments.steps} and --every is {arguments.every}, but both must be at least 1")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    else:
        torch.set_num_threads(1)  # more threads do not speed up so small a model
    join_group(device)
    model = make_sharded_network(device)
    training = Training(model, VSGD(model.parameters()))
    checkpoint = find_last_checkpoint(arguments.checkpoints)
    if checkpoint is not None:
        dcp.load({"training": training}, checkpoint_id=checkpoint)
        print_once(f"resumed at step {training.step}")
    train(training, arguments, device)
    print_once(f"ended at step {training.step}: {compute_digest(training)}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
