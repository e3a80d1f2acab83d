"""What two processes run, by torchrun: trainings of each trainer, and how far they strayed from a plain loop in one.

The plain loop takes the mean gradient of two batches at a step, those that the two processes have.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from scaling.torch_problem import Trained, strayed, whole
from scripts import loaded
from torch import Tensor, nn
from torch.optim.lr_scheduler import LinearLR
from torch.utils.data import DataLoader, DistributedSampler, Subset
from trainers import torch_plain

from vsgd.torch import VSGD

RECIPES = Path(__file__).parents[2] / "docs" / "recipes"
STEPS = 12


def some(digits: Any) -> Any:
    """As many as two processes see in an epoch of so many steps."""
    return Subset(digits, range(2 * 64 * STEPS))


def loss_of(model: nn.Module, batch: list[Tensor]) -> Tensor:
    images, labels = batch
    return nn.functional.cross_entropy(model(images), labels)


def digest(trained: Trained) -> str:
    """Of every bit of this process's replica."""
    result = hashlib.sha256()
    for param in trained.model.parameters():
        for value in (param, *trained.optimizer.state[param].values()):
            result.update(whole(value).numpy().tobytes())
    return result.hexdigest()


def accelerate(folder: Path) -> dict[str, Any]:
    """Each process has every second batch."""
    from accelerate import Accelerator

    def model() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 10))

    def made() -> tuple[Trained, LinearLR]:
        network = model()
        optimizer = VSGD(network.parameters(), weight_decay=0.01)
        return Trained(network, optimizer), LinearLR(optimizer, start_factor=0.1, total_iters=20)

    with loaded(RECIPES / "with_accelerate.py") as recipe:
        batches = DataLoader(some(recipe.batches().dataset), batch_size=64)
    accelerator = Accelerator(cpu=True)
    trained, warm_up = made()
    network, optimizer, warm_up, shared = accelerator.prepare(*trained, warm_up, batches)
    for batch in shared:
        optimizer.zero_grad()
        accelerator.backward(loss_of(network, batch))
        accelerator.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        warm_up.step()
    ended, plain_warm_up = made()
    # Accelerate steps a schedule once for each process.
    schedulers = [plain_warm_up] * 2
    torch_plain.train(ended, loss_of, batches, accumulate=2, clip=torch_plain.to_norm_1, schedulers=schedulers)
    return {"processes": accelerator.num_processes, "strayed": strayed(trained, ended), "digest": digest(trained)}


def huggingface(folder: Path) -> dict[str, Any]:
    """As Accelerate, on which it is built; the schedule counts its steps."""
    import transformers

    def model() -> nn.Module:
        transformers.set_seed(0)
        return recipe.small_convnext()

    with loaded(RECIPES / "with_huggingface.py") as recipe:
        options = {
            "max_steps": STEPS,
            "warmup_steps": 20,
            "lr_scheduler_type": "constant_with_warmup",
            "train_sampling_strategy": "sequential",
            "disable_tqdm": True,
        }
        arguments = recipe.arguments(str(folder), **options)
        data = some(recipe.digits())
        kind = (VSGD, {"lr": 0.01})
        trainer = transformers.Trainer(model(), arguments, train_dataset=data, optimizer_cls_and_kwargs=kind)
        trainer.train()
        plain = model()
    ended = Trained(plain, VSGD(plain.parameters()))
    warm_up = transformers.get_constant_schedule_with_warmup(ended.optimizer, 20)
    batches = DataLoader(data, batch_size=64)
    torch_plain.train(
        ended,
        lambda network, batch: network(**batch).loss,
        batches,
        accumulate=2,
        clip=torch_plain.to_norm_1,
        schedulers=[warm_up],
    )
    trained = Trained(trainer.model, trainer.optimizer.optimizer)
    return {"processes": arguments.world_size, "strayed": strayed(trained, ended), "digest": digest(trained)}


def lightning_fit(recipe: Any, model: Any, strategy: Any, options: dict[str, Any], **fitting: Any) -> Any:
    import lightning

    quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False, "enable_progress_bar": False}
    trainer = lightning.Trainer(accelerator="cpu", devices=2, strategy=strategy, **quiet, **options)
    trainer.fit(model, DataLoader(some(recipe.batches().dataset), batch_size=64), **fitting)
    return trainer


def lightning_plain(recipe: Any, epochs: int, clip: torch_plain.Clip) -> Trained:
    torch.manual_seed(0)
    model = recipe.Digits()
    optimizer = VSGD(model.parameters(), weight_decay=0.01)
    warm_up = LinearLR(optimizer, start_factor=0.1, total_iters=20)
    ended = Trained(model.network, optimizer)
    for epoch in range(epochs):
        batches = in_turn(some(recipe.batches().dataset), epoch)
        torch_plain.train(ended, loss_of, batches, accumulate=2, clip=clip, schedulers=[warm_up])
    return ended


def in_turn(data: Any, epoch: int) -> Iterator[Any]:
    """Each process's batches; Lightning shuffles what several processes share, though the loader does not."""
    shares = []
    for rank in range(2):
        sampler = DistributedSampler(data, num_replicas=2, rank=rank)
        sampler.set_epoch(epoch)
        shares.append(DataLoader(data, batch_size=64, sampler=sampler))
    return chain.from_iterable(zip(*shares, strict=True))


def lightning_ddp(folder: Path) -> dict[str, Any]:
    """Replicas, their gradients cut."""
    with loaded(RECIPES / "with_lightning.py") as recipe:
        torch.manual_seed(0)
        trainer = lightning_fit(recipe, recipe.Digits(), "ddp", {"max_epochs": 1, "gradient_clip_val": 1.0})
        ended = lightning_plain(recipe, 1, torch_plain.to_norm_1)
    trained = Trained(trainer.lightning_module.network, trainer.optimizers[0])
    return {"processes": trainer.world_size, "strayed": strayed(trained, ended), "digest": digest(trained)}


def lightning_fsdp2(folder: Path) -> dict[str, Any]:
    """Parameters and state sharded; saved after one of two epochs, and resumed."""
    from lightning.pytorch.strategies import ModelParallelStrategy
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    with loaded(RECIPES / "with_lightning.py") as recipe:

        class Sharded(recipe.Digits):
            def configure_model(self) -> None:
                if not isinstance(self.network[0].weight, DTensor):
                    fully_shard(self.network, mesh=self.device_mesh["data_parallel"])

        def fit(epochs: int, **fitting: Any) -> Any:
            torch.manual_seed(0)
            strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
            return lightning_fit(recipe, Sharded(), strategy, {"max_epochs": epochs}, **fitting)

        fit(1).save_checkpoint(folder / "sharded")
        resumed = fit(2, ckpt_path=folder / "sharded")
        ended = lightning_plain(recipe, 2, torch_plain.untouched)
    trained = Trained(resumed.lightning_module.network, resumed.optimizers[0])
    here = sum(param.to_local().numel() for param in trained.model.parameters())
    return {
        "processes": resumed.world_size,
        "strayed": strayed(trained, ended),
        "digest": digest(trained),
        "here": here / sum(param.numel() for param in trained.model.parameters()),
        "steps": [state["step"].item() for state in trained.optimizer.state.values()],
    }


RUNS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "accelerate": accelerate,
    "transformers": huggingface,
    "lightning": lightning_ddp,
    "lightning, sharded": lightning_fsdp2,
}


def main() -> None:
    folder, *names = sys.argv[1:]
    torch.set_num_threads(1)
    for name in names:
        result = RUNS[name](Path(folder))
        (Path(folder) / f"{name}-{dist.get_rank()}.json").write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main()
