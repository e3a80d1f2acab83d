"""Test that `torch.compile(optimizer.step)` makes one graph, does not recompile, and takes the same steps."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from adapters.torch.torch_optimizers import classes, problem, train
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.testing import assert_close

from vsgd.torch import VSGD


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch.compiler.reset()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("foreach", [None, True])
@classes
def test_one_graph_serves_a_whole_schedule(cls: type, foreach: bool | None, dtype: torch.dtype) -> None:
    (params, _), (others, _) = problem(dtype), problem(dtype)
    counter = CompileCounter()
    options = {"foreach": foreach, "capturable": bool(foreach), "weight_decay": 0.1}
    optimizer = cls(params, lr=torch.tensor(0.01), **options)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    eager = cls(others, weight_decay=0.1, foreach=False)
    step = torch.compile(optimizer.step, backend=counter)
    for seed in range(10):
        eager.param_groups[0]["lr"] = float(optimizer.param_groups[0]["lr"])
        train(eager, others, range(seed, seed + 1))
        train(optimizer, params, range(seed, seed + 1), step)
        scheduler.step()
    assert counter.frame_count == 1
    assert_close(params, others)
    assert optimizer.state[params[0]]["step"] == 10
    assert optimizer.state[params[0]]["mu_g"].dtype is torch.float32


@pytest.mark.compiler
def test_forward_backward_and_step_compile_together() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))
    twin = copy.deepcopy(model)
    optimizer, eager = VSGD(model.parameters(), lr=torch.tensor(0.01)), VSGD(twin.parameters(), foreach=False)
    x = torch.randn(32, 6)

    def train_step(network: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        network(x).square().mean().backward()
        optimizer.step()

    compiled = torch.compile(train_step)
    for _ in range(5):
        compiled(model, optimizer)
        train_step(twin, eager)
    assert_close(list(model.parameters()), list(twin.parameters()))


@pytest.mark.compiler
def test_powers_of_the_count_are_computed_outside_of_the_loop_over_elements() -> None:
    from torch._inductor.utils import run_and_get_code

    params = [nn.Parameter(torch.ones(4096))]
    params[0].grad = torch.ones(4096)
    optimizer = VSGD(params, lr=torch.tensor(0.01))
    _, code = run_and_get_code(torch.compile(optimizer.step))
    before, *after = "".join(code).split("for(")
    assert "pow(" in before
    assert after
    assert "pow(" not in "".join(after)


def test_the_eager_step_is_not_disturbed_by_a_compiled_one() -> None:
    (params, _), (others, _) = problem(), problem()
    optimizer, eager = VSGD(params, lr=torch.tensor(0.01)), VSGD(others)
    train(optimizer, params, range(2))
    compiled = torch.compile(optimizer.step, backend="eager")
    for seed, step in enumerate([compiled, optimizer.step, compiled], start=2):
        train(optimizer, params, range(seed, seed + 1), step)
    train(eager, others, range(5))
    assert_close(params, others)
    assert optimizer.state[params[0]]["step"] == 5


@pytest.mark.compiler
def test_the_compiled_step_rounds_as_the_eager_one() -> None:
    ends: list[Any] = []
    for compiled in (False, True):
        params = [nn.Parameter(torch.ones(shape)) for shape in ((70, 30), (33,))]
        optimizer = VSGD(params, foreach=False, fused=False, state_dtype="bfloat16")
        train(optimizer, params, range(5), torch.compile(optimizer.step) if compiled else None)
        ends.append(torch.cat([optimizer.state[param]["b_ghat"].flatten() for param in params]))
    assert (ends[0] == ends[1]).float().mean() > 0.999
