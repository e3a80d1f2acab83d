"""Test `schedulefree.ScheduleFreeWrapper` around VSGD: a constant rate ends like a falling one, and a run resumes."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import nn

from vsgd.torch import ConstantVSGD

schedulefree = pytest.importorskip("schedulefree")

SIZE = 100
SETTING: dict[str, Any] = {"lr": 0.016, "prior_strength": "auto", "forgetting_floor": 0.01}
CURVATURE = torch.logspace(-2, 0, SIZE)


class Run:
    """Constant VSGD on a noisy quadratic, wrapped or not."""

    def __init__(self, wrapped: bool) -> None:
        self.param = nn.Parameter(torch.ones(SIZE))
        self.optimizer = ConstantVSGD([self.param], **SETTING)
        if wrapped:
            self.optimizer = schedulefree.ScheduleFreeWrapper(self.optimizer, momentum=0.9)
            self.optimizer.train()

    def train(self, steps: range) -> None:
        for step in steps:
            generator = torch.Generator().manual_seed(step)
            self.param.grad = CURVATURE * self.param.detach() + 0.3 * torch.randn(SIZE, generator=generator)
            self.optimizer.step()

    def compute_risk(self) -> float:
        return (CURVATURE * self.param.detach() ** 2).mean().item() / 2


def test_a_constant_rate_ends_nearer_to_the_minimum() -> None:
    plain, wrapped = Run(wrapped=False), Run(wrapped=True)
    for each in (plain, wrapped):
        each.train(range(2000))
    wrapped.optimizer.eval()
    assert wrapped.compute_risk() < plain.compute_risk() / 2


def test_a_saved_run_resumes() -> None:
    one, other = Run(wrapped=True), Run(wrapped=True)
    one.train(range(20))
    file = io.BytesIO()
    torch.save({"param": one.param.data, "optimizer": one.optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other.param.data.copy_(saved["param"])
    other.optimizer.load_state_dict(saved["optimizer"])
    for each in (one, other):
        each.train(range(20, 40))
    assert torch.equal(other.param, one.param)
