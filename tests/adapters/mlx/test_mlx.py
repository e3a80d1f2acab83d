"""Test the MLX optimizer on MLX's own networks, files and dtypes; the tests of all engines compare it with the others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

mx = pytest.importorskip("mlx.core")
from mlx import nn, utils  # noqa: E402

from vsgd.mlx import VSGD, ConstantVSGD  # noqa: E402

classes = pytest.mark.parametrize("cls", [VSGD, ConstantVSGD])


def equal(one: Any, other: Any) -> bool:
    return all(same.item() for _, same in utils.tree_flatten(utils.tree_map(mx.array_equal, one, other)))


@classes
def test_a_network_learns_the_digits_and_a_saved_run_goes_on(cls: type, tmp_path: Path) -> None:
    images, digits = map(mx.array, pytest.importorskip("sklearn.datasets").load_digits(return_X_y=True))
    model, optimizer, other = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10)), cls(), cls()
    gradients = nn.value_and_grad(model, lambda x, y: nn.losses.cross_entropy(model(x), y, reduction="mean"))

    def train(optimizer: Any, epochs: int) -> Any:
        for first in [*range(0, 1797, 100)] * epochs:
            optimizer.update(model, gradients(images[first : first + 100] / 16, digits[first : first + 100])[1])
            mx.eval(model.parameters(), optimizer.state)
        return model.parameters()

    saved, weights = tmp_path / "state.npz", train(optimizer, epochs=5)
    mx.savez(saved, **dict(utils.tree_flatten(optimizer.state)))
    expected = train(optimizer, epochs=1)
    assert (model(images / 16).argmax(axis=1) == digits).mean().item() > 0.9
    model.update(weights)
    other.state = utils.tree_unflatten(list(mx.load(str(saved)).items()))
    assert equal(train(other, epochs=1), expected)
