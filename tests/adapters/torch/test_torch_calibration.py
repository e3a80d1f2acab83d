"""Test `prior_strength="auto"` in cases of torch alone: late groups, compilation, scaled gradients, checkpoints, adapters."""

from __future__ import annotations

import copy
from typing import Any
from unittest import mock

import pytest
import torch
from adapters.torch.torch_optimizers import classes, problem, train
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.testing import assert_close

from vsgd.torch import VSGD, ConstantVSGD
from vsgd.torch import optimizer as module

AUTO = {"prior_strength": "auto", "lr": 0.01}


@classes
def test_it_is_measured_once_and_over_all_groups(cls: type) -> None:
    (params, _), (others, _) = problem(torch.float32), problem(torch.float32)
    grouped = cls([{"params": [param], "lr": 0.01} for param in others], **AUTO)
    plain = cls(params, **AUTO)
    with mock.patch.object(module, "measure_gradients", wraps=module.measure_gradients) as measure:
        for each, of_each in ((plain, params), (grouped, others)):
            train(each, of_each, range(4))
        assert measure.call_count == 2
    assert_close(others, params, rtol=0, atol=0)
    assert len({group["gradient_unit"] for group in (*plain.param_groups, *grouped.param_groups)}) == 1


@classes
def test_a_group_that_joins_late_has_the_unit_of_the_others(cls: type) -> None:
    first, late = (nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizer = cls([first], **AUTO)
    first.grad = torch.full((3,), 4.0)
    optimizer.step()
    optimizer.add_param_group({"params": [late]})
    late.grad = torch.full((3,), 100.0)
    optimizer.step()
    assert [group["gradient_unit"] for group in optimizer.param_groups] == [4.0, 4.0]


def test_groups_with_a_number_are_not_measured() -> None:
    given, auto = (nn.Parameter(torch.ones(3)) for _ in range(2))
    given.grad, auto.grad = torch.full((3,), 100.0), torch.full((3,), 2.0)
    alone = nn.Parameter(given.detach().clone())
    alone.grad = given.grad.clone()
    optimizer = VSGD([{"params": [given], "prior_strength": 1e-8}, {"params": [auto]}], **AUTO)
    for each in (optimizer, VSGD([alone], lr=0.01)):
        each.step()
    assert [group["gradient_unit"] for group in optimizer.param_groups] == [None, 2.0]
    assert_close(given, alone, rtol=0, atol=0)


@classes
def test_a_compiled_step_calibrates_and_compiles_once(cls: type) -> None:
    torch.compiler.reset()
    (params, _), (others, _) = problem(torch.float32), problem(torch.float32)
    counter = CompileCounter()
    options = {**AUTO, "lr": torch.tensor(0.01), "weight_decay": 0.1}
    optimizer, eager = cls(params, **options), cls(others, foreach=False, **options)
    step = torch.compile(optimizer.step, backend=counter)
    compiled = []
    for seed in range(4):
        train(eager, others, range(seed, seed + 1))
        train(optimizer, params, range(seed, seed + 1), step)
        compiled.append(counter.frame_count)
    assert compiled == compiled[:1] * 4
    assert_close(params, others)


def test_the_unscaled_gradient_counts_and_a_skipped_step_does_not() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    param = nn.Parameter(torch.tensor([3.0, -4.0]))
    optimizer = ConstantVSGD([param], **AUTO)
    for factor in (float("inf"), 1.0):
        optimizer.zero_grad()
        scaler.scale(factor * param.square().sum()).backward()
        scaler.step(optimizer)
        scaler.update()
    assert optimizer.param_groups[0]["gradient_unit"] == pytest.approx(50**0.5)


def test_low_rank_factors_that_begin_at_zero_train() -> None:
    torch.manual_seed(0)
    x, target = torch.randn(64, 8), torch.randn(8, 8)
    down, up = nn.Parameter(torch.randn(8, 2) / 3), nn.Parameter(torch.zeros(2, 8))
    optimizer = VSGD([down, up], **{**AUTO, "lr": 0.05})
    losses = []
    for _ in range(200):
        loss = (x @ (down @ up - target)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    best = torch.linalg.svdvals(target)[2:].square().sum() / 8  # the best matrix of rank 2
    assert losses[-1] < best + 0.2 * (losses[0] - best)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this build of torch has no torch.distributed")
@classes
def test_distributed_checkpoints_make_the_state_without_a_unit_and_load_it(cls: type) -> None:
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    model = nn.Linear(3, 2)
    twin = copy.deepcopy(model)
    optimizer, fresh = cls(model.parameters(), **AUTO), cls(twin.parameters(), **AUTO)

    def step(network: nn.Module, optimizer: Any) -> None:
        optimizer.zero_grad()
        network(torch.linspace(-1, 2, 12).view(4, 3)).square().mean().backward()
        optimizer.step()

    step(model, optimizer)
    empty = get_optimizer_state_dict(twin, fresh)
    assert [group["gradient_unit"] for group in empty["param_groups"]] == [None]
    twin.load_state_dict(model.state_dict())
    set_optimizer_state_dict(twin, fresh, copy.deepcopy(get_optimizer_state_dict(model, optimizer)))
    for each in ((model, optimizer), (twin, fresh)):
        step(*each)
    assert_close(twin.state_dict(), model.state_dict(), rtol=0, atol=0)
