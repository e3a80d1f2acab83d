"""Test the documentation's recipe for weight decay in JAX: which parameters decay, and that it trains."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

for package in ("jax", "optax", "sklearn"):
    pytest.importorskip(package)

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
from adapters.optax.optax_problems import train  # noqa: E402
from research.scripts import loaded  # noqa: E402

from vsgd.optax import vsgd  # noqa: E402

RECIPE = Path(__file__).parents[3] / "docs" / "recipes" / "optax_groups.py"
KINDS = {"first": {"kernel": "decayed", "bias": "spared"}, "norm": {"scale": "spared"}}


@pytest.fixture
def recipe() -> Iterator[ModuleType]:
    with loaded(RECIPE) as module:
        yield module


def params(layers: tuple[int, ...] = ()) -> Any:
    """Return parameters, with stacked layers if `layers` is given."""
    keys = iter(jax.random.split(jax.random.key(0), 3))
    shapes = {"first": {"kernel": (3, 4), "bias": (4,)}, "norm": {"scale": (4,)}}
    return jax.tree.map(
        lambda shape: jax.random.normal(next(keys), (*layers, *shape)), shapes, is_leaf=lambda leaf: isinstance(leaf, tuple)
    )


@pytest.mark.parametrize(("mask", "layers"), [("mask_matrices", ()), ("mask_by_name", ()), ("mask_by_name", (2,))])
def test_it_is_two_optimizers_in_one(mask: str, layers: tuple[int, ...], recipe: ModuleType) -> None:
    together = vsgd(0.01, weight_decay=0.1, mask=getattr(recipe, mask))
    apart = optax.multi_transform({"decayed": vsgd(0.01, weight_decay=0.1), "spared": vsgd(0.01)}, KINDS)
    values = params(layers)
    grads = [jax.tree.map(lambda value, step=step: jnp.sin(100 * value + step), values) for step in range(5)]
    jax.tree.map(np.testing.assert_array_equal, *(train(solver, values, grads)[0] for solver in (together, apart)))


def test_it_learns(recipe: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    recipe.main()
    assert float(capsys.readouterr().out.removeprefix("loss ")) < 0.1
