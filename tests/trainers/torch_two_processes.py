"""Run each trainer in two processes, by torchrun, and report how far it deviates from a plain loop in one process.

Each step of the plain loop takes the mean gradient of two batches, one of each process.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, DistributedSampler, Subset

# Append, so that an installed vsgd takes precedence over the checkout's.
sys.path.append(str(Path(__file__).parents[2]))

from research.scripts import loaded
from scaling.torch_problem import FSDP2_ON_CPU, Trained, apart, strayed, whole
from trainers.torch_plain import QUIET_LIGHTNING, fresh, loss_of, train, train_plainly

from vsgd.torch import VSGD

RECIPES = Path(__file__).parents[2] / "docs" / "recipes"
STEPS = 12

Seen = dict[str, Any]


def some(digits: Any) -> Any:
    """Return as many digits as two processes use in `STEPS` steps."""
    return Subset(digits, range(2 * 64 * STEPS))


def in_turn(data: Any, epochs: int) -> Iterator[Iterable[Any]]:
    """Yield the processes' batches of each epoch: a batch of one, then a batch of the other."""
    for epoch in range(epochs):
        shares = []
        for rank in range(2):
            sampler = DistributedSampler(data, num_replicas=2, rank=rank)
            sampler.set_epoch(epoch)
            shares.append(DataLoader(data, batch_size=64, sampler=sampler))
        yield chain.from_iterable(zip(*shares, strict=True))


def seen(processes: int, trained: Trained, ended: Trained) -> Seen:
    """Return a training's deviation, and a digest of every bit of this process's replica."""
    bits = hashlib.sha256()
    for param in trained.model.parameters():
        for value in (param, *trained.optimizer.state[param].values()):
            bits.update(whole(value).numpy().tobytes())
    return {"processes": processes, "strayed": strayed(trained, ended), "digest": bits.hexdigest()}


def accelerate(folder: Path) -> Seen:
    """Train with Accelerate, where each process gets every second batch."""
    from accelerate import Accelerator

    with loaded(RECIPES / "with_accelerate.py") as recipe:
        batches = DataLoader(some(recipe.make_loader().dataset), batch_size=64)
    accelerator = Accelerator(cpu=True)
    trained, schedule = fresh()
    network, optimizer, schedule, share = accelerator.prepare(*trained, schedule, batches)
    for batch in share:
        optimizer.zero_grad()
        accelerator.backward(loss_of(network, batch))
        accelerator.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    ended, warm_up = fresh()
    # Accelerate steps a schedule once for each process.
    train(ended, [batches], accumulate=2, clip="norm", schedulers=[warm_up, warm_up])
    return seen(accelerator.num_processes, trained, ended)


def huggingface(folder: Path) -> Seen:
    """Train with Hugging Face, where each process gets every second batch and a schedule counts the steps."""
    import transformers

    with loaded(RECIPES / "with_huggingface.py") as recipe:
        data = some(recipe.load_data())
        schedule = {"warmup_steps": 20, "lr_scheduler_type": "constant_with_warmup"}
        arguments = recipe.make_arguments(
            str(folder), max_steps=STEPS, train_sampling_strategy="sequential", disable_tqdm=True, **schedule
        )
        transformers.set_seed(0)
        kind = (VSGD, {"lr": 0.01})
        trainer = transformers.Trainer(recipe.make_convnext(), arguments, train_dataset=data, optimizer_cls_and_kwargs=kind)
        trainer.train()
        transformers.set_seed(0)
        network = recipe.make_convnext()
    ended = Trained(network, VSGD(network.parameters()))
    warm_up = transformers.get_constant_schedule_with_warmup(ended.optimizer, 20)
    batches = DataLoader(data, batch_size=64)
    train(ended, [batches], loss_of=lambda model, batch: model(**batch).loss, accumulate=2, clip="norm", schedulers=[warm_up])
    return seen(arguments.world_size, Trained(trainer.model, trainer.optimizer.optimizer), ended)


def lightning_fit(recipe: ModuleType, model: Any, strategy: Any, options: dict[str, Any], **fitting: Any) -> Any:
    import lightning

    trainer = lightning.Trainer(devices=2, strategy=strategy, **QUIET_LIGHTNING, **options)
    # Lightning distributes the data in a new order in each epoch, although the loader does not shuffle.
    trainer.fit(model, DataLoader(some(recipe.make_loader().dataset), batch_size=64), **fitting)
    return trainer


def lightning_seen(recipe: ModuleType, trainer: Any, clip: str) -> Seen:
    ended = train_plainly(in_turn(some(recipe.make_loader().dataset), trainer.current_epoch), accumulate=2, clip=clip)
    return seen(trainer.world_size, Trained(trainer.lightning_module.network, trainer.optimizers[0]), ended)


def lightning_ddp(folder: Path) -> Seen:
    """Train replicas with clipped gradients."""
    with loaded(RECIPES / "with_lightning.py") as recipe:
        torch.manual_seed(0)
        trainer = lightning_fit(recipe, recipe.Digits(), "ddp", {"max_epochs": 1, "gradient_clip_val": 1.0})
        return lightning_seen(recipe, trainer, "norm")


def lightning_fsdp2(folder: Path) -> Seen:
    """Train with sharded parameters and state; save after one of two epochs, and resume."""
    from lightning.pytorch.strategies import ModelParallelStrategy
    from torch.distributed.fsdp import fully_shard

    with loaded(RECIPES / "with_lightning.py") as recipe:

        class Sharded(recipe.Digits):
            def configure_model(self) -> None:
                fully_shard(self.network, mesh=self.device_mesh["data_parallel"])

        def fit(epochs: int, **fitting: Any) -> Any:
            torch.manual_seed(0)
            strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
            return lightning_fit(recipe, Sharded(), strategy, {"max_epochs": epochs}, **fitting)

        fit(1).save_checkpoint(folder / "sharded")
        resumed = fit(2, ckpt_path=folder / "sharded")
        params = list(resumed.lightning_module.parameters())
        here = sum(param.to_local().numel() for param in params) / sum(param.numel() for param in params)
        return {**lightning_seen(recipe, resumed, "nothing"), "here": here}


def deepspeed_zero(folder: Path) -> Seen:
    """Train with the recipe, and with each stage of ZeRO; save after one of two epochs, and resume."""
    import deepspeed

    # Otherwise it would be compiled now, although only inference needs it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    with loaded(RECIPES / "with_deepspeed.py") as recipe:
        engine, data = recipe.main(), recipe.make_loader().dataset
        strayed_by = {"recipe": gathered_apart(engine, data, 5)}
        for stage in range(4):
            config = {**recipe.CONFIG, "zero_optimization": {"stage": stage}}
            first = recipe.make_engine(config)
            recipe.train(first, recipe.make_loader(), 0)
            first.save_checkpoint(str(folder / f"stage-{stage}"))
            resumed = recipe.make_engine(config)
            resumed.load_checkpoint(str(folder / f"stage-{stage}"))
            recipe.train(resumed, recipe.make_loader(), 1)
            strayed_by[f"stage {stage}"] = gathered_apart(resumed, data, 2)
    return {"processes": engine.world_size, "strayed by": strayed_by}


def gathered_apart(engine: Any, data: Any, epochs: int) -> float:
    """Return the deviation of the parameters of both processes, gathered if they are sharded."""
    import deepspeed

    ended = train_plainly(in_turn(data, epochs), accumulate=2)
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        return max(apart(*pair) for pair in zip(engine.module.parameters(), ended.model.parameters(), strict=True))


#: The trainings, by the package that each needs and the variant.
RUNS: dict[str, Callable[[Path], Seen]] = {
    "accelerate": accelerate,
    "transformers": huggingface,
    "lightning, DDP": lightning_ddp,
    **({"lightning, FSDP2": lightning_fsdp2} if FSDP2_ON_CPU else {}),
    "deepspeed": deepspeed_zero,
}


def main() -> None:
    """Write the results of this process's trainings to FOLDER: `python torch_two_processes.py FOLDER`, by torchrun."""
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    os.chdir(folder)  # a recipe may write its checkpoint here
    results = {name: run(folder) for name, run in RUNS.items() if find_spec(name.partition(",")[0])}
    (folder / f"{dist.get_rank()}.json").write_text(json.dumps(results), encoding="utf-8")


if __name__ == "__main__":
    main()
