"""Test that each training by Lightning's Trainer, with the documentation's recipe, equals a plain loop bit for bit."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

torch = pytest.importorskip("torch")
lightning = pytest.importorskip("lightning")
pytest.importorskip("sklearn")

from scaling.torch_problem import Trained, strayed  # noqa: E402
from torch import nn  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402
from trainers.torch_plain import QUIET_LIGHTNING, assert_ends, loss_of  # noqa: E402

pytestmark = [
    # Lightning itself uses torch's tree of a batch in a deprecated way.
    pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated:FutureWarning"),
    # The digits are in memory, and need no workers.
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),
]
TRAINER = "lightning"


def fit(make: Any, batches: Any, dtype: torch.dtype = torch.float32, *, ckpt_path: Path | None = None, **options: Any) -> Any:
    torch.manual_seed(0 if ckpt_path is None else 1)  # 1: only loading restores the right values
    trainer = lightning.Trainer(**QUIET_LIGHTNING, **options)
    trainer.fit(make().to(dtype), batches, ckpt_path=ckpt_path)
    return trainer


def trained_by(trainer: Any) -> Trained:
    return Trained(trainer.lightning_module.network, trainer.optimizers[0])


def test_the_recipe(recipe: ModuleType) -> None:
    trainer = recipe.main()
    assert_ends(trained_by(trainer), [recipe.make_loader()] * 5, accumulate=2, clip="norm")
    assert trainer.callback_metrics["loss"] < 0.1


CLIPS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "norm": {"gradient_clip_val": 1.0},
    "value": {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
}


@pytest.mark.parametrize("accumulate", [1, 3])  # of 29 batches, 2 remain at the end of an epoch
@pytest.mark.parametrize("clip", CLIPS)
def test_accumulated_and_clipped(clip: str, accumulate: int, recipe: ModuleType) -> None:
    trainer = fit(recipe.Digits, recipe.make_loader(), max_epochs=1, accumulate_grad_batches=accumulate, **CLIPS[clip])
    assert trainer.global_step == -(-29 // accumulate)
    assert_ends(trained_by(trainer), [recipe.make_loader()], accumulate=accumulate, clip=clip)


def test_manual_optimization(recipe: ModuleType) -> None:
    class Manual(recipe.Digits):
        automatic_optimization = False

        def training_step(self, batch: list[torch.Tensor], index: int) -> None:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, index))
            self.clip_gradients(optimizer, gradient_clip_val=1.0)
            optimizer.step()
            self.lr_schedulers().step()

    trainer = fit(Manual, recipe.make_loader(), max_epochs=1)
    assert_ends(trained_by(trainer), [recipe.make_loader()], clip="norm")


PRECISIONS = {"bf16-mixed": torch.float32, "bf16-true": torch.bfloat16, "64-true": torch.float64}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_precision(precision: str, recipe: ModuleType, tmp_path: Path) -> None:
    dtype = PRECISIONS[precision]

    def precise_loss(model: nn.Module, batch: list[torch.Tensor]) -> torch.Tensor:
        images, labels = batch
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
            return loss_of(model, [images.to(dtype), labels])

    options = {"max_epochs": 1, "precision": precision, "gradient_clip_val": 1.0}
    trainer = fit(recipe.Digits, recipe.make_loader(), **options)
    # The state of bfloat16 parameters is float32, and a checkpoint preserves it.
    trainer.save_checkpoint(tmp_path / "ended.ckpt")
    # Start with this precision: Lightning loads before it converts, which in float32 would lose digits of float64.
    resumed = fit(recipe.Digits, recipe.make_loader(), dtype, ckpt_path=tmp_path / "ended.ckpt", **options)
    for each in (trainer, resumed):
        assert_ends(trained_by(each), [recipe.make_loader()], dtype, loss_of=precise_loss, clip="norm")
    expected = torch.float64 if precision == "64-true" else torch.float32
    assert {state["b_g"].dtype for state in resumed.optimizers[0].state.values()} == {expected}


def test_resumed_from_a_checkpoint(recipe: ModuleType, tmp_path: Path) -> None:
    # Use the same order in each epoch, because Lightning does not save a generator of the batches' order.
    batches = DataLoader(recipe.make_loader().dataset, batch_size=64)
    uninterrupted = fit(recipe.Digits, batches, max_epochs=3, accumulate_grad_batches=2)
    first = fit(recipe.Digits, batches, max_epochs=1, accumulate_grad_batches=2)
    assert first.lr_scheduler_configs[0].scheduler.get_last_lr()[0] < 0.01  # during the warm-up
    first.save_checkpoint(tmp_path / "first.ckpt")
    resumed = fit(recipe.Digits, batches, max_epochs=3, accumulate_grad_batches=2, ckpt_path=tmp_path / "first.ckpt")
    assert strayed(trained_by(resumed), trained_by(uninterrupted)) == 0
    assert {state["step"].item() for state in resumed.optimizers[0].state.values()} == {45.0}
