"""The core's update run by torch on lists of tensors: few calls (on a GPU few kernel launches) for many parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from vsgd import core
from vsgd.backends.torch.leaves import Leaf, batches, block_size
from vsgd.backends.torch.rounding import rounded


class TensorList:
    """A list of tensors with arithmetic operators over `torch._foreach_*`.

    The other operand is a number or a list of as many tensors, each of the same shape or 0-d.

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
        return -self + other

    def __rmul__(self, other: Any) -> TensorList:
        return self * other

    def _apply(self, operation: Callable[..., Any], other: Any) -> TensorList:
        return TensorList(operation(self.tensors, other.tensors if isinstance(other, TensorList) else other))


class _Namespace:
    """The array namespace of `TensorList`."""

    @staticmethod
    def sqrt(values: TensorList) -> TensorList:
        return TensorList(torch._foreach_sqrt(values.tensors))

    @staticmethod
    def minimum(values: TensorList, others: TensorList) -> TensorList:
        return TensorList(torch._foreach_minimum(values.tensors, others.tensors))

    @staticmethod
    def maximum(values: TensorList, others: TensorList) -> TensorList:
        return TensorList(torch._foreach_maximum(values.tensors, others.tensors))


def _by_kind(leaves: Iterable[Leaf]) -> dict[Any, list[int]]:
    kinds: dict[Any, list[int]] = {}
    for index, leaf in enumerate(leaves):
        param = leaf.param
        kinds.setdefault((param.device, param.dtype, leaf.grad.dtype, type(param)), []).append(index)
    return kinds


def step(
    rule: core.Rule,
    leaves: Sequence[Leaf],
    coefficients: Any,
    lr: float | TensorList,
    decay: float | TensorList,
    *,
    maximize: bool = False,
) -> None:
    """One step, in place, on all leaves.

    Leaves are grouped by device, dtype and tensor type, and cut into chunks, so that the temporaries of a call stay small.

    Args:
        rule: the variant to run.
        leaves: parameters.
        coefficients: `rule.coefficients(step, hyper)`, of numbers for all leaves, or of lists with a 0-d tensor for each.
        lr: step size, likewise.
        decay: `1 - lr * weight_decay`, likewise.
        maximize: whether to step with the negative gradient.
    """
    update = rule.make_update(_Namespace)
    if torch.compiler.is_compiling():  # the compiler fuses by itself: nothing to group, no temporaries to bound
        _step_chunk(update, leaves, coefficients, lr, decay, maximize)
        return
    for members in _by_kind(leaves).values():
        kind = [leaves[index] for index in members]
        for indices, chunk in batches(kind, block_size(kind[0])):
            which = [members[index] for index in indices]
            c = type(coefficients)(*(_of_leaves(value, which) for value in coefficients))
            _step_chunk(update, chunk, c, _of_leaves(lr, which), _of_leaves(decay, which), maximize)


def _of_leaves(value: float | TensorList, indices: Iterable[int]) -> float | TensorList:
    """The scalars of these leaves: one for all, or each its own."""
    return TensorList([value[index] for index in indices]) if isinstance(value, TensorList) else value


def _step_chunk(
    update: core.Update, chunk: Sequence[Leaf], c: Any, lr: float | TensorList, decay: float | TensorList, maximize: bool
) -> None:
    grads, *states = (
        TensorList([tensor.to(leaf.dtype) for leaf, tensor in zip(chunk, tensors, strict=True)])
        for tensors in zip(*(leaf.tensors[1:] for leaf in chunk), strict=True)
    )
    direction, new_states = update(-grads if maximize else grads, tuple(states), c)
    wide_params = TensorList([leaf.param.to(leaf.dtype) for leaf in chunk])
    new_params = core.descend(wide_params, direction, lr, decay)
    per_leaf = zip(*(new.tensors for new in new_states), strict=True)
    stored = [rounded(*each) for each in zip(chunk, per_leaf, new_params.tensors, strict=True)]
    old_roles = zip(*((*leaf.state, leaf.param) for leaf in chunk), strict=True)
    new_roles = zip(*((*state, param) for state, param in stored), strict=True)
    for old, new in zip(old_roles, new_roles, strict=True):
        torch._foreach_copy_(old, new)
