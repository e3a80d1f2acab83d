"""The core run by torch on one parameter after the other, block by block: the engine that runs everywhere."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from vsgd import core
from vsgd.backends.torch.leaves import (
    Engine,
    Leaf,
    StepOptions,
    get_arithmetic_dtype,
    get_block_size,
    group_small,
    iterate_batches,
    iterate_blocks,
    join_leaves,
    list_tensors,
    write_back,
)
from vsgd.backends.torch.rounding import key_noise, round_values


class Loop(Engine):
    """Steps leaves of any kind."""

    def accepts(self, leaf: Leaf) -> bool:
        """Return True."""
        return True

    def step(self, leaves: Sequence[Leaf], counts: float | Sequence[Tensor], options: StepOptions) -> None:
        """Take one step, in place: see `vsgd.backends.torch.leaves.Engine`."""
        decay = 1 - options.lr * options.weight_decay
        if isinstance(counts, (int, float)):
            coefficients = options.rule.coefficients(counts, options.hyper)
            _step_in_blocks([key_noise(leaf, counts) for leaf in leaves], coefficients, decay, options)
            return
        whole = torch.compiler.is_compiling() or options.differentiable
        for leaf, count in zip(leaves, counts, strict=True):
            # In the arithmetic's dtype: a power of a float32 count would cost a float64 run its accuracy.
            coefficients = options.rule.coefficients(count.to(get_arithmetic_dtype(leaf)), options.hyper)
            if torch.compiler.is_compiling() and leaf.param.is_cpu:
                # In memory, the compiler computes them once, before the loop over elements.
                in_memory = (each.as_strided((), ()) if isinstance(each, Tensor) else each for each in coefficients)
                coefficients = type(coefficients)(*in_memory)
            leaf = key_noise(leaf, count)
            blocks = [leaf] if whole else iterate_blocks(leaf, get_block_size(leaf))
            _step_each(blocks, coefficients, decay, options)


def _step_in_blocks(leaves: Iterable[Leaf], coefficients: Any, decay: Any, options: StepOptions) -> None:
    """Step large leaves in blocks, and small ones many at a time, on a copy."""
    groups, others = group_small(leaves)
    for group in groups:
        for _, batch in iterate_batches(group, get_block_size(group[0])):
            joined = join_leaves(batch)
            _step_each([joined], coefficients, decay, options)
            write_back(joined, batch)
    blocks = (block for leaf in others for block in iterate_blocks(leaf, get_block_size(leaf)))
    _step_each(blocks, coefficients, decay, options)


def _step_each(leaves: Iterable[Leaf], coefficients: Any, decay: Any, options: StepOptions) -> None:
    """Step each leaf by operations that can be compiled, captured in a CUDA graph and differentiated."""
    update = options.rule.make_update(torch)  # type: ignore[arg-type]  # mypy does not see the functions of torch
    for leaf in leaves:
        dtype = get_arithmetic_dtype(leaf)
        # In a differentiable step autograd keeps what the update reads: the writes below must not overwrite it.
        copy = torch.is_grad_enabled()
        old_param, old_grad, *old_state = (tensor.to(dtype, copy=copy) for tensor in list_tensors(leaf))
        scaled = old_grad if options.grad_scale == 1 else old_grad * options.grad_scale
        direction, new_state = update(scaled, tuple(old_state), coefficients)
        stored, new_param = round_values(leaf, new_state, core.descend(old_param, direction, options.lr, decay))
        for old, new in zip(leaf.state, stored, strict=True):
            old.copy_(new)
        leaf.param.copy_(new_param)
