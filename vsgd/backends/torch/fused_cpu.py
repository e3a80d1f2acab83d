"""The numba kernel on torch tensors in CPU memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from operator import attrgetter, is_, itemgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vsgd import core, rounding
from vsgd.backends import numba as numba_cpu
from vsgd.backends.torch.leaves import Leaf, is_flat, is_plain

try:
    from torch._C._dynamo.guards import TensorGuards
except ImportError:  # it is private, and another torch may lack it
    TensorGuards = None  # type: ignore[assignment,misc]

# bfloat16, which NumPy lacks, by its bits.
_DTYPES = {torch.float32: np.float32, torch.float64: np.float64, torch.bfloat16: np.uint16}

_grad_of: Callable[[Tensor], Tensor | None] = attrgetter("grad")


def accepts(leaf: Leaf, step: Tensor) -> bool:
    """Whether the kernel can run on the leaf: dense tensors of one layout and of dtypes that it knows, in CPU memory."""
    param, grad, state, noise = leaf
    dtype, stored, shape = param.dtype, state[0].dtype, param.shape
    if noise is not None and noise.part is not None:  # the kernel counts places one by one
        return False
    if dtype not in _DTYPES or not is_plain(param) or not is_plain(grad) or grad.dtype is not dtype:
        return False
    if stored is not dtype and {dtype, stored} != {torch.float32, torch.bfloat16}:
        return False
    if step.dtype not in (torch.float32, torch.float64) or not step.is_cpu or step.numel() != 1:
        return False
    # Every one, for the kernel writes where it is told: state of another size or device would be memory that is not ours.
    for tensor in leaf.tensors:
        if tensor.shape != shape or not tensor.is_cpu or tensor.is_neg():
            return False
    return all(array.dtype is stored for array in state) and is_flat(leaf)


class Batch:
    """Leaves that the kernel steps together, as it wants them: a table of addresses and a list of chunks.

    The tensors that it was made of must lie where they lay.

    Args:
        leaves: parameters that `accepts`.
        steps: their step counts.
    """

    def __init__(self, leaves: Sequence[Leaf], steps: Sequence[Tensor]) -> None:
        self._addresses = tuple(_addresses(tensors) for tensors in zip(*(leaf.tensors for leaf in leaves), strict=True))
        self._step_addresses = _addresses(steps)
        self._work = numba_cpu.chunks(np.array([leaf.param.numel() for leaf in leaves], dtype=np.int64))
        self._kinds = _masks([_kind(leaf) for leaf in leaves])
        self._step_kinds = _masks([_DTYPES[step.dtype] for step in steps])
        self._rounds = any(leaf.noise is not None for leaf in leaves)
        self._keys = np.array([0 if leaf.noise is None else leaf.noise.key for leaf in leaves], dtype=np.int64)
        self._places = np.array(
            [0 if leaf.noise is None else leaf.state[0].storage_offset() - leaf.noise.origin for leaf in leaves], dtype=np.int64
        )
        self._changing = [*steps, *chain.from_iterable((leaf.param, *leaf.state) for leaf in leaves)]

    def move_grads(self, grads: Sequence[Tensor]) -> None:
        """Take other gradients, like the old ones in all but their address."""
        self._addresses[1][:] = _addresses(grads)

    def step(self, rule: core.Rule, hyper: Any, lr: float, decay: float, *, maximize: bool = False) -> None:
        """One step, in place, on all leaves at once, with the coefficients of the count of each.

        Args:
            rule: the variant to run.
            hyper: its hyperparameters.
            lr: step size.
            decay: `1 - lr * weight_decay`.
            maximize: whether to step with the negative gradient.
        """
        counts = np.empty(len(self._keys))
        for dtype, chosen in self._step_kinds.items():
            counts[chosen] = numba_cpu.count(self._step_addresses[chosen], dtype)
        # Two dozen small operations, which count where nothing is rounded and the step is short.
        keys = rounding.host_key(self._keys, counts.astype(np.int64)) if self._rounds else self._keys
        noise = numba_cpu.Noise(keys.astype(np.int32), self._places)
        for (stored, round_params), chosen in self._kinds.items():
            for value in np.unique(counts[chosen]):
                numba_cpu.step(
                    rule,
                    self._addresses,
                    self._work.of(chosen & (counts == value)),
                    rule.coefficients(value.item(), hyper),
                    lr,
                    decay,
                    stored=stored,
                    noise=noise,
                    round_params=round_params,
                    maximize=maximize,
                    threads=torch.get_num_threads(),
                )
        # Autograd must see that these changed, as it does with torch's own operations.
        torch.autograd.graph.increment_version(self._changing)


def _addresses(tensors: Sequence[Tensor]) -> np.ndarray:
    return np.array(list(map(Tensor.data_ptr, tensors)), dtype=np.int64)


def _kind(leaf: Leaf) -> tuple[tuple[Any, ...], bool]:
    """What the kernel is compiled for: the dtype of each role's arrays, and whether the parameter is rounded at random."""
    return tuple(_DTYPES[tensor.dtype] for tensor in leaf.tensors), leaf.noise is not None and leaf.noise.of_param


def _masks(kinds: Sequence[Any]) -> dict[Any, np.ndarray]:
    """The kinds that occur, and which have each."""
    return {kind: np.array([each == kind for each in kinds]) for kind in set(kinds)}


def make_plan(batch: Batch, *repeated: Any) -> Plan | None:
    """A `Plan` of these arguments; None where torch lacks what its check takes, so that each step is one of its own."""
    return None if TensorGuards is None else Plan(batch, *repeated)


class Plan:
    """A batch to be stepped again and again, without looking at each tensor anew.

    What was found when the batch was made holds as long as every tensor is the same one, of the same dtype, shape, strides and
    kind, and at the same address; of gradients, which may be new ones in each step, all but the address. `renew` looks, in few
    calls for all tensors.

    Attributes:
        batch: what to step.
        others: parameters of the group that are not in it.

    Args:
        batch: of `leaves`.
        group: the parameters of the optimizer's group.
        leaves: for some of them, of the parameter, gradient and state themselves, not views or parts of them.
        steps: their step counts.
        names: of the state arrays in the leaves.
    """

    def __init__(
        self, batch: Batch, group: Sequence[Tensor], leaves: Sequence[Leaf], steps: Sequence[Tensor], names: Sequence[str]
    ) -> None:
        self.batch = batch
        self._group = list(group)
        self._params = [leaf.param for leaf in leaves]
        mine = set(map(id, self._params))
        self.others = [param for param in group if id(param) not in mine]
        self._of_state: Callable[[Any], tuple[Tensor, ...]] = itemgetter("step", *names)
        kept = [tensor for leaf, step in zip(leaves, steps, strict=True) for tensor in (step, *leaf.state)]
        self._fixed = [*self._params, *kept]
        self._fixed_addresses = list(map(Tensor.data_ptr, self._fixed))
        # The compiler's check of its inputs: one call for all that is asked here, a hundredth of the time.
        seen = [*self._fixed, *(leaf.grad for leaf in leaves)]
        sizes, strides = ([list(of(tensor)) for tensor in seen] for of in (Tensor.size, Tensor.stride))
        guards: Any = TensorGuards  # its annotation is wrong: it takes a list for each tensor
        self._guards = guards(*seen, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)

    def renew(self, group: Sequence[Tensor], state: Mapping[Tensor, dict[str, Tensor]]) -> bool:
        """Make the batch ready for the next step, where nothing has changed but the gradients.

        Args:
            group: the parameters of the optimizer's group.
            state: the optimizer's.

        Returns:
            Whether that is so. If not, neither this plan nor its batch may be used any more.
        """
        if len(group) != len(self._group) or not all(map(is_, group, self._group)):
            return False
        kept = chain.from_iterable(map(self._of_state, map(state.get, self._params)))
        try:
            if not all(map(is_, kept, self._fixed[len(self._params) :])):
                return False
        except (KeyError, TypeError):  # there is no state, or not all of it
            return False
        grads: list[Any] = list(map(_grad_of, self._params))
        if not self._guards.check(*self._fixed, *grads) or list(map(Tensor.data_ptr, self._fixed)) != self._fixed_addresses:
            return False
        self.batch.move_grads(grads)
        return True
