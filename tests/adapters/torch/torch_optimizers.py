"""VSGD described in the terms of torch's own optimizer tests, to be driven as torch drives Adam."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from drivers import HAS_NUMBA
from torch import Tensor, nn
from torch.testing import assert_close
from torch.testing._internal.common_optimizers import (
    ErrorOptimizerInput,
    OptimizerErrorEnum,
    OptimizerInfo,
    OptimizerInput,
    get_error_inputs_for_all_optims,
    optim_db,
)

from vsgd.torch import VSGD, ConstantVSGD

(_ADAM,) = (info for info in optim_db if info.optim_cls is torch.optim.Adam)


def _inputs(device: str, dtype: torch.dtype | None = None) -> list[OptimizerInput]:
    kwargs: list[dict[str, Any]] = [
        {},
        {"lr": 0.001},
        {"lr": torch.tensor(0.001)},
        {"weight_decay": 0.1},
        {"weight_decay": 0.1, "maximize": True},
        {"variance_ratio": 10.0, "prior_strength": 1e-6, "eps": 1e-6},
    ]
    if device != "cpu":
        kwargs += [{"capturable": True}, {"lr": torch.tensor(0.001), "weight_decay": 0.1, "capturable": True}]
    return [OptimizerInput(params=None, kwargs=each, desc=str(each)) for each in kwargs]


def _error_inputs(device: str, dtype: torch.dtype) -> list[ErrorOptimizerInput]:
    bad: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"lr": -1}, ValueError, r"^Invalid learning rate: -1 \(lr must be a finite number >= 0\)$"),
        ({"lr": float("nan")}, ValueError, "^Invalid learning rate: nan"),
        ({"eps": -1e-8}, ValueError, r"^Invalid epsilon value: -1e-08 \(eps must be a finite number >= 0\)$"),
        ({"weight_decay": -1}, ValueError, "^Invalid weight_decay value: -1 "),
        (
            {"variance_ratio": 0.0},
            ValueError,
            r"^Invalid variance_ratio value: 0.0 \(variance_ratio must be a number in \[1e-15, 1e15\]\)",
        ),
        ({"prior_strength": 0.0}, ValueError, r"^Invalid prior_strength value: 0.0 \(.* a finite number >= 1e-30\)$"),
        ({"prior_strength": "1e-8"}, ValueError, "^Invalid prior_strength value: '1e-8' "),
        (
            {"lr": torch.tensor(0.001), "foreach": True},
            ValueError,
            "lr as a Tensor is not supported for capturable=False and foreach=True",
        ),
        ({"fused": True, "foreach": True}, RuntimeError, "`fused` and `foreach` cannot be `True` together."),
        ({"fused": True, "differentiable": True}, RuntimeError, "`fused` does not support `differentiable`"),
        ({"foreach": True, "differentiable": True}, RuntimeError, "`foreach` does not support `differentiable`"),
    ]
    ours = [
        ErrorOptimizerInput(
            OptimizerInput(params=None, kwargs=kwargs, desc=str(kwargs)),
            error_on=OptimizerErrorEnum.CONSTRUCTION_ERROR,
            error_type=error_type,
            error_regex=regex,
        )
        for kwargs, error_type, regex in bad
    ]
    return [*get_error_inputs_for_all_optims(device, dtype), *ours]


INFOS = [
    OptimizerInfo(
        cls,
        optim_inputs_func=_inputs,
        optim_error_inputs_func=_error_inputs,
        scheduler_inputs=_ADAM.scheduler_inputs,
        supported_impls=("foreach", "differentiable", "fused"),
        not_og_supported_flags=("foreach", "differentiable", "fused", "maximize", "capturable"),
        has_capturable_arg=True,
        supports_fused_on=("cpu", "cuda"),
    )
    for cls in (VSGD, ConstantVSGD)
]
STATE_NAMES = {VSGD: ("mu_g", "b_g", "b_ghat"), ConstantVSGD: ("mu_g", "b")}


#: The engines that can run here, by the flags that ask for them.
ENGINES: list[dict[str, Any]] = [{"foreach": False}, {"foreach": True}, *([{"fused": True}] if HAS_NUMBA else [])]


def all_inputs(info: OptimizerInfo, device: str = "cpu") -> list[dict[str, Any]]:
    """Constructor arguments with each engine in turn, but for what the constructor refuses."""
    # Not torch's own list of them: that has foreach on accelerators only.
    inputs = [{**each.kwargs, **engine} for each in info.optim_inputs_func(device=device) for engine in ENGINES]
    return [each for each in inputs if not (each.get("foreach") and isinstance(each.get("lr"), torch.Tensor))]


def problem(contiguous: bool = True, dtype: torch.dtype = torch.float32) -> tuple[list[nn.Parameter], Callable[[], Tensor]]:
    """A small regression with two parameters, and its closure."""
    generator = torch.Generator().manual_seed(0)
    weight, bias, x = (torch.randn(size, generator=generator, dtype=dtype) for size in ((5, 4), (5,), (4,)))
    if not contiguous:
        weight, bias = torch.randn(5, 4, 2, generator=generator, dtype=dtype)[..., 0], torch.zeros(5, 2, dtype=dtype)[..., 1]
    params = [nn.Parameter(weight), nn.Parameter(bias)]
    assert params[0].is_contiguous() == contiguous

    def closure() -> Tensor:
        for param in params:
            param.grad = None
        loss = (params[0].mv(x) + params[1]).square().sum()
        loss.backward()
        return loss

    return params, closure


def randn_like(params: Sequence[Tensor], seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(param.shape, generator=generator, dtype=torch.float64).to(param.dtype) for param in params]


def train(optimizer: torch.optim.Optimizer, params: Sequence[Tensor], seeds: range) -> None:
    """Steps on gradients that depend on the seed only."""
    for seed in seeds:
        for param, grad in zip(params, randn_like(params, seed), strict=True):
            param.grad = grad
        optimizer.step()


def assert_same_state(one: torch.optim.Optimizer, other: torch.optim.Optimizer) -> None:
    def states(optimizer: torch.optim.Optimizer) -> list[dict[str, Tensor]]:
        return [optimizer.state[param] for group in optimizer.param_groups for param in group["params"]]

    assert_close(states(one), states(other), rtol=0, atol=0)
    assert all(state for state in states(one))
