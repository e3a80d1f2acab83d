"""The recipe of the documentation for weight decay in PyTorch: what decays, and that it trains."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("sklearn")

from research.scripts import loaded  # noqa: E402
from sklearn.datasets import load_digits  # noqa: E402
from torch import nn  # noqa: E402

from vsgd.torch import VSGD  # noqa: E402

RECIPE = Path(__file__).parents[3] / "docs" / "recipes" / "torch_groups.py"


@pytest.fixture
def recipe() -> Iterator[ModuleType]:
    with loaded(RECIPE) as module:
        yield module


def test_it_is_two_optimizers_in_one(recipe: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    model, _ = recipe.main()
    assert float(capsys.readouterr().out.removeprefix("loss ")) < 0.1
    pixels, labels = load_digits(return_X_y=True)
    torch.manual_seed(0)
    other = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.GELU(), nn.Linear(64, 10))
    first, norm, _, last = other
    decayed = VSGD([first.weight, last.weight], lr=0.01, weight_decay=0.1)
    spared = VSGD([first.bias, norm.weight, norm.bias, last.bias], lr=0.01)
    for _ in range(50):
        other.zero_grad()
        output = other(torch.tensor(pixels, dtype=torch.float32) / 8 - 1)
        nn.functional.cross_entropy(output, torch.tensor(labels)).backward()
        decayed.step()
        spared.step()
    for param, same in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(param, same)


def test_what_needs_no_gradient_is_in_no_group(recipe: ModuleType) -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Embedding(5, 3))
    model[2].weight.requires_grad_(False)
    decayed, spared = recipe.decay_matrices_alone(model, 0.1)
    assert decayed == {"params": [model[0].weight], "weight_decay": 0.1}
    assert spared == {"params": [model[0].bias, model[1].weight, model[1].bias], "weight_decay": 0.0}
