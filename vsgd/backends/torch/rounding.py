"""Stochastic rounding of a leaf's new values, by torch."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vsgd import rounding
from vsgd.backends.torch.leaves import Leaf, Noise, Part, is_plain
from vsgd.backends.torch.private import get_storage_offset
from vsgd.ops import BitOps


class _TorchIntegers(BitOps):
    def view_as_int32(self, x: Tensor) -> Tensor:
        return x.view(torch.int32)

    def view_as_float32(self, i: Tensor) -> Tensor:
        return i.view(torch.float32)

    def where(self, condition: Tensor, x: Any, y: Any) -> Tensor:
        return torch.where(condition, x, y)


_compute_key = rounding.make_key(_TorchIntegers())
_compute_word = rounding.make_word(_TorchIntegers())
_to_bfloat16 = rounding.make_round(_TorchIntegers())


def key_noise(leaf: Leaf, count: float | Tensor) -> Leaf:
    """Return the leaf with the noise of one step.

    Args:
        leaf: a leaf whose noise has a `rounding.base_key`, or no noise.
        count: the parameter's step count, a number or a 0-d tensor.
    """
    if leaf.noise is None:
        return leaf
    if isinstance(count, Tensor):
        key = _compute_key(leaf.noise.key, count.to(torch.int32))
    else:
        key = rounding.host_key(leaf.noise.key, int(count))
    return leaf._replace(noise=leaf.noise._replace(key=key))


def key_noises(leaves: Sequence[Leaf], counts: Tensor) -> Sequence[Leaf]:
    """Return leaves of one device with the noise of one step each, in as few calls as for one leaf.

    Args:
        leaves: leaves whose noise has a `rounding.base_key`, or no noise.
        counts: their step counts, a vector on that device.
    """
    if all(leaf.noise is None for leaf in leaves):
        return leaves
    bases: list[Any] = [0 if leaf.noise is None else leaf.noise.key for leaf in leaves]
    # The host passes the keys as scalars: a CUDA graph captures no copy from pageable memory.
    zeros = torch.zeros(len(bases), dtype=torch.int32, device=counts.device).unbind()
    keys = _compute_key(torch.stack(torch._foreach_add(zeros, bases)), counts.to(torch.int32)).unbind()
    return [
        leaf if leaf.noise is None else leaf._replace(noise=leaf.noise._replace(key=key))
        for leaf, key in zip(leaves, keys, strict=True)
    ]


def round_values(leaf: Leaf, state: Sequence[Tensor], param: Tensor) -> tuple[Sequence[Tensor], Tensor]:
    """Return a leaf's new state and parameter, rounded stochastically where `leaf.noise` is set.

    Args:
        leaf: a leaf with the noise of this step, or without noise.
        state: its new state arrays, float32 where the leaf has noise.
        param: its new parameter, likewise.

    Returns:
        `state` and `param` in the same dtype.
    """
    noise = leaf.noise
    if noise is None:
        return state, param
    word = _compute_word(_compute_indices(leaf, noise), noise.key)
    if leaf.state[0].dtype is torch.bfloat16:
        state = [_to_bfloat16(value, word, rounding.MULTIPLIERS[k]) for k, value in enumerate(state)]
    if noise.round_param:
        param = _to_bfloat16(param, word, rounding.MULTIPLIERS[len(state)])
    return state, param


def _compute_indices(leaf: Leaf, noise: Noise) -> Tensor:
    """Return each element's index in the memory of the whole state array, int32."""
    array = leaf.state[0]
    if not is_plain(array):
        return torch.arange(array.numel(), dtype=torch.int32, device=array.device).view(array.shape)
    ranges = [
        # Counted in int64, because an index beyond 2**31 wraps around.
        (torch.arange(size, device=array.device) * stride).view(-1, *[1] * (array.dim() - dim - 1))
        for dim, (size, stride) in enumerate(zip(array.shape, array.stride(), strict=True))
    ]
    # Filled on the device: a copy from the host would wait for it, and a CUDA graph could not capture it.
    first = torch.full((), get_storage_offset(array) - noise.origin, dtype=torch.int64, device=array.device)
    indices = functools.reduce(torch.add, ranges, first)
    return (indices if noise.part is None else _map_to_whole(indices, noise.part)).to(torch.int32)


def _map_to_whole(indices: Tensor, part: Part) -> Tensor:
    """Return indices in a shard's memory as indices in the whole tensor's memory."""
    result = torch.full_like(indices, part.first)
    for local, whole in part.strides:
        result += indices // local * whole
        indices = indices % local
    return result
