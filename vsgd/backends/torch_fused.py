"""The numba kernel on torch tensors in CPU memory."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from vsgd import core
from vsgd.backends import numba_cpu
from vsgd.backends.torch_blocks import Leaf, is_flat, is_plain

_DTYPES = {torch.float32: np.float32, torch.float64: np.float64}


def accepts(leaf: Leaf) -> bool:
    """Whether the kernel can run on the leaf: dense float32 or float64 tensors of one layout in CPU memory."""
    param, grad, state = leaf
    dtype, shape = param.dtype, param.shape
    if dtype not in _DTYPES or not is_plain(param) or not is_plain(grad):
        return False
    # Every one, for the kernel writes where it is told: state of another size or device would be memory that is not ours.
    for tensor in (param, grad, *state):
        if tensor.dtype is not dtype or tensor.shape != shape or not tensor.is_cpu or tensor.is_neg():
            return False
    return is_flat(leaf)


def step(
    rule: core.Rule,
    leaves: Iterable[Leaf],
    coefficients: Any,
    lr: float,
    decay: float,
    *,
    maximize: bool = False,
) -> None:
    """One step, in place, on all leaves at once.

    Args:
        rule: the variant to run.
        leaves: parameters that `accepts`.
        coefficients: `rule.coefficients(step, hyper)`, of numbers.
        lr: step size.
        decay: `1 - lr * weight_decay`.
        maximize: whether to step with the negative gradient.
    """
    by_dtype: dict[torch.dtype, list[Leaf]] = {}
    for leaf in leaves:
        by_dtype.setdefault(leaf.param.dtype, []).append(leaf)
    for dtype, members in by_dtype.items():
        addresses = np.array([[tensor.data_ptr() for tensor in leaf.tensors] for leaf in members], dtype=np.int64)
        sizes = np.array([leaf.param.numel() for leaf in members], dtype=np.int64)
        numba_cpu.step(
            rule,
            numba_cpu.Table(tuple(np.ascontiguousarray(addresses.T)), sizes),
            coefficients,
            lr,
            decay,
            dtype=_DTYPES[dtype],
            maximize=maximize,
            threads=torch.get_num_threads(),
        )
        # Autograd must see that these changed, as it does with torch's own operations.
        torch.autograd.graph.increment_version([tensor for leaf in members for tensor in (leaf.param, *leaf.state)])
