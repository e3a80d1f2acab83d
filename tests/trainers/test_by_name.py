"""Test the recipe that chooses VSGD by name: each library makes the optimizer that its configuration describes."""

from __future__ import annotations

from types import ModuleType

import pytest
from research.scripts import loaded, need

torch = pytest.importorskip("torch")
need("lightning", "jsonargparse")

from torch import nn  # noqa: E402
from trainers.conftest import RECIPES  # noqa: E402

import vsgd.torch  # noqa: E402


@pytest.fixture
def by_name() -> ModuleType:
    with loaded(RECIPES / "by_name.py") as module:
        yield module


def list_options(optimizer: torch.optim.Optimizer) -> list[dict[str, object]]:
    return [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]


@pytest.mark.parametrize("name", ["VSGD", "ConstantVSGD"])
def test_a_dotted_path_makes_the_optimizer_with_its_options(by_name: ModuleType, name: str) -> None:
    made = by_name.create_from_config(nn.Linear(2, 1), {"_component_": f"vsgd.torch.{name}", "lr": 0.5, "eps": 1e-3})
    expected = getattr(vsgd.torch, name)(nn.Linear(2, 1).parameters(), lr=0.5, eps=1e-3)
    assert type(made) is type(expected)
    assert list_options(made) == list_options(expected)


@pytest.mark.filterwarnings("ignore")  # for Lightning's command line
def test_lightnings_command_line_makes_the_optimizer_that_it_names(by_name: ModuleType) -> None:
    made = by_name.create_with_lightning_cli()
    assert type(made) is vsgd.torch.VSGD
    assert list_options(made) == list_options(vsgd.torch.VSGD(nn.Linear(2, 1).parameters(), lr=0.01))


def test_timm_makes_the_optimizer_that_is_registered(by_name: ModuleType) -> None:
    pytest.importorskip("timm")
    made = by_name.create_with_timm(nn.Linear(2, 1))
    # timm does not decay vectors.
    groups = [{"params": [torch.ones(1)], "weight_decay": decay} for decay in (0.0, 0.01)]
    assert type(made) is vsgd.torch.VSGD
    assert list_options(made) == list_options(vsgd.torch.VSGD(groups, lr=0.01))
