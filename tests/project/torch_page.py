"""Definitions that the pages' fragments take as given: a torch model, its loss and its batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def training() -> tuple[nn.Module, Callable[[Any, Any], Tensor], list[tuple[Tensor, Tensor]]]:
    """Return a small classifier, its loss, and a dozen batches of 64."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(12, 64, 3, generator=generator)
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))
    return model, nn.functional.cross_entropy, list(zip(x, (x.sum(2) > 0).long(), strict=True))
