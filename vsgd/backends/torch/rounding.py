"""Stochastic rounding of a leaf's new values, by torch."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vsgd import rounding
from vsgd.backends.torch.leaves import Leaf, Noise, Part, is_plain


class _Namespace(rounding.Wrapping):
    """The integer namespace of torch."""

    where = staticmethod(torch.where)

    @staticmethod
    def bits(x: Tensor) -> Tensor:
        return x.view(torch.int32)

    @staticmethod
    def floats(i: Tensor) -> Tensor:
        return i.view(torch.float32)


_key = rounding.make_key(_Namespace)
_word = rounding.make_word(_Namespace)
_to_bfloat16 = rounding.make_round(_Namespace)


def noise_at(noise: Noise, step: float | Tensor) -> Noise:
    """The noise of one step.

    Args:
        noise: its key is a `rounding.base_key`.
        step: the parameter's count of steps, a number or a 0-d tensor.
    """
    if isinstance(step, Tensor):
        return noise._replace(key=_key(noise.key, step.to(torch.int32)))
    return noise._replace(key=rounding.host_key(noise.key, int(step)))


def leaves_at(leaves: Sequence[Leaf], steps: Tensor) -> Sequence[Leaf]:
    """Leaves of one device with the noise of one step, in as few calls as for one of them.

    Args:
        leaves: the keys of their noise are numbers, each a `rounding.base_key`.
        steps: their counts of steps, on that device.
    """
    if all(leaf.noise is None for leaf in leaves):
        return leaves
    bases: list[Any] = [0 if leaf.noise is None else leaf.noise.key for leaf in leaves]
    # Not a copy from the host, for a CUDA graph captures none from memory that may be paged out.
    zeros = torch.zeros(len(bases), dtype=torch.int32, device=steps.device).unbind()
    keys = _key(torch.stack(torch._foreach_add(zeros, bases)), steps.to(torch.int32)).unbind()
    return [
        leaf if leaf.noise is None else leaf._replace(noise=leaf.noise._replace(key=key))
        for leaf, key in zip(leaves, keys, strict=True)
    ]


def _places(leaf: Leaf, noise: Noise) -> Tensor:
    """Each element's place in the memory of its state array, the whole one where it is a shard, int32."""
    array = leaf.state[0]
    if not is_plain(array):
        return torch.arange(array.numel(), dtype=torch.int32, device=array.device).view(array.shape)
    ranges = [
        # Counted in int64, for a place beyond 2**31 wraps around.
        (torch.arange(size, device=array.device) * stride).view(-1, *[1] * (array.dim() - dim - 1))
        for dim, (size, stride) in enumerate(zip(array.shape, array.stride(), strict=True))
    ]
    first = torch.tensor(array.storage_offset() - noise.origin, device=array.device)
    places = functools.reduce(torch.add, ranges, first)
    return (places if noise.part is None else _in_whole(places, noise.part)).to(torch.int32)


def _in_whole(places: Tensor, part: Part) -> Tensor:
    """Places in a shard's memory as places in the whole tensor's."""
    result = torch.full_like(places, part.first)
    for here, there in part.strides:
        result += places // here * there
        places = places % here
    return result


def rounded(leaf: Leaf, state: Sequence[Tensor], param: Tensor) -> tuple[Sequence[Tensor], Tensor]:
    """New values of a leaf as they will be stored, where they are to be rounded at random.

    Args:
        leaf: with the noise of this step, or without noise.
        state: its new state arrays, float32 where the leaf has noise.
        param: its new parameter, likewise.

    Returns:
        `state` and `param`, in the same dtype.
    """
    noise = leaf.noise
    if noise is None:
        return state, param
    word = _word(_places(leaf, noise), noise.key)
    if leaf.state[0].dtype is torch.bfloat16:
        state = [_to_bfloat16(value, word, rounding.MULTIPLIERS[k]) for k, value in enumerate(state)]
    if noise.of_param:
        param = _to_bfloat16(param, word, rounding.MULTIPLIERS[len(state)])
    return state, param
