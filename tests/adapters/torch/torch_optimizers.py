"""A small problem for torch's optimizers, the engines that can run here, and comparisons of two runs."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from drivers import HAS_NUMBA
from drivers.processes import TESTS
from torch import Tensor, nn
from torch.testing import assert_close

from vsgd.torch import VSGD, ConstantVSGD

STATE_NAMES = {VSGD: ("mu_g", "b_g", "b_ghat"), ConstantVSGD: ("mu_g", "b")}
#: The engines that can run here, by the flags that select them.
ENGINES: list[dict[str, Any]] = [{"foreach": False}, {"foreach": True}, *([{"fused": True}] if HAS_NUMBA else [])]

classes = pytest.mark.parametrize("cls", [VSGD, ConstantVSGD])
engines = pytest.mark.parametrize("engine", ENGINES, ids=str)


def problem(dtype: torch.dtype = torch.float32) -> tuple[list[nn.Parameter], Callable[[], Tensor]]:
    """Return the two parameters of a small regression, and its closure."""
    generator = torch.Generator().manual_seed(0)
    weight, bias, x = (torch.randn(size, generator=generator, dtype=dtype) for size in ((5, 4), (5,), (4,)))
    params = [nn.Parameter(weight), nn.Parameter(bias)]

    def closure() -> Tensor:
        for param in params:
            param.grad = None
        loss = (params[0].mv(x) + params[1]).square().sum()
        loss.backward()
        return loss

    return params, closure


def randn_like(params: Sequence[Tensor], seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(param.shape, generator=generator, dtype=torch.float64).to(param) for param in params]


def set_grads(params: Sequence[Tensor], seed: int) -> None:
    """Set gradients that depend only on the seed."""
    for param, grad in zip(params, randn_like(params, seed), strict=True):
        param.grad = grad


def train(
    optimizer: torch.optim.Optimizer, params: Sequence[Tensor], seeds: range, step: Callable[[], Any] | None = None
) -> None:
    """Take steps with gradients that depend only on the seeds."""
    for seed in seeds:
        set_grads(params, seed)
        (step or optimizer.step)()


def assert_same_state(one: torch.optim.Optimizer, other: torch.optim.Optimizer) -> None:
    def states(optimizer: torch.optim.Optimizer) -> list[dict[str, Tensor]]:
        return [optimizer.state[param] for group in optimizer.param_groups for param in group["params"]]

    assert_close(states(one), states(other), rtol=0, atol=0)
    assert all(state for state in states(one))


def run_script(script: str, *arguments: str, folder: Path = TESTS.parent, **environment: str) -> list[str]:
    """Run a script in a new process that starts in this folder, and return the words it prints."""
    path = os.pathsep.join(filter(None, (str(TESTS), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-c", textwrap.dedent(script), *arguments]
    environment = {**os.environ, "PYTHONPATH": path, **environment}
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()
