"""Test that each training by Hugging Face's Trainer, with the documentation's recipe, equals a plain loop bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from research.scripts import need

torch = pytest.importorskip("torch")
need("transformers", "accelerate", "sklearn")

import transformers  # noqa: E402
from scaling.torch_problem import Trained, strayed  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.optim.lr_scheduler import LinearLR  # noqa: E402
from trainers.torch_plain import train  # noqa: E402

from vsgd.torch import VSGD  # noqa: E402

TRAINER = "huggingface"


def loss_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(**batch).loss


def loss_in_bfloat16(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return loss_of(model, batch)


def grouped(model: nn.Module) -> VSGD:
    """Return the optimizer with no decay of biases and normalizations."""
    groups: dict[float, list[nn.Parameter]] = {0.01: [], 0.0: []}
    for module in model.modules():
        for name, param in module.named_parameters(recurse=False):
            groups[0.0 if name == "bias" or isinstance(module, nn.LayerNorm) else 0.01].append(param)
    return VSGD([{"params": params, "weight_decay": decay} for decay, params in groups.items()], lr=0.01)


def epochs(trainer: transformers.Trainer, number: int) -> Iterator[Any]:
    """Yield the batches of each epoch."""
    transformers.set_seed(trainer.args.seed)  # like the Trainer, whose batch order depends on it
    loader = trainer.get_train_dataloader()
    for epoch in range(number):
        loader.set_epoch(epoch)
        yield loader


def fresh(recipe: ModuleType) -> nn.Module:
    transformers.set_seed(0)
    return recipe.make_convnext()


def trained_by(trainer: transformers.Trainer) -> Trained:
    return Trained(trainer.model, trainer.optimizer.optimizer)


def ungrouped(model: nn.Module) -> VSGD:
    return VSGD(model.parameters(), lr=0.01)


#: The optimizer and its schedule, by the recipe's function.
TRAININGS: dict[str, tuple[Callable[[nn.Module], VSGD], Callable[[VSGD], Any]]] = {
    "train_with_trainer_groups": (
        grouped,
        partial(transformers.get_cosine_schedule_with_warmup, num_warmup_steps=10, num_training_steps=116),
    ),
    "train_with_own_schedule": (ungrouped, partial(LinearLR, start_factor=0.1, total_iters=10)),
}


@pytest.mark.parametrize("name", TRAININGS)
def test_the_recipe(name: str, recipe: ModuleType, tmp_path: Path) -> None:
    trainer = getattr(recipe, name)(str(tmp_path))
    make_optimizer, make_schedule = TRAININGS[name]
    model = fresh(recipe)
    ended = Trained(model, make_optimizer(model))
    train(ended, epochs(trainer, 4), loss_of=loss_of, clip="norm", schedulers=[make_schedule(ended.optimizer)])
    assert strayed(trained_by(trainer), ended) == 0
    losses = [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.5 < losses[0]


def trainer_of(recipe: ModuleType, folder: Path, **options: Any) -> transformers.Trainer:
    """Return the recipe's trainer, by default with ten steps of a constant learning rate."""
    given = {"max_steps": 10, "weight_decay": 0.01, "lr_scheduler_type": "constant", **options}
    arguments = recipe.make_arguments(str(folder), **given)
    kind = (VSGD, {"lr": 0.01})
    return transformers.Trainer(fresh(recipe), arguments, train_dataset=recipe.load_data(), optimizer_cls_and_kwargs=kind)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("norm", [0.0, 1.0])
def test_accumulated_clipped_and_in_bfloat16(
    norm: float, accumulate: int, bf16: bool, recipe: ModuleType, tmp_path: Path
) -> None:
    trainer = trainer_of(recipe, tmp_path, max_grad_norm=norm, gradient_accumulation_steps=accumulate, bf16=bf16)
    trainer.train()
    model = fresh(recipe)
    ended = Trained(model, grouped(model))
    batches = list(next(epochs(trainer, 1)))[: 10 * accumulate]
    loss = loss_in_bfloat16 if bf16 else loss_of
    train(ended, [batches], loss_of=loss, accumulate=accumulate, clip="norm" if norm else "nothing")
    assert strayed(trained_by(trainer), ended) == 0


@pytest.mark.parametrize("bf16", [False, True])
def test_resumed_from_a_checkpoint(bf16: bool, recipe: ModuleType, tmp_path: Path) -> None:
    # The checkpoint is within the second of two epochs, and within a warm-up.
    options = {"max_steps": 40, "save_steps": 35, "warmup_steps": 38, "lr_scheduler_type": "linear", "bf16": bf16}
    uninterrupted = trainer_of(recipe, tmp_path, **options)
    uninterrupted.train()
    resumed = trainer_of(recipe, tmp_path, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-35"))
    assert strayed(trained_by(resumed), trained_by(uninterrupted)) == 0
    assert {state["step"].item() for state in resumed.optimizer.optimizer.state.values()} == {40.0}
