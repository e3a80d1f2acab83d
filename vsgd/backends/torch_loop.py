"""The core's update run by torch on one parameter after the other, block by block: the engine that runs everywhere."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from vsgd import core
from vsgd.backends.torch_blocks import Leaf


def step(
    rule: core.Rule,
    leaves: Iterable[Leaf],
    coefficients: Any,
    lr: float | Tensor,
    decay: float | Tensor,
    *,
    maximize: bool = False,
) -> None:
    """One step, in place, on each leaf.

    Every tensor operation is torch's own and nothing depends on a tensor's value, so that it can be compiled, captured in a
    CUDA graph and differentiated.

    Args:
        rule: the variant to run.
        leaves: parameters or blocks of them.
        coefficients: `rule.coefficients(step, hyper)`, of numbers or 0-d tensors.
        lr: step size, a number or a 0-d tensor.
        decay: `1 - lr * weight_decay`, likewise.
        maximize: whether to step with the negative gradient.
    """
    update = rule.make_update(torch)
    for param, grad, state in leaves:
        dtype = state[0].dtype
        grad = grad.to(dtype)
        # Autograd, in a differentiable step, keeps what the update reads: it must not be overwritten below.
        old_state = tuple(map(torch.clone, state)) if torch.is_grad_enabled() else state
        direction, new_state = update(-grad if maximize else grad, old_state, coefficients)
        for old, new in zip(state, new_state, strict=True):
            old.copy_(new)
        param.copy_(core.descend(param.to(dtype), direction, lr, decay))
