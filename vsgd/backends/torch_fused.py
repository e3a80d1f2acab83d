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
    param, grad, _ = leaf
    dtype = param.dtype
    return (
        dtype in _DTYPES
        and param.is_cpu
        and grad.is_cpu
        and is_plain(param)
        and is_plain(grad)
        and all(tensor.dtype is dtype and not tensor.is_neg() for tensor in leaf.tensors)
        and is_flat(leaf)
    )


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
