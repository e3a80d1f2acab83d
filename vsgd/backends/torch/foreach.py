"""The core run by torch on lists of tensors: few calls, and on a GPU few kernel launches, for many parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
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
    is_plain,
    iterate_batches,
    list_tensors,
)
from vsgd.backends.torch.rounding import key_noise, round_values


class TensorList:
    """A list of tensors with arithmetic operators over `torch._foreach_*`.

    The other operand is a number or a list of equally many tensors, each of the same shape or 0-d.

    Example:
        >>> values = TensorList([torch.tensor([1.0, 2.0]), torch.tensor([4.0])])
        >>> [tensor.tolist() for tensor in (1 - values / 2).tensors]
        [[0.5, 0.0], [-1.0]]
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors = list(tensors)

    def __getitem__(self, index: int) -> Tensor:
        return self.tensors[index]

    def __neg__(self) -> TensorList:
        return TensorList(torch._foreach_neg(self.tensors))

    def __abs__(self) -> TensorList:
        return TensorList(torch._foreach_abs(self.tensors))

    def __add__(self, other: Any) -> TensorList:
        return self._apply(torch._foreach_add, other)

    def __sub__(self, other: Any) -> TensorList:
        return self._apply(torch._foreach_sub, other)

    def __mul__(self, other: Any) -> TensorList:
        return self._apply(torch._foreach_mul, other)

    def __truediv__(self, other: Any) -> TensorList:
        return self._apply(torch._foreach_div, other)

    def __pow__(self, exponent: float) -> TensorList:
        return self._apply(torch._foreach_pow, exponent)

    def __radd__(self, other: Any) -> TensorList:
        return self + other

    def __rsub__(self, other: Any) -> TensorList:
        return self.__neg__() + other

    def __rmul__(self, other: Any) -> TensorList:
        return self * other

    def _apply(self, operation: Callable[..., Any], other: Any) -> TensorList:
        return TensorList(operation(self.tensors, other.tensors if isinstance(other, TensorList) else other))


class TensorListOps:
    """The array operations of `TensorList`."""

    def sqrt(self, x: TensorList) -> TensorList:
        """Return the square root of each element."""
        return TensorList(torch._foreach_sqrt(x.tensors))

    def minimum(self, x: TensorList, y: TensorList) -> TensorList:
        """Return the smaller element of each pair."""
        return TensorList(torch._foreach_minimum(x.tensors, y.tensors))

    def maximum(self, x: TensorList, y: TensorList) -> TensorList:
        """Return the larger element of each pair."""
        return TensorList(torch._foreach_maximum(x.tensors, y.tensors))


class Foreach(Engine):
    """Steps plain leaves on CUDA, or leaves of any kind.

    Args:
        everywhere: whether to accept leaves of any kind.
    """

    def __init__(self, everywhere: bool) -> None:
        self._everywhere = everywhere

    def accepts(self, leaf: Leaf) -> bool:
        """Return whether the engine accepts every leaf, or the leaf is plain and on CUDA."""
        return self._everywhere or (leaf.param.is_cuda and is_plain(leaf.param))

    def step(self, leaves: Sequence[Leaf], counts: float | Sequence[Tensor], options: StepOptions) -> None:
        """Take one step, in place: see `vsgd.backends.torch.leaves.Engine`.

        Leaves are grouped by device, dtype and tensor type, and cut into batches, so that the temporaries of a call stay small.
        """
        lr = options.lr
        if isinstance(counts, (int, float)):
            coefficients = options.rule.coefficients(counts, options.hyper)
            leaves = [key_noise(leaf, counts) for leaf in leaves]
        else:
            # In the arithmetic's dtype: a power of a float32 count would cost a float64 run its accuracy.
            wide = [count.to(get_arithmetic_dtype(leaf)) for leaf, count in zip(leaves, counts, strict=True)]
            coefficients = options.rule.coefficients(TensorList(wide), options.hyper)
            leaves = [key_noise(leaf, count) for leaf, count in zip(leaves, counts, strict=True)]
            lr = TensorList([lr] * len(leaves)) if isinstance(lr, Tensor) else lr
        scalars = (*coefficients, lr, 1 - lr * options.weight_decay)
        if torch.compiler.is_compiling():  # the compiler fuses operations itself: temporaries need no bound
            _step_batch(leaves, scalars, options, type(coefficients))
            return
        groups: dict[Any, list[int]] = {}
        for index, leaf in enumerate(leaves):
            key = (leaf.param.device, leaf.param.dtype, leaf.grad.dtype, type(leaf.param))
            groups.setdefault(key, []).append(index)
        for members in groups.values():
            group = [leaves[index] for index in members]
            for indices, batch in iterate_batches(group, get_block_size(group[0])):
                chosen = [members[index] for index in indices]
                _step_batch(batch, [_select(scalar, chosen) for scalar in scalars], options, type(coefficients))


def _select(scalar: float | TensorList, indices: Iterable[int]) -> float | TensorList:
    return TensorList([scalar[index] for index in indices]) if isinstance(scalar, TensorList) else scalar


def _step_batch(batch: Sequence[Leaf], scalars: Sequence[Any], options: StepOptions, make_coefficients: Any) -> None:
    *coefficients, lr, decay = scalars
    dtypes = [get_arithmetic_dtype(leaf) for leaf in batch]
    params, grads, *states = (
        TensorList([tensor.to(dtype) for dtype, tensor in zip(dtypes, role, strict=True)])
        for role in zip(*map(list_tensors, batch), strict=True)
    )
    update = options.rule.make_update(TensorListOps())
    scaled = grads if options.grad_scale == 1 else grads * options.grad_scale
    direction, new_states = update(scaled, tuple(states), make_coefficients(*coefficients))
    new_params = core.descend(params, direction, lr, decay)
    new_states_of_leaves = zip(*(new.tensors for new in new_states), strict=True)
    rounded = [round_values(*each) for each in zip(batch, new_states_of_leaves, new_params.tensors, strict=True)]
    old_roles = zip(*((*leaf.state, leaf.param) for leaf in batch), strict=True)
    new_roles = zip(*((*state, param) for state, param in rounded), strict=True)
    for old, new in zip(old_roles, new_roles, strict=True):
        torch._foreach_copy_(old, new)
