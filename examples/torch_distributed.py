"""Train with VSGD on FSDP2, save distributed checkpoints, and resume from the last one after a process dies.

    pip install '.[examples]'
    torchrun --standalone --nproc-per-node 2 --max-restarts 1 examples/torch_distributed.py --die-at 90

`--die-at` kills a process at that step, and torchrun then restarts all of them. The resumed run ends with the same bits as an
uninterrupted one, because a batch depends only on its step.
"""

import argparse
import os
import signal
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from sklearn.datasets import load_digits
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from tqdm import tqdm

from vsgd.torch import ConstantVSGD

STEPS, EVERY = 200, 40  # mini-batches in all, and between two checkpoints


def make_sharded_network(device: str) -> nn.Sequential:
    """Shard each layer among all processes; equal seeds give equal weights for any number of processes."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64), nn.GELU(), nn.Linear(64, 10)).to(device)
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    for layer in model[::2]:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def resume(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> int:
    """Load the last complete checkpoint, whose `.metadata` is written last, and return its step or 0."""
    last = max((int(path.parent.name) for path in folder.glob("*/.metadata")), default=0)
    if last:
        state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
        dcp.load(state, checkpoint_id=folder / str(last))
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    return last


parser = argparse.ArgumentParser(description="VSGD on FSDP2, with checkpoints: run it with torchrun.")
parser.add_argument("--checkpoints", type=Path, default=Path("checkpoints"), help="folder (default: %(default)s)")
parser.add_argument("--die-at", type=int, metavar="STEP", help="kill the last process at this step, before any restart")
arguments, restarts = parser.parse_args(), os.environ["TORCHELASTIC_RESTART_COUNT"]
device = "cuda" if torch.cuda.is_available() else "cpu"
store, rank, ranks = next(dist.rendezvous("env://"))
store = dist.PrefixStore(restarts, store)  # after a restart it still holds addresses of the dead processes
# Checkpoints exchange their plans on the CPU, so GPUs need gloo, too.
dist.init_process_group("cuda:nccl,cpu:gloo" if device == "cuda" else "gloo", store=store, rank=rank, world_size=ranks)
if device == "cuda":
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
pixels, digits = load_digits(return_X_y=True)
images, labels = torch.tensor(pixels / 8 - 1, dtype=torch.float32, device=device), torch.tensor(digits, device=device)
model = make_sharded_network(device)
optimizer = ConstantVSGD(model.parameters(), lr=0.008)
first = resume(model, optimizer, arguments.checkpoints)
for step in tqdm(range(first, STEPS), initial=first, total=STEPS, unit="step", disable=rank > 0):
    if step == arguments.die_at and rank == ranks - 1 and restarts == "0":
        signal.raise_signal(signal.SIGKILL)
    batch = torch.randint(len(images), (64,), generator=torch.Generator().manual_seed(step))[rank::ranks]
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
    loss.backward()
    optimizer.step()
    if (step + 1) % EVERY == 0:
        state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
        dcp.save(state, checkpoint_id=arguments.checkpoints / str(step + 1))
        if rank == 0:
            tqdm.write(f"step {step + 1}: loss {loss.item():.4f} on rank 0, saved")
dist.destroy_process_group()
