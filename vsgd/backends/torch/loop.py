"""The core's update run by torch on one parameter after the other, block by block: the engine that runs everywhere."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from vsgd import core
from vsgd.backends.torch.leaves import Leaf, batches, block_size, blocks, join, small_kinds, write_back
from vsgd.backends.torch.rounding import rounded


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
    for leaf in leaves:
        # Autograd, in a differentiable step, keeps what is read here: it must not be overwritten below.
        copy = torch.is_grad_enabled()
        old_param, old_grad, *old_state = (tensor.to(leaf.dtype, copy=copy) for tensor in leaf.tensors)
        direction, new_state = update(-old_grad if maximize else old_grad, tuple(old_state), coefficients)
        stored, new_param = rounded(leaf, new_state, core.descend(old_param, direction, lr, decay))
        for old, new in zip(leaf.state, stored, strict=True):
            old.copy_(new)
        leaf.param.copy_(new_param)


def step_in_blocks(
    rule: core.Rule, leaves: Iterable[Leaf], coefficients: Any, lr: float, decay: float, *, maximize: bool = False
) -> None:
    """One step, in place, on leaves of any size: large ones in blocks, small ones many at a time, on a copy.

    Args:
        rule: the variant to run.
        leaves: parameters.
        coefficients: `rule.coefficients(step, hyper)`, of numbers.
        lr: step size.
        decay: `1 - lr * weight_decay`.
        maximize: whether to step with the negative gradient.
    """
    kinds, others = small_kinds(leaves)
    for kind in kinds:
        for _, batch in batches(kind, block_size(kind[0])):
            joined = join(batch)
            step(rule, [joined], coefficients, lr, decay, maximize=maximize)
            write_back(joined, batch)
    parts = (block for leaf in others for block in blocks(leaf, block_size(leaf)))
    step(rule, parts, coefficients, lr, decay, maximize=maximize)
