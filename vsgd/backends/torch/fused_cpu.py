"""The numba kernel on torch tensors in CPU memory, and plans that step the same tensors again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from operator import attrgetter, is_, itemgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vsgd import rounding
from vsgd.backends import numba as numba_kernel
from vsgd.backends.torch.leaves import Engine, Leaf, StepOptions, is_flat, is_plain, list_tensors
from vsgd.backends.torch.private import TensorGuards

# NumPy has no bfloat16: the kernel takes its bits.
_DTYPES = {torch.float32: np.float32, torch.float64: np.float64, torch.bfloat16: np.uint16}

_get_grad: Callable[[Tensor], Tensor | None] = attrgetter("grad")


class FusedCpu(Engine):
    """Steps dense tensors of one layout in CPU memory, with step counts that are Python numbers."""

    def accepts(self, leaf: Leaf) -> bool:
        """Return whether the kernel can step the leaf: dense tensors of one layout, in dtypes that it supports."""
        param, grad, state, noise = leaf
        dtype, stored, shape = param.dtype, state[0].dtype, param.shape
        if noise is not None and noise.part is not None:  # the kernel counts indices one by one
            return False
        if dtype not in _DTYPES or not is_plain(param) or not is_plain(grad) or grad.dtype is not dtype:
            return False
        if stored is not dtype and {dtype, stored} != {torch.float32, torch.bfloat16}:
            return False
        # Each tensor is checked: the kernel writes to raw addresses, beyond state of another size or device.
        for tensor in list_tensors(leaf):
            if tensor.shape != shape or not tensor.is_cpu or tensor.is_neg():
                return False
        return all(array.dtype is stored for array in state) and is_flat(leaf)

    def step(self, leaves: Sequence[Leaf], counts: Any, options: StepOptions) -> None:
        """Take one step, in place: see `vsgd.backends.torch.leaves.Engine`."""
        Batch(leaves).step(np.full(len(leaves), counts, dtype=np.float64), options)

    def make_plan(
        self, group: Sequence[Tensor], leaves: Sequence[Leaf], counts: Sequence[Tensor], names: Sequence[str]
    ) -> Plan | None:
        """Return a plan of the leaves whose counts the kernel can read: see `vsgd.backends.torch.leaves.Engine`."""
        pairs = [
            (leaf, count)
            for leaf, count in zip(leaves, counts, strict=True)
            if count.dtype in (torch.float32, torch.float64) and count.is_cpu and count.numel() == 1 and is_plain(count)
        ]
        if not pairs or TensorGuards is None:
            return None
        return Plan(group, [leaf for leaf, _ in pairs], [count for _, count in pairs], names)


class Batch:
    """Leaves that the kernel steps together: a table of addresses and a list of chunks.

    The batch is valid as long as the tensors stay at their addresses.

    Args:
        leaves: leaves that the engine accepts, whose noise has a `rounding.base_key`.
    """

    def __init__(self, leaves: Sequence[Leaf]) -> None:
        self._addresses = np.stack([_get_addresses(role) for role in zip(*map(list_tensors, leaves), strict=True)])
        self._chunks = numba_kernel.list_chunks(np.array([leaf.param.numel() for leaf in leaves], dtype=np.int64))
        self._signatures = _make_masks([_get_signature(leaf) for leaf in leaves])
        self._rounds = any(leaf.noise is not None for leaf in leaves)
        self._base_keys = np.array([0 if leaf.noise is None else leaf.noise.key for leaf in leaves], dtype=np.int64)
        self._first_indices = np.array(
            [0 if leaf.noise is None else leaf.state[0].storage_offset() - leaf.noise.origin for leaf in leaves], dtype=np.int64
        )
        self._written = [tensor for leaf in leaves for tensor in (leaf.param, *leaf.state)]

    def set_grads(self, grads: Iterable[Tensor]) -> None:
        """Use other gradients, which equal the old ones in all but their addresses."""
        self._addresses[1] = _get_addresses(grads)

    def step(self, counts: np.ndarray, options: StepOptions) -> None:
        """Take one step, in place, with the coefficients of each leaf's count.

        Args:
            counts: which step it is for each leaf, float64.
            options: the step's options.
        """
        # Two dozen small operations cost as much as a short step: skip them where nothing is rounded.
        keys = rounding.host_key(self._base_keys, counts.astype(np.int64)) if self._rounds else self._base_keys
        noise = numba_kernel.NoiseTable(keys.astype(np.int32), self._first_indices)
        for (stored, round_params), chosen in self._signatures.items():
            for count in np.unique(counts[chosen]):
                numba_kernel.step(
                    options.rule,
                    self._addresses,
                    self._chunks.select(chosen & (counts == count)),
                    options.rule.coefficients(count.item(), options.hyper),
                    options.lr,
                    1 - options.lr * options.weight_decay,
                    stored=stored,
                    noise=noise,
                    round_params=round_params,
                    grad_scale=options.grad_scale,
                    threads=torch.get_num_threads(),
                )
        # Autograd must see the writes, as it sees those of torch's own operations.
        torch.autograd.graph.increment_version(self._written)


class Plan:
    """A batch to be stepped again and again, without a look at each tensor.

    It stays valid as long as every tensor is the same object, of the same dtype, shape, strides and kind, at the same
    address; a gradient may be a new one at another address. `renew` checks that, in few calls for all tensors.

    Attributes:
        others: the group's parameters that are not in the batch.

    Args:
        group: see `FusedCpu.make_plan`.
        leaves: see `FusedCpu.make_plan`.
        counts: see `FusedCpu.make_plan`.
        names: see `FusedCpu.make_plan`.
    """

    def __init__(self, group: Sequence[Tensor], leaves: Sequence[Leaf], counts: Sequence[Tensor], names: Sequence[str]) -> None:
        self._batch = Batch(leaves)
        self._group = list(group)
        self._params = [leaf.param for leaf in leaves]
        planned = set(map(id, self._params))
        self.others = [param for param in group if id(param) not in planned]
        self._counts = list(counts)
        self._count_addresses = _get_addresses(counts)
        self._count_dtypes = _make_masks([_DTYPES[count.dtype] for count in counts])
        self._get_state: Callable[[Any], tuple[Tensor, ...]] = itemgetter("step", *names)
        state = [tensor for leaf, count in zip(leaves, counts, strict=True) for tensor in (count, *leaf.state)]
        self._fixed = [*self._params, *state]
        self._fixed_addresses = list(map(Tensor.data_ptr, self._fixed))
        # The compiler's check of its inputs takes one call, and a hundredth of the time of a check in Python.
        checked = [*self._fixed, *(leaf.grad for leaf in leaves)]
        sizes, strides = ([list(get(tensor)) for tensor in checked] for get in (Tensor.size, Tensor.stride))
        guards: Any = TensorGuards  # its annotation is wrong: it takes one list per tensor
        self._guards = guards(*checked, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)

    def renew(self, group: Sequence[Tensor], state: Mapping[Tensor, dict[str, Tensor]]) -> bool:
        """Prepare the next step, if nothing has changed but the gradients.

        Args:
            group: the parameters of the optimizer's group.
            state: the optimizer's state.

        Returns:
            Whether the plan is still valid. If not, do not use it any more.
        """
        if len(group) != len(self._group) or not all(map(is_, group, self._group)):
            return False
        current = chain.from_iterable(map(self._get_state, map(state.get, self._params)))
        try:
            if not all(map(is_, current, self._fixed[len(self._params) :])):
                return False
        except (KeyError, TypeError):  # state is missing, or incomplete
            return False
        grads: list[Any] = list(map(_get_grad, self._params))
        if not self._guards.check(*self._fixed, *grads) or list(map(Tensor.data_ptr, self._fixed)) != self._fixed_addresses:
            return False
        self._batch.set_grads(grads)
        return True

    def step(self, options: StepOptions) -> None:
        """Take one step, in place. The kernel reads and increases the step counts, so that a user's writes to them count."""
        counts = np.empty(len(self._counts))
        for dtype, chosen in self._count_dtypes.items():
            counts[chosen] = numba_kernel.increase_counts(self._count_addresses[chosen], dtype)
        self._batch.step(counts, options)
        torch.autograd.graph.increment_version(self._counts)


def _get_addresses(tensors: Iterable[Tensor]) -> np.ndarray:
    return np.array(list(map(Tensor.data_ptr, tensors)), dtype=np.int64)


def _get_signature(leaf: Leaf) -> tuple[tuple[Any, ...], bool]:
    """Return what the kernel is compiled for: each role's dtype, and whether the parameter is rounded stochastically."""
    return tuple(_DTYPES[tensor.dtype] for tensor in list_tensors(leaf)), leaf.noise is not None and leaf.noise.round_param


def _make_masks(values: Sequence[Any]) -> dict[Any, np.ndarray]:
    """Return for each distinct value a mask of the places where it occurs."""
    return {value: np.array([each == value for each in values]) for value in set(values)}
