"""What a step of the torch adapter refuses in one group of parameters leaves all groups as they were."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from adapters.torch.torch_optimizers import ENGINES, problem, train  # noqa: E402
from torch import nn  # noqa: E402
from torch.testing import assert_close  # noqa: E402

from vsgd.backends.torch import dispatch  # noqa: E402
from vsgd.torch import VSGD  # noqa: E402

Patch = pytest.MonkeyPatch


def sparse_gradient(optimizer: VSGD, patch: Patch) -> None:
    (param,) = optimizer.param_groups[1]["params"]
    param.grad = param.grad.to_sparse()


def fused_without_a_kernel(optimizer: VSGD, patch: Patch) -> None:
    param = nn.Parameter(torch.ones(3, device="meta"))
    param.grad = torch.ones_like(param)
    optimizer.param_groups[1].update(params=[param], foreach=None, fused=True)


def fused_that_cannot_be_imported(optimizer: VSGD, patch: Patch) -> None:
    patch.setitem(dispatch.FUSED, "cpu", dispatch.FUSED["cpu"]._replace(package="torch"))
    patch.setattr(dispatch, "_import_fused", lambda device: ImportError("broken"))
    optimizer.param_groups[1].update(foreach=None, fused=True)


def capturable_on_the_cpu(optimizer: VSGD, patch: Patch) -> None:
    optimizer.param_groups[1]["capturable"] = True


def a_count_with_a_gradient(optimizer: VSGD, patch: Patch) -> None:
    group = optimizer.param_groups[1]
    group.update(differentiable=True)
    optimizer.state[group["params"][0]] = {"step": torch.tensor(3.0, requires_grad=True)}


FAULTS: list[tuple[Callable[[VSGD, Patch], None], type[Exception], str]] = [
    (sparse_gradient, RuntimeError, "VSGD does not support sparse gradients"),
    (fused_without_a_kernel, RuntimeError, "`fused=True` requires .* but one is on meta"),
    (fused_that_cannot_be_imported, ImportError, "fused=True cannot be imported: broken"),
    (capturable_on_the_cpu, AssertionError, "If capturable=True, params and state_steps must be on supported devices"),
    (a_count_with_a_gradient, RuntimeError, "`requires_grad` is not supported for `step`"),
]


@pytest.mark.parametrize("steps", [0, 1, 3])  # 3: the fused engine repeats its step
@pytest.mark.parametrize("engine", ENGINES, ids=str)
@pytest.mark.parametrize(("fault", "error", "message"), FAULTS, ids=[fault.__name__ for fault, *_ in FAULTS])
def test_a_fault_in_the_second_group_leaves_the_first_one_alone(
    fault: Callable[[VSGD, Patch], None],
    error: type[Exception],
    message: str,
    engine: dict[str, Any],
    steps: int,
    monkeypatch: Patch,
) -> None:
    params, closure = problem()
    optimizer = VSGD([{"params": params[:1]}, {"params": params[1:], "foreach": False, "fused": None}], **engine)
    train(optimizer, params, range(steps))
    closure()
    fault(optimizer, monkeypatch)
    before = copy.deepcopy((params, dict(optimizer.state)))
    with pytest.raises(error, match=message):
        optimizer.step()
    assert_close(params, before[0], rtol=0, atol=0)
    assert_close([*optimizer.state.values()], [*before[1].values()], rtol=0, atol=0)


def test_a_sparse_gradient_in_a_warm_up_from_0_is_refused_by_name() -> None:
    param = nn.Parameter(torch.ones(3))
    param.grad = torch.ones(3).to_sparse()
    optimizer = VSGD([param], lr=0.0)
    with pytest.raises(RuntimeError, match=r"^VSGD does not support sparse gradients$"):
        optimizer.step()
    assert not optimizer.state


@pytest.mark.parametrize("form", [list, iter, lambda params: params[0]], ids=["list", "iterator", "tensor"])
def test_a_group_whose_engine_is_missing_is_not_added(form: Callable[[list[nn.Parameter]], Any], monkeypatch: Patch) -> None:
    monkeypatch.setitem(dispatch.FUSED, "cpu", dispatch.FUSED["cpu"]._replace(package="a_package_that_is_not"))
    first, second = problem()[0]
    optimizer = VSGD([first], foreach=False)
    options = {"foreach": None, "fused": True}
    with pytest.raises(ImportError, match=r"^fused=True needs numba: pip install 'vsgd\[fused\]'$"):
        optimizer.add_param_group({"params": form([second]), **options})
    with pytest.raises(ImportError, match=r"^fused=True needs numba"):
        VSGD([{"params": [first]}, {"params": [second], **options}], foreach=False)
    assert [group["params"] for group in optimizer.param_groups] == [[first]]
    optimizer.add_param_group({"params": [second]})


def test_a_dry_run_makes_state_on_any_device() -> None:
    # Where a checkpoint is made ready on the CPU, of an optimizer for a GPU.
    param = nn.Parameter(torch.ones(3))
    param.grad = torch.zeros(3)
    optimizer = VSGD([param], lr=0.0, capturable=True)
    optimizer.step()
    assert optimizer.state[param]["step"] == 0
