"""VSGD as a `torch.optim.Optimizer`."""

from __future__ import annotations

from typing import Any

try:
    from torch import Tensor
except ImportError as error:
    raise ImportError("vsgd.torch needs PyTorch: pip install 'vsgd[torch]'") from error

from torch.optim.optimizer import ParamsT

from vsgd import core
from vsgd.torch.optimizer import RuleOptimizer
from vsgd.torch.prior import prior_strength_from

__all__ = ["VSGD", "ConstantVSGD", "prior_strength_from"]


def _defaults(arguments: dict[str, Any]) -> dict[str, Any]:
    """The group options among a constructor's `locals()`."""
    return {name: value for name, value in arguments.items() if name not in ("self", "params", "__class__")}


class VSGD(RuleOptimizer):
    """Variational stochastic gradient descent (Chen et al., TMLR 2025, arXiv 2404.06549).

    Each element of the gradient is a hidden quantity that a mini-batch shows with noise. Its posterior mean and variance are
    filtered step by step, with both noise levels learned, and the step is E[g] / sqrt(E[g^2]).

    State of each parameter: `step` (a 0-d tensor), `mu_g`, `b_g`, `b_ghat` (the parameter's shape and layout; float64 for
    float64 parameters, else float32 or bfloat16, as `state_dtype` says).

    Args:
        params: tensors, named tensors or groups, as for every torch optimizer.
        lr: the paper's eta, the step size; the authors' default is 0.1.
        variance_ratio: the paper's K_g, the prior of Var(ghat - g) / Var(g_t - g_{t-1}).
        prior_strength: the paper's gamma, in units of gradient^2: scale it with the square of the loss's scale.
        kappa1: how fast b_g forgets; its learning rate at step t is t ** -kappa1. In (0.5, 1].
        kappa2: the same for b_ghat.
        eps: added to the root of the second moment, in units of the gradient.
        weight_decay: decoupled weight decay, as in AdamW, applied before the step.
        foreach: run on lists of tensors; None: on CUDA.
        maximize: maximize the objective instead of minimizing it.
        capturable: whether a CUDA graph may capture the step; the step counts then live on the device.
        differentiable: whether autograd may run through the step.
        fused: run one kernel for all parameters, numba's on the CPU, Triton's on CUDA; None: on the CPU where numba is
            installed.
        state_dtype: "float32", or "bfloat16": half the state, rounded at random so that its mean is kept; the arithmetic stays
            float32. float64 and complex parameters keep state of their own precision.
        stochastic_rounding: round parameters in bfloat16 at random too, once a step, so that no small step or decay is lost.
        seed: of the noise that both round with; a hash of it, the parameter's place among the optimizer's, the step and the
            element, so that a resumed run has the same.
        outlier_threshold: cut what differs from the predicted gradient by more than so many of its predicted standard
            deviations, element by element; None: use every gradient as it is. See `vsgd.outliers`.
        prior_shape: the shape of the prior on both precisions, without unit; None: `prior_strength`, as in the paper. With 0.0,
            `prior_strength` and `eps` can follow the loss's scale exactly: see `docs/tuning.md`.

    Raises:
        ValueError: a hyperparameter is out of its range.
        RuntimeError: flags that exclude each other.
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

    _kind = core.VSGD

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.01,
        variance_ratio: float = 30.0,
        prior_strength: float = 1e-8,
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
    ) -> None:
        super().__init__(params, _defaults(locals()))


class ConstantVSGD(RuleOptimizer):
    """VSGD with one precision for drift and noise (arXiv 2404.06549, the paper's second variant): Adam's memory.

    The gain is constant, `1 / (variance_ratio + 1)`, so `mu_g` is Adam's first moment with
    `beta1 = variance_ratio / (variance_ratio + 1)`.

    State of each parameter: `step` (a 0-d tensor), `mu_g`, `b` (the parameter's shape and layout; float64 for float64
    parameters, else float32 or bfloat16, as `state_dtype` says).

    Args:
        params: tensors, named tensors or groups, as for every torch optimizer.
        lr: the paper's eta, the step size.
        variance_ratio: the paper's K_g, the fixed ratio Var(ghat - g) / Var(g_t - g_{t-1}).
        prior_strength: the paper's gamma, in units of gradient^2: scale it with the square of the loss's scale.
        kappa: how fast b forgets; its learning rate at step t is t ** -kappa. In (0.5, 1].
        eps: added to the root of the second moment, in units of the gradient.
        weight_decay: decoupled weight decay, as in AdamW, applied before the step.
        foreach: run on lists of tensors; None: on CUDA.
        maximize: maximize the objective instead of minimizing it.
        capturable: whether a CUDA graph may capture the step; the step counts then live on the device.
        differentiable: whether autograd may run through the step.
        fused: run one kernel for all parameters, numba's on the CPU, Triton's on CUDA; None: on the CPU where numba is
            installed.
        state_dtype: "float32", or "bfloat16": half the state, rounded at random so that its mean is kept; the arithmetic stays
            float32. float64 and complex parameters keep state of their own precision.
        stochastic_rounding: round parameters in bfloat16 at random too, once a step, so that no small step or decay is lost.
        seed: of the noise that both round with; a hash of it, the parameter's place among the optimizer's, the step and the
            element, so that a resumed run has the same.
        outlier_threshold: cut what differs from the predicted gradient by more than so many of its predicted standard
            deviations, element by element; None: use every gradient as it is. See `vsgd.outliers`.
        prior_shape: the shape of the prior on the precision, without unit; None: `prior_strength`, as in the paper. With 0.0,
            `prior_strength` and `eps` can follow the loss's scale exactly: see `docs/tuning.md`.

    Raises:
        ValueError: a hyperparameter is out of its range.
        RuntimeError: flags that exclude each other.
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

    _kind = core.CONSTANT_VSGD

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.01,
        variance_ratio: float = 3.0,
        prior_strength: float = 1e-8,
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
    ) -> None:
        super().__init__(params, _defaults(locals()))
