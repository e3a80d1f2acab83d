"""Test the documentation's recipe for weight decay in PyTorch: which parameters decay, and that it trains."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("sklearn")

from research.scripts import loaded
from torch import nn

RECIPE = Path(__file__).parents[3] / "docs" / "recipes" / "torch_groups.py"


def test_matrices_alone_decay_and_what_needs_no_gradient_is_in_no_group(capsys: pytest.CaptureFixture[str]) -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Embedding(5, 3))
    model[2].weight.requires_grad_(False)
    with loaded(RECIPE) as recipe:
        decayed, spared = recipe.decay_matrices_alone(model, 0.1)
        (first, norm, _, last), optimizer = recipe.main()
    assert decayed == {"params": [model[0].weight], "weight_decay": 0.1}
    assert spared == {"params": [model[0].bias, model[1].weight, model[1].bias], "weight_decay": 0.0}
    assert float(capsys.readouterr().out.removeprefix("loss ")) < 0.1
    groups = [(group["weight_decay"], list(map(id, group["params"]))) for group in optimizer.param_groups]
    biases = [first.bias, norm.weight, norm.bias, last.bias]
    assert groups == [(0.1, list(map(id, [first.weight, last.weight]))), (0.0, list(map(id, biases)))]
