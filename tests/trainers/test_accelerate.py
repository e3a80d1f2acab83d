"""Test that each training by Accelerate, with the documentation's recipe, equals a plain loop bit for bit."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
from research.scripts import need

torch = pytest.importorskip("torch")
need("accelerate", "sklearn")

from accelerate import Accelerator  # noqa: E402
from accelerate.state import AcceleratorState, GradientState  # noqa: E402
from scaling.torch_problem import Trained, strayed  # noqa: E402
from torch import nn  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402
from trainers.torch_plain import assert_ends, fresh, loss_of  # noqa: E402

TRAINER = "accelerate"


@pytest.fixture(autouse=True)
def no_other_accelerator() -> Iterator[None]:
    """Reset the process's single state of all accelerators, which stores their precision and the position of their loaders."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture
def in_order(recipe: ModuleType) -> DataLoader[Any]:
    return DataLoader(recipe.make_loader().dataset, batch_size=64)


def test_the_recipe(recipe: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    trained = Trained(*recipe.main())
    assert_ends(trained, [recipe.make_loader()] * 5, accumulate=2, clip="norm")
    said = re.findall(r"epoch (\d): loss ([\d.]+)", capsys.readouterr().out)
    assert [epoch for epoch, _ in said] == ["1", "2", "3", "4", "5"]
    assert float(said[-1][1]) < 0.1


class Prepared(NamedTuple):
    """A training that Accelerate runs."""

    accelerator: Accelerator
    model: nn.Module
    optimizer: Any
    warm_up: Any

    @classmethod
    def fresh(cls, **options: Any) -> Prepared:
        accelerator = Accelerator(cpu=True, **options)
        trained, warm_up = fresh()
        return cls(accelerator, *accelerator.prepare(*trained, warm_up))

    def train(self, batches: Iterable[Any], clip: str = "nothing") -> Trained:
        for batch in batches:
            with self.accelerator.accumulate(self.model):
                self.accelerator.backward(loss_of(self.model, batch))
                if self.accelerator.sync_gradients and clip == "norm":
                    self.accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
                if self.accelerator.sync_gradients and clip == "value":
                    self.accelerator.clip_grad_value_(self.model.parameters(), 0.01)
                self.optimizer.step()
                self.warm_up.step()
                self.optimizer.zero_grad()
        return Trained(self.accelerator.unwrap_model(self.model), self.optimizer.optimizer)


@pytest.mark.parametrize("accumulate", [1, 3])  # of 29 batches, 2 remain at the end
@pytest.mark.parametrize("clip", ["nothing", "norm", "value"])
def test_accumulated_and_clipped(clip: str, accumulate: int, in_order: DataLoader[Any]) -> None:
    training = Prepared.fresh(gradient_accumulation_steps=accumulate)
    trained = training.train(training.accelerator.prepare(in_order), clip)
    assert_ends(trained, [in_order], accumulate=accumulate, clip=clip)


def test_in_bfloat16(in_order: DataLoader[Any]) -> None:
    def loss_in_bfloat16(model: nn.Module, batch: list[torch.Tensor]) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return loss_of(model, batch)

    training = Prepared.fresh(mixed_precision="bf16")
    trained = training.train(training.accelerator.prepare(in_order))
    assert_ends(trained, [in_order], loss_of=loss_in_bfloat16)


def test_resumed_from_a_saved_state(in_order: DataLoader[Any], tmp_path: Path) -> None:
    uninterrupted = Prepared.fresh()
    for index, batch in enumerate(uninterrupted.accelerator.prepare(in_order)):
        if index == 10:  # during the warm-up
            uninterrupted.accelerator.save_state(str(tmp_path))
        ended = uninterrupted.train([batch])
    AcceleratorState._reset_state(reset_partial_state=True)
    resumed = Prepared.fresh()
    batches = resumed.accelerator.prepare(in_order)
    resumed.accelerator.load_state(str(tmp_path))
    assert strayed(resumed.train(resumed.accelerator.skip_first_batches(batches, 10)), ended) == 0
    assert {state["step"].item() for state in resumed.optimizer.state.values()} == {29.0}
