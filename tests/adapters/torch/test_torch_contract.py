"""Test that VSGD meets what torch's own tests require of Adam."""

from __future__ import annotations

import copy
import pickle
from functools import partial
from typing import Any

import pytest
import torch
from adapters.torch.torch_optimizers import ENGINES, assert_same_state, classes, engines, problem, randn_like, set_grads, train
from torch import nn
from torch.optim import lr_scheduler
from torch.testing import assert_close
from torch.testing._internal.common_optimizers import get_error_inputs_for_all_optims, optim_db

from vsgd.torch import VSGD


@classes
def test_torchs_error_inputs_are_refused(cls: type) -> None:
    for case in get_error_inputs_for_all_optims(device="cpu", dtype=torch.float32):
        given = case.optimizer_error_input
        params = [nn.Parameter(torch.randn(2, 3))] if given.params is None else given.params
        expects = pytest.warns if issubclass(case.error_type, Warning) else pytest.raises
        with expects(case.error_type, match=case.error_regex):
            cls(params, **given.kwargs)


@classes
@pytest.mark.parametrize(
    ("flags", "error", "message"),
    [
        ({"lr": torch.tensor(0.001), "foreach": True}, ValueError, "lr as a Tensor is not supported for capturable=False and"),
        ({"fused": True, "foreach": True}, RuntimeError, "`fused` and `foreach` cannot be `True` together."),
        ({"fused": True, "differentiable": True}, RuntimeError, "`fused` does not support `differentiable`"),
        ({"foreach": True, "differentiable": True}, RuntimeError, "`foreach` does not support `differentiable`"),
        ({"lr": -1}, ValueError, "Invalid learning rate: -1 "),
    ],
    ids=str,
)
def test_flags_that_exclude_each_other_are_refused_and_add_no_group(
    cls: type, flags: dict[str, Any], error: type[Exception], message: str
) -> None:
    first, second = problem()[0]
    optimizer = cls([first])
    for add in (lambda group: cls([group]), optimizer.add_param_group):
        with pytest.raises(error, match=message):
            add({"params": [second], **flags})
    assert [group["params"] for group in optimizer.param_groups] == [[first]]


(_ADAM,) = (info for info in optim_db if info.optim_cls is torch.optim.Adam)
#: Makers of schedulers that step together: those that torch tests Adam with, and those that look for a momentum.
SCHEDULERS = [
    *_ADAM.scheduler_inputs,
    [partial(lr_scheduler.CyclicLR, base_lr=1e-3, max_lr=1e-2, step_size_up=5, cycle_momentum=False)],
    [partial(lr_scheduler.OneCycleLR, max_lr=0.02, total_steps=30, cycle_momentum=False)],
]


@pytest.mark.parametrize("tensor_lr", [False, True])
@pytest.mark.parametrize("makers", SCHEDULERS)
def test_a_schedulers_step_equals_setting_the_number(makers: Any, tensor_lr: bool) -> None:
    (params, closure), (others, other_closure) = problem(), problem()
    optimizer, reference = VSGD(params, lr=torch.tensor(0.01) if tensor_lr else 0.01), VSGD(others)
    schedulers = [make(optimizer) for make in makers]
    first = closure().item()
    assert VSGD(others).step() is None
    for _ in range(20):
        reference.param_groups[0]["lr"] = float(optimizer.param_groups[0]["lr"])
        with torch.no_grad():  # the closure runs with gradients nevertheless
            loss = optimizer.step(closure)
        assert loss == reference.step(other_closure)
        for scheduler in schedulers:
            scheduler.step(loss.detach()) if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else scheduler.step()
    assert closure().item() < first
    assert_close(params, others, rtol=0, atol=0)


@classes
@pytest.mark.parametrize("engine", [{"differentiable": True}, *ENGINES], ids=str)
@pytest.mark.parametrize("shape", [(), (1,)], ids=str)
def test_hyperparameters_may_be_tensors_of_one_number(cls: type, engine: dict[str, Any], shape: tuple[int, ...]) -> None:
    kappas = ["kappa1", "kappa2"] if cls is VSGD else ["kappa"]
    # The values are exact in float32, so that only the type differs.
    numbers = {"lr": 2.0**-7, "variance_ratio": 8.0, "prior_strength": 2.0**-20, "eps": 2.0**-10, "weight_decay": 0.125}
    numbers |= dict.fromkeys(kappas, 0.75)
    tensors: dict[str, Any] = {name: torch.full(shape, value) for name, value in numbers.items()}
    if engine.get("foreach"):
        tensors["lr"] = numbers["lr"]
    runs = []
    for hyper in (numbers, tensors):
        params = [param.requires_grad_("differentiable" not in engine) for param in problem()[0]]
        train(cls(params, **hyper, **engine), params, range(4))
        runs.append(params)
    assert_close(*runs, rtol=0, atol=0)


@classes
@engines
def test_each_group_steps_as_an_optimizer_of_its_own_and_may_join_late(cls: type, engine: dict[str, Any]) -> None:
    (params, _), (alone, _) = problem(), problem()
    options = [{"lr": 0.1, "weight_decay": 0.5}, {"lr": 0.003, "maximize": True}]
    together = cls([{"params": [("weight", params[0])], **options[0]}], **engine)
    train(together, params, range(3))
    together.add_param_group({"params": [("bias", params[1])], **options[1]})
    train(together, params, range(3, 6))
    for index, (param, each) in enumerate(zip(alone, options, strict=True)):
        optimizer = cls([param], **each, **engine)
        for seed in range(3 * index, 6):
            param.grad = randn_like(params, seed)[index]
            optimizer.step()
    assert_close(params, alone, rtol=0, atol=0)
    assert [group["param_names"] for group in together.param_groups] == [["weight"], ["bias"]]


@classes
@engines
def test_maximize_is_minimizing_the_negative_and_leaves_the_gradient_alone(cls: type, engine: dict[str, Any]) -> None:
    (params, _), (others, _) = problem(), problem()
    up, down = cls(params, maximize=True, **engine), cls(others, **engine)
    for seed in range(4):
        train(up, params, range(seed, seed + 1))
        for other, grad in zip(others, randn_like(others, seed), strict=True):
            other.grad = -grad
        down.step()
        assert_close([param.grad for param in params], randn_like(params, seed), rtol=0, atol=0)
    assert_close(params, others, rtol=0, atol=0)
    assert_same_state(up, down)
    assert list(up.surprise().values()) == list(down.surprise().values())


@classes
@engines
def test_deepcopy_and_pickle_continue_alike(cls: type, engine: dict[str, Any]) -> None:
    params, _ = problem()
    optimizer = cls(params, eps=1e-6, weight_decay=0.1, maximize=True, **engine)
    train(optimizer, params, range(3))
    copies = [copy.deepcopy((params, optimizer)), pickle.loads(pickle.dumps((params, optimizer)))]
    train(optimizer, params, range(3, 6))
    for other_params, other in copies:
        assert other.param_groups[0]["params"][0] is other_params[0]
        train(other, other_params, range(3, 6))
        assert_close(other_params, params, rtol=0, atol=0)
        assert_same_state(other, optimizer)


@engines
def test_autograd_sees_the_step_as_an_in_place_change(engine: dict[str, Any]) -> None:
    params, closure = problem()
    loss = (params[0] * params[0]).sum()
    closure()
    VSGD(params, **engine).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@classes
@engines
def test_grad_scaler_unscales_and_skips_what_is_not_finite(cls: type, engine: dict[str, Any]) -> None:
    (params, _), (others, _) = problem(), problem()
    scaled, plain = cls(params, **engine), cls(others, **engine)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=100)
    for seed in range(4):
        set_grads(params, seed)
        for param in params:
            param.grad = param.grad * scaler.scale(torch.ones(()))
            if seed == 2:
                param.grad[0] = torch.inf
        scaler.step(scaled)
        scaler.update()
        if seed != 2:
            train(plain, others, range(seed, seed + 1))
    # Scales are powers of two, so unscaling is exact.
    assert_close(params, others, rtol=0, atol=0)
    assert scaler.get_scale() == 512.0
