"""Choose VSGD by name, in configurations of timm, Lightning and others (no download).

To run it:

    pip install '.[torch]' timm lightning 'jsonargparse[signatures]'
    python docs/recipes/by_name.py
"""

from __future__ import annotations

from pkgutil import resolve_name
from typing import Any

import lightning
import torch
from lightning.pytorch.cli import LightningCLI
from torch import Tensor, nn


def create_with_timm(model: nn.Module) -> torch.optim.Optimizer:
    """Register VSGD with timm, so that `--opt vsgd` of its training script finds it, and create it as the script does."""
    from timm.optim import OptimInfo, create_optimizer_v2
    from timm.optim._optim_factory import default_registry

    for name in ("VSGD", "ConstantVSGD"):
        default_registry.register(OptimInfo(name.lower(), f"vsgd.torch.{name}", "VSGD, arXiv 2404.06549"))
    return create_optimizer_v2(model, opt="vsgd", lr=0.01, weight_decay=0.01)


def create_from_config(model: nn.Module, config: dict[str, Any]) -> torch.optim.Optimizer:
    """Create what a dotted path names: torchtune's `_component_`, Hydra's `_target_`."""
    options = dict(config)
    cls = resolve_name(options.pop("_component_"))
    return cls(model.parameters(), **options)


class Model(lightning.LightningModule):
    """A network that leaves its optimizer to the command line."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Linear(4, 2)

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        """Compute the loss of a batch."""
        return self.network(batch).square().mean()


def create_with_lightning_cli() -> torch.optim.Optimizer:
    """Create the optimizer that `python train.py fit --optimizer vsgd.torch.VSGD --optimizer.lr 0.01` names."""
    arguments = ["--optimizer", "vsgd.torch.VSGD", "--optimizer.lr", "0.01", "--trainer.accelerator", "cpu"]
    cli = LightningCLI(Model, run=False, args=arguments, save_config_callback=None)
    optimizer = cli.model.configure_optimizers()
    assert isinstance(optimizer, torch.optim.Optimizer)
    return optimizer


def main() -> None:
    """Create an optimizer in each way."""
    print(create_from_config(nn.Linear(4, 2), {"_component_": "vsgd.torch.VSGD", "lr": 0.01}))
    print(create_with_lightning_cli())
    print(create_with_timm(nn.Linear(4, 2)))


if __name__ == "__main__":
    main()
