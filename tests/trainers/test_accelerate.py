"""Accelerate, on the recipe of the documentation: each training ends where a plain loop ends, bit for bit."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest

torch = pytest.importorskip("torch")
for package in ("accelerate", "sklearn"):
    pytest.importorskip(package)

from accelerate import Accelerator  # noqa: E402
from accelerate.state import AcceleratorState, GradientState  # noqa: E402
from research.scripts import loaded  # noqa: E402
from scaling.torch_problem import Trained, strayed  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.optim.lr_scheduler import LinearLR  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402
from trainers import torch_plain  # noqa: E402

from vsgd.torch import VSGD  # noqa: E402

RECIPE = Path(__file__).parents[2] / "docs" / "recipes" / "with_accelerate.py"


@pytest.fixture(autouse=True)
def no_other_accelerator() -> Iterator[None]:
    """A process has one state of all accelerators, which remembers their precision and where their loaders are."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture
def recipe() -> Iterator[ModuleType]:
    with loaded(RECIPE) as module:
        yield module


def loss_of(model: nn.Module, batch: list[Tensor]) -> Tensor:
    images, labels = batch
    return nn.functional.cross_entropy(model(images), labels)


def plain() -> tuple[Trained, LinearLR]:
    """What the recipe trains, made anew."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 10))
    optimizer = VSGD(model.parameters(), lr=0.01, weight_decay=0.01)
    return Trained(model, optimizer), LinearLR(optimizer, start_factor=0.1, total_iters=20)


def in_order(recipe: ModuleType) -> DataLoader[Any]:
    return DataLoader(recipe.make_loader().dataset, batch_size=64)


def test_the_recipe(recipe: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    model, optimizer = recipe.main()
    ended, warm_up = plain()
    batches = recipe.make_loader()
    for _ in range(5):
        torch_plain.train(ended, loss_of, batches, accumulate=2, clip=torch_plain.to_norm_1, schedulers=[warm_up])
    assert strayed(Trained(model, optimizer), ended) == 0
    said = re.findall(r"epoch (\d): loss ([\d.]+)", capsys.readouterr().out)
    assert [epoch for epoch, _ in said] == ["1", "2", "3", "4", "5"]
    assert float(said[-1][1]) < 0.1


class Prepared(NamedTuple):
    """A training that Accelerate drives."""

    accelerator: Accelerator
    model: nn.Module
    optimizer: Any
    warm_up: Any

    @classmethod
    def fresh(cls, **options: Any) -> Prepared:
        accelerator = Accelerator(cpu=True, **options)
        trained, warm_up = plain()
        return cls(accelerator, *accelerator.prepare(*trained, warm_up))

    def train(self, batches: Iterable[Any], clip: torch_plain.Clip = torch_plain.untouched) -> None:
        for batch in batches:
            with self.accelerator.accumulate(self.model):
                self.accelerator.backward(loss_of(self.model, batch))
                if self.accelerator.sync_gradients:
                    clip(self.model.parameters())
                self.optimizer.step()
                self.warm_up.step()
                self.optimizer.zero_grad()

    @property
    def trained(self) -> Trained:
        return Trained(self.accelerator.unwrap_model(self.model), self.optimizer.optimizer)


@pytest.mark.parametrize("accumulate", [1, 3])  # of 29 batches, 2 are left at the end
@pytest.mark.parametrize("by", ["nothing", "norm", "value"])
def test_accumulated_and_clipped(by: str, accumulate: int, recipe: ModuleType) -> None:
    training = Prepared.fresh(gradient_accumulation_steps=accumulate)
    theirs, ours = {
        "nothing": (torch_plain.untouched, torch_plain.untouched),
        "norm": (lambda params: training.accelerator.clip_grad_norm_(params, 1.0), torch_plain.to_norm_1),
        "value": (
            lambda params: training.accelerator.clip_grad_value_(params, 0.01),
            torch_plain.to_values_of_a_hundredth,
        ),
    }[by]
    training.train(training.accelerator.prepare(in_order(recipe)), theirs)
    ended, warm_up = plain()
    torch_plain.train(ended, loss_of, in_order(recipe), accumulate=accumulate, clip=ours, schedulers=[warm_up])
    assert strayed(training.trained, ended) == 0


def test_in_bfloat16(recipe: ModuleType) -> None:
    def loss_in_bfloat16(model: nn.Module, batch: list[Tensor]) -> Tensor:
        images, labels = batch
        with torch.autocast("cpu", torch.bfloat16):
            output = model(images)
        return nn.functional.cross_entropy(output.float(), labels)

    training = Prepared.fresh(mixed_precision="bf16")
    training.train(training.accelerator.prepare(in_order(recipe)))
    ended, warm_up = plain()
    torch_plain.train(ended, loss_in_bfloat16, in_order(recipe), schedulers=[warm_up])
    assert strayed(training.trained, ended) == 0


def test_resumed_from_a_saved_state(recipe: ModuleType, tmp_path: Path) -> None:
    uninterrupted = Prepared.fresh()
    batches = uninterrupted.accelerator.prepare(in_order(recipe))
    for index, batch in enumerate(batches):
        if index == 10:  # amid the warm-up
            uninterrupted.accelerator.save_state(str(tmp_path))
        uninterrupted.train([batch])
    AcceleratorState._reset_state(reset_partial_state=True)
    resumed = Prepared.fresh()
    batches = resumed.accelerator.prepare(in_order(recipe))
    resumed.accelerator.load_state(str(tmp_path))
    resumed.train(resumed.accelerator.skip_first_batches(batches, 10))
    assert strayed(resumed.trained, uninterrupted.trained) == 0
    assert {state["step"].item() for state in resumed.optimizer.state.values()} == {29.0}
    assert resumed.warm_up.state_dict() == uninterrupted.warm_up.state_dict()


def test_two_processes(two_processes: Callable[[str], list[dict[str, Any]]]) -> None:
    one, other = two_processes("accelerate")
    assert one["processes"] == 2
    assert one == other
    assert one["strayed"] == 0
