"""What an engine steps: parameters with gradients and states, whole, cut into blocks or joined, and the options of the step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from vsgd import core
from vsgd.backends.torch.private import get_storage_offset, locate_shard

#: Elements in a block on the CPU: a block's arrays and temporaries fit into the caches.
CPU_BLOCK = 65536
#: Bytes of an array of a block on other devices: each block costs a dozen launches, and a dozen temporaries stay under 400 MB.
DEVICE_BLOCK_BYTES = 2**25
#: Elements up to which a leaf is small: a call of an operation costs more than a copy of the leaf.
SMALL = 4096


class StepOptions(NamedTuple):
    """How to step some leaves.

    Attributes:
        rule: the variant to run.
        hyper: its hyperparameters, numbers or 0-d tensors.
        lr: the step size, a number or a 0-d tensor.
        weight_decay: decoupled weight decay.
        grad_scale: the factor of gradients: the inverse of the state's unit, negative to maximize.
        foreach: whether to run on lists of tensors; None: where that is faster.
        fused: whether to run one kernel for all leaves; None: where that is possible and faster.
        differentiable: whether autograd runs through the step.
        on_device: whether step counts, and so the coefficients, are 0-d tensors that nothing reads back to the host.
    """

    rule: core.Rule
    hyper: Any
    lr: Any
    weight_decay: Any
    grad_scale: float = 1.0
    foreach: bool | None = None
    fused: bool | None = None
    differentiable: bool = False
    on_device: bool = False


class Part(NamedTuple):
    """Where a shard's elements are in the whole tensor.

    Attributes:
        first: the index of the shard's first element.
        strides: for each dimension, outermost in memory first, the stride in the shard and the stride in the whole tensor.
    """

    first: int
    strides: tuple[tuple[int, int], ...]


class Noise(NamedTuple):
    """The random bits with which a leaf's new values are rounded to bfloat16.

    Attributes:
        key: the parameter's `rounding.base_key`; inside an engine, the key of one step, which may be a 0-d tensor.
        origin: the storage offset of the element with index 0; negative for a shard that begins later.
        round_param: whether the parameter is rounded stochastically too, and not to the nearest.
        part: the place of a shard that is not a contiguous piece of the whole tensor; None for all others.
    """

    key: Any
    origin: int
    round_param: bool
    part: Part | None = None


class Leaf(NamedTuple):
    """One parameter, or a block of it, with all arrays that a step reads and writes.

    Attributes:
        param: the parameter, real.
        grad: its gradient, of the same shape.
        state: its state arrays, of the same shape and in the rule's order.
        noise: the random bits of its rounding; None where nothing is rounded stochastically.
    """

    param: Tensor
    grad: Tensor
    state: tuple[Tensor, ...]
    noise: Noise | None = None


class Engine(ABC):  # not a `Protocol`, whose subclasses change when they are first made, and compiled code with them
    """One way to run the core on leaves. `vsgd.backends.torch.dispatch` gives each leaf to the first engine that accepts it."""

    @abstractmethod
    def accepts(self, leaf: Leaf) -> bool:
        """Return whether the engine can step this leaf."""

    @abstractmethod
    def step(self, leaves: Sequence[Leaf], counts: float | Sequence[Tensor], options: StepOptions) -> None:
        """Take one step, in place.

        Args:
            leaves: leaves that the engine accepts.
            counts: which step this is, 1 for the first: one number for all leaves, or with `on_device` a 0-d tensor for each.
            options: the step's options, with Python numbers unless `on_device`.
        """

    def make_plan(
        self, group: Sequence[Tensor], leaves: Sequence[Leaf], counts: Sequence[Tensor], names: Sequence[str]
    ) -> Plan | None:
        """Return a plan to step these leaves now and again, or None if the engine has none.

        Args:
            group: the parameters of the optimizer's group.
            leaves: leaves whose tensors are the parameter, gradient and state themselves, and no views of them.
            counts: their step counts.
            names: the names of the state arrays.
        """
        return None


class Plan(Protocol):
    """Leaves of a group that are stepped again and again.

    Attributes:
        others: the group's parameters that are not in the plan.
    """

    others: list[Tensor]

    def renew(self, group: Sequence[Tensor], state: Mapping[Tensor, dict[str, Tensor]]) -> bool:
        """Prepare the next step if nothing has changed but the gradients, and return whether the plan is still valid."""

    def step(self, options: StepOptions) -> None:
        """Take one step, in place, and increase the step counts."""


# Functions, not properties of `Leaf`: compilers of older torch reject properties of named tuples.


def get_arithmetic_dtype(leaf: Leaf) -> torch.dtype:
    """Return the dtype in which a leaf is computed: float32 or float64."""
    return torch.promote_types(leaf.state[0].dtype, torch.float32)


def list_tensors(leaf: Leaf) -> tuple[Tensor, ...]:
    """Return a leaf's tensors in the order parameter, gradient, state."""
    return (leaf.param, leaf.grad, *leaf.state)


def choose_state_dtype(param: Tensor, state_dtype: str) -> torch.dtype:
    """Return the dtype of a parameter's state.

    Half precision, rounded to the nearest, holds neither b_g (it falls to 1e-8) nor its small changes. So state is float32 or
    wider, or bfloat16 that is rounded stochastically.

    Args:
        param: the parameter; state of float64 and complex parameters has their dtype.
        state_dtype: "float32" or "bfloat16".
    """
    if param.is_complex():
        return torch.promote_types(param.dtype, torch.complex64)
    dtype = torch.promote_types(param.dtype, torch.float32)
    return torch.bfloat16 if state_dtype == "bfloat16" and dtype is torch.float32 else dtype


def make_leaf(param: Any, grad: Any, state: tuple[Any, ...], key: int | None = None, round_param: bool = False) -> Leaf:
    """Return a leaf: this process's shard of a sharded parameter, two real numbers for a complex one.

    Args:
        param: the parameter.
        grad: its gradient.
        state: its state arrays.
        key: its `rounding.base_key`; None where nothing is rounded stochastically.
        round_param: whether to round a bfloat16 parameter stochastically too.
    """
    part = Part(0, ())
    if not is_plain(param) and hasattr(param, "to_local"):
        part = _locate_shard(state[0]) if key is not None else part
        if getattr(grad, "placements", None) != param.placements:
            grad = grad.redistribute(param.device_mesh, param.placements)
        param, grad, *shards = (tensor.to_local() for tensor in (param, grad, *state))
        state = tuple(shards)
    if param.is_complex():
        # A conjugate gradient is resolved; a conjugate parameter could not be written to.
        param, grad, *views = (torch.view_as_real(tensor) for tensor in (param, grad.resolve_conj(), *state))
        state = tuple(views)
    round_param = round_param and param.dtype is torch.bfloat16
    noise = None
    if key is not None and (round_param or state[0].dtype is torch.bfloat16):
        origin = get_storage_offset(state[0])
        noise = Noise(key, origin, round_param, part) if part.strides else Noise(key, origin - part.first, round_param)
    return Leaf(param, grad, state, noise)


def _locate_shard(array: Any) -> Part:
    """Return where a shard is in the whole tensor, without strides if it is a contiguous piece of it."""
    shape, offset = locate_shard(array)
    first = sum(start * stride for start, stride in zip(offset, array.stride(), strict=True))
    sizes_and_strides = zip(shape, array.to_local().stride(), array.stride(), strict=True)
    strides = sorted(((local, whole) for size, local, whole in sizes_and_strides if size != 1), reverse=True)
    contiguous = all(local == whole for local, whole in strides) or 0 in shape
    return Part(first, () if contiguous else tuple(strides))


def get_block_size(leaf: Leaf) -> int:
    """Return the number of elements in a block of this leaf."""
    return CPU_BLOCK if leaf.param.is_cpu else DEVICE_BLOCK_BYTES // get_arithmetic_dtype(leaf).itemsize


def is_plain(tensor: Tensor) -> bool:
    """Return whether the tensor is plain strided memory, and not a subclass that redefines operations."""
    cls = type(tensor)
    if cls is not torch.nn.Parameter and cls is not Tensor:
        functions, dispatch = torch._C._disabled_torch_function_impl, torch._C._disabled_torch_dispatch_impl
        if cls.__torch_function__ is not functions or cls.__torch_dispatch__ is not dispatch:
            return False
    return tensor.layout is torch.strided


def is_dense(tensor: Tensor) -> bool:
    """Return whether the elements fill one piece of memory without gaps or overlaps, in any order of dimensions."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def is_flat(leaf: Leaf) -> bool:
    """Return whether all tensors of the leaf are dense and in the same order, so that their i-th elements correspond."""
    param, *others = list_tensors(leaf)
    if param.is_contiguous():
        return all(map(Tensor.is_contiguous, others))
    return is_dense(param) and all(tensor.stride() == param.stride() for tensor in others)


def iterate_blocks(leaf: Leaf, size: int) -> Iterator[Leaf]:
    """Yield the leaf in blocks of at most `size` elements, as views of its memory.

    Args:
        leaf: a leaf whose tensors have any strides.
        size: the largest number of elements in a block, at least 1.

    Yields:
        Leaves that cover every element once, in a fixed order.

    Example:
        >>> leaf = Leaf(torch.zeros(3, 2), torch.ones(3, 2), ())
        >>> [block.param.numel() for block in iterate_blocks(leaf, 4)]
        [4, 2]
    """
    if leaf.param.numel() <= size or not all(map(is_plain, list_tensors(leaf))):
        yield leaf
    elif is_flat(leaf):
        param, grad, *state = (tensor.as_strided((tensor.numel(),), (1,)) for tensor in list_tensors(leaf))
        yield from _split(Leaf(param, grad, tuple(state), leaf.noise), 0, size)
    else:
        shape = leaf.param.shape
        dim = max(range(len(shape)), key=shape.__getitem__)
        length = max(1, size * shape[dim] // leaf.param.numel())
        for part in _split(leaf, dim, length):
            yield from iterate_blocks(part, size)


def _split(leaf: Leaf, dim: int, length: int) -> Iterator[Leaf]:
    parts = [torch.split(tensor, length, dim) for tensor in list_tensors(leaf)]
    for param, grad, *state in zip(*parts, strict=True):
        yield Leaf(param, grad, tuple(state), leaf.noise)


def iterate_batches(leaves: Sequence[Leaf], size: int) -> Iterator[tuple[list[int], list[Leaf]]]:
    """Yield lists of blocks with at most `size` elements together, and the index of each block's leaf."""
    indices: list[int] = []
    batch: list[Leaf] = []
    elements = 0
    for index, leaf in enumerate(leaves):
        for block in iterate_blocks(leaf, size):
            if batch and elements + block.param.numel() > size:
                yield indices, batch
                indices, batch, elements = [], [], 0
            indices.append(index)
            batch.append(block)
            elements += block.param.numel()
    if batch:
        yield indices, batch


def group_small(leaves: Iterable[Leaf]) -> tuple[list[list[Leaf]], list[Leaf]]:
    """Return groups of small leaves that may be joined, and all other leaves.

    Args:
        leaves: leaves of any kind.

    Returns:
        Lists of small leaves with equal dtypes on one device; and the leaves that are in no list.

    Example:
        >>> small, large = (Leaf(torch.zeros(n), torch.ones(n), (torch.zeros(n),)) for n in (3, 10_000))
        >>> groups, others = group_small([small, large, small])
        >>> [len(group) for group in groups], len(others)
        ([2], 1)
    """
    groups: dict[Any, list[Leaf]] = {}
    others: list[Leaf] = []
    for leaf in leaves:
        shape = leaf.param.shape
        # State of another shape stays apart so that the engine rejects it: joined, it might fit by chance.
        # A stochastically rounded leaf stays apart because its noise depends on its place in memory.
        if (
            leaf.noise is None
            and shape.numel() <= SMALL
            and all(is_plain(tensor) and tensor.shape == shape for tensor in list_tensors(leaf))
        ):
            groups.setdefault(tuple((tensor.device, tensor.dtype) for tensor in list_tensors(leaf)), []).append(leaf)
        else:
            others.append(leaf)
    return list(groups.values()), others


def join_leaves(leaves: Sequence[Leaf]) -> Leaf:
    """Return a copy of the leaves as one flat leaf."""
    param, grad, *state = (
        torch.cat([tensor.reshape(-1) for tensor in role]) for role in zip(*map(list_tensors, leaves), strict=True)
    )
    return Leaf(param, grad, tuple(state))


def write_back(joined: Leaf, leaves: Sequence[Leaf]) -> None:
    """Copy the new parameter and state of a joined leaf to the leaves that it was made of."""
    sizes = [leaf.param.numel() for leaf in leaves]
    targets = zip(*((leaf.param, *leaf.state) for leaf in leaves), strict=True)
    for whole, role in zip((joined.param, *joined.state), targets, strict=True):
        pieces = [piece.view_as(target) for piece, target in zip(whole.split(sizes), role, strict=True)]
        torch._foreach_copy_(role, pieces)
