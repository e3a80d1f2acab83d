"""VSGD as a `torch.optim.Optimizer`, and an observer of the gradients of any optimizer."""

from __future__ import annotations

from typing import Any

try:
    from torch import Tensor
except ImportError as error:
    raise ImportError("vsgd.torch needs PyTorch: run pip install '.[torch]' in a clone of vsgd") from error

from torch.optim.optimizer import ParamsT

from vsgd import core
from vsgd.torch.observer import GradientObserver
from vsgd.torch.optimizer import RuleOptimizer
from vsgd.torch.prior import prior_strength_from
from vsgd.validation import document_options

__all__ = ["VSGD", "ConstantVSGD", "GradientObserver", "prior_strength_from"]

_document = document_options(
    params="tensors, named tensors or groups, as for every torch optimizer.",
    weight_decay="decoupled weight decay, as in AdamW, applied before the step.",
    foreach="run on lists of tensors; None: on CUDA.",
    maximize="maximize the objective instead of minimizing it.",
    capturable="keep step counts on the device, so that a CUDA graph can capture the step.",
    differentiable="let autograd differentiate the step.",
    fused=(
        "run one kernel for all parameters, numba's on the CPU and Triton's on CUDA; None: on the CPU where numba is installed."
    ),
)


def _select_options(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the group options among a constructor's `locals()`."""
    return {name: value for name, value in arguments.items() if name not in ("self", "params", "__class__")}


@_document
class VSGD(RuleOptimizer):
    """Variational stochastic gradient descent (Chen et al., TMLR 2025, arXiv 2404.06549).

    VSGD models each gradient element as a hidden quantity that a mini-batch observes with noise. It filters the posterior mean
    and variance of that quantity, learns both noise levels, and steps by E[g] / sqrt(E[g^2]).

    The state of each parameter is `step` (a 0-d tensor), `mu_g`, `b_g` and `b_ghat` (of the parameter's shape and layout;
    float64 for float64 parameters, else float32 or bfloat16, see `state_dtype`).

    Args:
        params: {params}
        lr: the paper's eta, the step size; the authors' default is 0.1.
        variance_ratio: {variance_ratio}
        prior_strength: {prior_strength}
        kappa1: {kappa1}
        kappa2: {kappa2}
        eps: {eps}
        weight_decay: {weight_decay}
        foreach: {foreach}
        maximize: {maximize}
        capturable: {capturable}
        differentiable: {differentiable}
        fused: {fused}
        state_dtype: {state_dtype}
        stochastic_rounding: {stochastic_rounding}
        seed: {seed}
        outlier_threshold: {outlier_threshold}
        prior_shape: {prior_shape}
        forgetting_floor: {forgetting_floor}

    Raises:
        ValueError: a hyperparameter is out of its range.
        RuntimeError: two flags exclude each other.
        ImportError: `fused=True` without numba on the CPU, or without Triton on CUDA.

    Example:
        >>> import torch
        >>> from vsgd.torch import VSGD
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        >>> optimizer = VSGD([weight], lr=0.05)
        >>> for _ in range(100):
        ...     optimizer.zero_grad()
        ...     loss = weight.square().sum()
        ...     loss.backward()
        ...     optimizer.step()
        >>> loss.item() < 1  # from 5
        True
    """

    _plain_rule = core.VSGD

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.01,
        variance_ratio: float = 30.0,
        prior_strength: float | str = 1e-8,
        kappa1: float = 0.81,
        kappa2: float = 0.9,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        state_dtype: str = "float32",
        stochastic_rounding: bool = False,
        seed: int = 0,
        outlier_threshold: float | None = None,
        prior_shape: float | None = None,
        forgetting_floor: float = 0.0,
    ) -> None:
        super().__init__(params, _select_options(locals()))


@_document
class ConstantVSGD(RuleOptimizer):
    """Constant VSGD (arXiv 2404.06549, section 4): one precision for drift and noise, and as much memory as Adam.

    The gain is constant, `1 / (variance_ratio + 1)`, so `mu_g` is Adam's first moment with
    `beta1 = variance_ratio / (variance_ratio + 1)`.

    The state of each parameter is `step` (a 0-d tensor), `mu_g` and `b` (of the parameter's shape and layout; float64 for
    float64 parameters, else float32 or bfloat16, see `state_dtype`).

    Args:
        params: {params}
        lr: the paper's eta, the step size.
        variance_ratio: {constant_variance_ratio}
        prior_strength: {prior_strength}
        kappa: {kappa}
        eps: {eps}
        weight_decay: {weight_decay}
        foreach: {foreach}
        maximize: {maximize}
        capturable: {capturable}
        differentiable: {differentiable}
        fused: {fused}
        state_dtype: {state_dtype}
        stochastic_rounding: {stochastic_rounding}
        seed: {seed}
        outlier_threshold: {outlier_threshold}
        prior_shape: {prior_shape}
        forgetting_floor: {forgetting_floor}

    Raises:
        ValueError: a hyperparameter is out of its range.
        RuntimeError: two flags exclude each other.
        ImportError: `fused=True` without numba on the CPU, or without Triton on CUDA.

    Example:
        >>> import torch
        >>> from vsgd.torch import ConstantVSGD
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        >>> optimizer = ConstantVSGD([weight], lr=0.1)
        >>> weight.square().sum().backward()
        >>> optimizer.step()
        >>> sorted(optimizer.state[weight])
        ['b', 'mu_g', 'step']
    """

    _plain_rule = core.CONSTANT_VSGD

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.01,
        variance_ratio: float = 3.0,
        prior_strength: float | str = 1e-8,
        kappa: float = 0.9,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        state_dtype: str = "float32",
        stochastic_rounding: bool = False,
        seed: int = 0,
        outlier_threshold: float | None = None,
        prior_shape: float | None = None,
        forgetting_floor: float = 0.0,
    ) -> None:
        super().__init__(params, _select_options(locals()))
