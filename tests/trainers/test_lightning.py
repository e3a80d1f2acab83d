"""Lightning's Trainer, on the recipe of the documentation: each training ends where a plain loop ends, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

torch = pytest.importorskip("torch")
lightning = pytest.importorskip("lightning")
pytest.importorskip("sklearn")

from research.scripts import loaded  # noqa: E402
from scaling.torch_problem import Trained, strayed  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.optim.lr_scheduler import LinearLR  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402
from trainers import torch_plain  # noqa: E402

from vsgd.torch import VSGD  # noqa: E402

pytestmark = [
    # Lightning's own: it asks torch's tree of a batch in an old way.
    pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated:FutureWarning"),
    # The digits are in memory.
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),
]
RECIPE = Path(__file__).parents[2] / "docs" / "recipes" / "with_lightning.py"
QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_model_summary": False,
    "enable_progress_bar": False,
}


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.chdir(tmp_path)  # where the recipe leaves its checkpoint
    with loaded(RECIPE) as module:
        yield module


def loss_of(model: nn.Module, batch: list[Tensor]) -> Tensor:
    images, labels = batch
    return nn.functional.cross_entropy(model(images), labels)


def plain(recipe: ModuleType, dtype: torch.dtype = torch.float32) -> tuple[Trained, LinearLR]:
    """What the recipe trains, made anew."""
    lightning.seed_everything(0, verbose=False)
    model = recipe.Digits().to(dtype)
    optimizer = VSGD(model.parameters(), lr=0.01, weight_decay=0.01)
    return Trained(model.network, optimizer), LinearLR(optimizer, start_factor=0.1, total_iters=20)


def fit(model: Any, batches: Any, options: dict[str, Any], **fitting: Any) -> Any:
    trainer = lightning.Trainer(**QUIET, **options)
    trainer.fit(model, batches, **fitting)
    return trainer


def trained_by(trainer: Any) -> Trained:
    return Trained(trainer.lightning_module.network, trainer.optimizers[0])


def fresh(recipe: ModuleType) -> Any:
    lightning.seed_everything(0, verbose=False)
    return recipe.Digits()


def test_the_recipe(recipe: ModuleType) -> None:
    trainer = recipe.main()
    ended, warm_up = plain(recipe)
    batches = recipe.make_loader()
    for _ in range(5):
        torch_plain.train(ended, loss_of, batches, accumulate=2, clip=torch_plain.to_norm_1, schedulers=[warm_up])
    assert strayed(trained_by(trainer), ended) == 0
    assert trainer.callback_metrics["loss"] < 0.1


@pytest.mark.parametrize("accumulate", [1, 3])  # of 29 batches, 2 are left at the end of an epoch
@pytest.mark.parametrize("by", ["nothing", "norm", "value"])
def test_accumulated_and_clipped(by: str, accumulate: int, recipe: ModuleType) -> None:
    options, clip = {
        "nothing": ({}, torch_plain.untouched),
        "norm": ({"gradient_clip_val": 1.0}, torch_plain.to_norm_1),
        "value": ({"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}, torch_plain.to_values_of_a_hundredth),
    }[by]
    batches = recipe.make_loader()
    trainer = fit(fresh(recipe), batches, {"max_epochs": 1, "accumulate_grad_batches": accumulate, **options})
    ended, warm_up = plain(recipe)
    torch_plain.train(ended, loss_of, recipe.make_loader(), accumulate=accumulate, clip=clip, schedulers=[warm_up])
    assert trainer.global_step == -(-29 // accumulate)
    assert strayed(trained_by(trainer), ended) == 0


def test_manual_optimization(recipe: ModuleType) -> None:
    class Manual(recipe.Digits):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: list[Tensor], index: int) -> None:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, index))
            self.clip_gradients(optimizer, gradient_clip_val=1.0)
            optimizer.step()
            self.lr_schedulers().step()

    lightning.seed_everything(0, verbose=False)
    trainer = fit(Manual(), recipe.make_loader(), {"max_epochs": 1})
    ended, warm_up = plain(recipe)
    torch_plain.train(ended, loss_of, recipe.make_loader(), clip=torch_plain.to_norm_1, schedulers=[warm_up])
    assert strayed(trained_by(trainer), ended) == 0


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")  # on purpose
def test_a_batch_without_loss_is_no_step(recipe: ModuleType) -> None:
    class Choosy(recipe.Digits):
        def training_step(self, batch: list[Tensor], index: int) -> Tensor | None:
            return super().training_step(batch, index) if index % 2 == 0 else None

    lightning.seed_everything(0, verbose=False)
    trainer = fit(Choosy(), recipe.make_loader(), {"max_epochs": 1})
    ended, warm_up = plain(recipe)
    for index, batch in enumerate(recipe.make_loader()):
        if index % 2 == 0:
            torch_plain.train(ended, loss_of, [batch])
        warm_up.step()  # Lightning counts the batches
    assert strayed(trained_by(trainer), ended) == 0
    assert {state["step"].item() for state in trainer.optimizers[0].state.values()} == {15.0}


PRECISIONS = {"bf16-mixed": torch.float32, "bf16-true": torch.bfloat16, "64-true": torch.float64}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_precision(precision: str, recipe: ModuleType, tmp_path: Path) -> None:
    def precise_loss(model: nn.Module, batch: list[Tensor]) -> Tensor:
        images, labels = batch
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
            return loss_of(model, [images.to(PRECISIONS[precision]), labels])

    options = {"max_epochs": 1, "precision": precision, "gradient_clip_val": 1.0}
    trainer = fit(fresh(recipe), recipe.make_loader(), options)
    ended, warm_up = plain(recipe, PRECISIONS[precision])
    torch_plain.train(ended, precise_loss, recipe.make_loader(), clip=torch_plain.to_norm_1, schedulers=[warm_up])
    assert strayed(trained_by(trainer), ended) == 0
    # The state of bfloat16 parameters is float32, and a checkpoint keeps it so.
    expected = torch.float64 if precision == "64-true" else torch.float32
    trainer.save_checkpoint(tmp_path / "ended.ckpt")
    # Of this precision before: Lightning loads first and converts then, which in float32 would lose digits of float64.
    model = fresh(recipe).to(PRECISIONS[precision])
    resumed = fit(model, recipe.make_loader(), options, ckpt_path=tmp_path / "ended.ckpt")
    assert strayed(trained_by(resumed), ended) == 0
    assert {state["b_g"].dtype for state in resumed.optimizers[0].state.values()} == {expected}


def test_resumed_from_a_checkpoint(recipe: ModuleType, tmp_path: Path) -> None:
    # In the same order in each epoch: Lightning keeps no generator of the batches' order.
    batches = DataLoader(recipe.make_loader().dataset, batch_size=64)
    uninterrupted = fit(fresh(recipe), batches, {"max_epochs": 3, "accumulate_grad_batches": 2})
    first = fit(fresh(recipe), batches, {"max_epochs": 1, "accumulate_grad_batches": 2})
    assert first.lr_scheduler_configs[0].scheduler.get_last_lr()[0] < 0.01  # amid the warm-up
    first.save_checkpoint(tmp_path / "first.ckpt")
    options = {"max_epochs": 3, "accumulate_grad_batches": 2}
    resumed = fit(recipe.Digits(), batches, options, ckpt_path=tmp_path / "first.ckpt")
    assert {state["step"].item() for state in resumed.optimizers[0].state.values()} == {45.0}
    assert strayed(trained_by(resumed), trained_by(uninterrupted)) == 0
    schedules = [trainer.lr_scheduler_configs[0].scheduler.state_dict() for trainer in (resumed, uninterrupted)]
    assert schedules[0] == schedules[1]


def test_two_processes_by_ddp(two_processes: Callable[[str], list[dict[str, Any]]]) -> None:
    one, other = two_processes("lightning, DDP")
    assert one["processes"] == 2
    assert one == other
    assert one["strayed"] == 0


def test_two_processes_by_fsdp2_resumed(two_processes: Callable[[str], list[dict[str, Any]]]) -> None:
    for seen in two_processes("lightning, FSDP2"):
        assert seen["here"] == 0.5
        assert seen["strayed"] == 0
