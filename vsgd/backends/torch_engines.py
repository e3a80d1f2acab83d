"""Which torch engine runs a leaf, where the user prescribes none."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from types import ModuleType
from typing import Any

import torch

from vsgd import core
from vsgd.backends import torch_foreach, torch_loop
from vsgd.backends.torch_blocks import Leaf, block_size, blocks, is_plain

#: `engine(rule, leaves, coefficients, lr, decay, maximize=...)` takes one step on all leaves.
Engine = Callable[..., None]


def loop(rule: core.Rule, leaves: Iterable[Leaf], *args: Any, **kwargs: Any) -> None:
    """`torch_loop.step`, block by block."""
    parts = (block for leaf in leaves for block in blocks(leaf, block_size(leaf)))
    torch_loop.step(rule, parts, *args, **kwargs)


@functools.cache
def import_fused() -> ModuleType | ImportError:
    """The fused engine, or why it cannot be had."""
    # At the first use, and not above: importing numba takes half a second.
    try:
        from vsgd.backends import torch_fused
    except ImportError as error:
        return error
    return torch_fused


def prefers_foreach(leaf: Leaf) -> bool:
    """Whether lists are the fastest way for the leaf that the fused engine does not take."""
    return leaf.param.is_cuda and is_plain(leaf.param)


def step(rule: core.Rule, hyper: Any, leaves: Sequence[Leaf], count: float, lr: float) -> None:
    """One step without weight decay, in place, on leaves of one step count, each by the fastest engine that takes it.

    Args:
        rule: the variant to run.
        hyper: its hyperparameters.
        leaves: parameters.
        count: which step this is, 1 at the first.
        lr: step size.
    """
    fused = import_fused() if any(leaf.param.is_cpu for leaf in leaves) else None
    left = leaves
    if isinstance(fused, ModuleType):
        before = torch.tensor(count - 1, dtype=torch.float64, device="cpu")
        taken, left = _partition(leaves, lambda leaf: fused.accepts(leaf, before))
        if taken:
            fused.Batch(taken, before.repeat(len(taken)).unbind()).step(rule, hyper, lr, decay=1.0)
    coefficients = rule.coefficients(count, hyper)
    listed, left = _partition(left, prefers_foreach)
    torch_foreach.step(rule, listed, coefficients, lr, 1.0)
    loop(rule, left, coefficients, lr, 1.0)


def _partition(leaves: Iterable[Leaf], condition: Callable[[Leaf], bool]) -> tuple[list[Leaf], list[Leaf]]:
    """Those of which it holds, and the others."""
    parts: tuple[list[Leaf], list[Leaf]] = ([], [])
    for leaf in leaves:
        parts[not condition(leaf)].append(leaf)
    return parts
