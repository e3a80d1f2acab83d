"""Test that an error in one parameter group of the torch adapter leaves all groups unchanged."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from adapters.torch.torch_optimizers import engines, problem, train
from torch import nn
from torch.testing import assert_close

from vsgd.backends.torch import dispatch
from vsgd.backends.torch.foreach import Foreach
from vsgd.backends.torch.loop import Loop
from vsgd.torch import VSGD

Patch = pytest.MonkeyPatch


def sparse_gradient(optimizer: VSGD, patch: Patch) -> None:
    optimizer.param_groups[1]["params"][0].grad = torch.ones(5).to_sparse()


def fused_without_a_kernel(optimizer: VSGD, patch: Patch) -> None:
    param = nn.Parameter(torch.ones(3, device="meta"))
    param.grad = torch.ones_like(param)
    optimizer.param_groups[1].update(params=[param], foreach=None, fused=True)


def fused_that_cannot_be_imported(optimizer: VSGD, patch: Patch) -> None:
    patch.setitem(dispatch.FUSED, "cpu", dispatch.FUSED["cpu"]._replace(package="torch"))
    patch.setattr(dispatch, "_import_fused", lambda device: ImportError("broken"))
    optimizer.param_groups[1].update(foreach=None, fused=True)


def a_count_with_a_gradient(optimizer: VSGD, patch: Patch) -> None:
    group = optimizer.param_groups[1]
    group["differentiable"] = True
    optimizer.state[group["params"][0]] = {"step": torch.tensor(3.0, requires_grad=True)}


CAPTURABLE = AssertionError, "If capturable=True, params and state_steps must be on supported devices"
FAULTS: dict[str, tuple[Callable[[VSGD, Patch], Any], type[Exception], str]] = {
    "sparse": (sparse_gradient, RuntimeError, "^VSGD does not support sparse gradients$"),
    "no kernel": (fused_without_a_kernel, RuntimeError, "`fused=True` requires .* but one is on meta"),
    "broken kernel": (fused_that_cannot_be_imported, ImportError, "fused=True cannot be imported: broken"),
    "capturable": (lambda optimizer, patch: optimizer.param_groups[1].update(capturable=True), *CAPTURABLE),
    # The fused engine has already planned the next step of the first group.
    "capturable later": (lambda optimizer, patch: optimizer.param_groups[0].update(capturable=True), *CAPTURABLE),
    "a count with a gradient": (a_count_with_a_gradient, RuntimeError, "`requires_grad` is not supported for `step`"),
}


@pytest.mark.parametrize("steps", [0, 1, 3])  # 3: the fused engine repeats its step
@engines
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_one_group_leaves_all_as_they_were(
    fault: str, engine: dict[str, Any], steps: int, monkeypatch: Patch
) -> None:
    change, error, message = FAULTS[fault]
    params, closure = problem()
    optimizer = VSGD([{"params": params[:1]}, {"params": params[1:], "foreach": False, "fused": None}], **engine)
    train(optimizer, params, range(steps))
    closure()
    change(optimizer, monkeypatch)
    before = copy.deepcopy((params, dict(optimizer.state)))
    with pytest.raises(error, match=message):
        optimizer.step()
    assert_close(params, before[0], rtol=0, atol=0)
    assert_close([*optimizer.state.values()], [*before[1].values()], rtol=0, atol=0)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_sparse_gradient_is_refused_in_a_dry_run_and_in_a_compiled_step_too(compiled: bool) -> None:
    torch.compiler.reset()
    param = nn.Parameter(torch.ones(3))
    param.grad = torch.ones(3).to_sparse()
    optimizer = VSGD([param], lr=0.01 if compiled else 0.0)
    with pytest.raises(Exception, match="VSGD does not support sparse gradients"):
        (torch.compile(optimizer.step, backend="eager") if compiled else optimizer.step)()
    assert not optimizer.state[param]


def test_an_error_while_state_is_made_leaves_none_of_it(monkeypatch: Patch) -> None:
    params, closure = problem()
    optimizer = VSGD(params)
    closure()
    made = iter([torch.full_like])  # the second array fails
    with monkeypatch.context() as patch:
        patch.setattr("torch.full_like", lambda *args, **options: next(made, fail)(*args, **options))
        with pytest.raises(MemoryError):
            optimizer.step()
    assert not optimizer.state[params[0]]
    other = VSGD(copy.deepcopy(params))
    for mine, theirs in zip(params, other.param_groups[0]["params"], strict=True):
        theirs.grad = mine.grad.clone()
    optimizer.step()
    other.step()
    assert_close(params, other.param_groups[0]["params"], rtol=0, atol=0)


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("engine", [Foreach, Loop])
def test_a_kernel_that_cannot_be_compiled_counts_no_step(engine: type, capturable: bool, monkeypatch: Patch) -> None:
    monkeypatch.setattr(engine, "step", fail)
    monkeypatch.setattr("vsgd.torch.optimizer.list_capturable_devices", lambda: ["cpu"])
    params, closure = problem()
    optimizer = VSGD(params, foreach=engine is Foreach, capturable=capturable)
    closure()
    with pytest.raises(MemoryError):
        optimizer.step()
    assert [optimizer.state[param]["step"].item() for param in params] == [0, 0]


def fail(*args: Any, **options: Any) -> None:
    raise MemoryError


@pytest.mark.parametrize("form", [list, iter, lambda params: params[0]], ids=["list", "iterator", "tensor"])
def test_a_group_whose_engine_is_missing_is_not_added(form: Callable[[list[nn.Parameter]], Any], monkeypatch: Patch) -> None:
    monkeypatch.setitem(dispatch.FUSED, "cpu", dispatch.FUSED["cpu"]._replace(package="a_package_that_is_not"))
    first, second = problem()[0]
    optimizer = VSGD([first], foreach=False)
    group = {"params": form([second]), "foreach": None, "fused": True}
    with pytest.raises(ImportError, match=r"on cpu needs a_package_that_is_not 0.61 or newer, but found none: run pip install"):
        optimizer.add_param_group(group)
    assert [group["params"] for group in optimizer.param_groups] == [[first]]
    optimizer.add_param_group({"params": [second]})
