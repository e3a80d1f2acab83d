"""Parameters with their gradients and states, cut into blocks, so that temporaries stay small."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

#: Elements in a block on the CPU: the arrays of a block and its temporaries fit the caches.
CPU_BLOCK = 65536
#: Bytes of an array of a block elsewhere: enough to fill a GPU, while its dozen temporaries stay under 64 MB.
DEVICE_BLOCK_BYTES = 2**22
#: Elements up to which a leaf is small: calling an operation on it costs more than copying it.
SMALL = 4096


class Part(NamedTuple):
    """Where the elements of a shard are in the whole tensor.

    Attributes:
        first: the place of its first element.
        strides: for each dimension, from the outermost in memory, how far apart neighbours are here, and in the whole tensor.
    """

    first: int
    strides: tuple[tuple[int, int], ...]


class Noise(NamedTuple):
    """What a leaf's new values are rounded to bfloat16 with.

    Attributes:
        key: the parameter's `rounding.base_key`, or what `rounding.host_key` makes of it at a step (then maybe a 0-d tensor).
        origin: the place 0 in the storage of the state arrays; negative for a shard that begins later.
        of_param: whether the parameter is rounded so too, and not to the nearest.
        part: of the whole tensor, for a shard that is no contiguous piece of it; None for all others.
    """

    key: int | Tensor
    origin: int
    of_param: bool
    part: Part | None = None


class Leaf(NamedTuple):
    """One parameter, or a block of it, with all that a step reads and writes.

    Attributes:
        param: the parameter, real.
        grad: its gradient, of the same shape.
        state: its state arrays, of the same shape and in the rule's order.
        noise: with which to round; None where nothing is rounded at random.
    """

    param: Tensor
    grad: Tensor
    state: tuple[Tensor, ...]
    noise: Noise | None = None

    @property
    def dtype(self) -> torch.dtype:
        """That of the arithmetic."""
        return torch.promote_types(self.state[0].dtype, torch.float32)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All of them, in the order parameter, gradient, state."""
        return (self.param, self.grad, *self.state)


def state_dtype(param: Tensor, wanted: str) -> torch.dtype:
    """The dtype of a parameter's state.

    Half precision to the nearest holds neither b_g (it falls to 1e-8) nor its small changes: state is float32 or more, but for
    the bfloat16 that is rounded at random.

    Args:
        param: the parameter; float64 and complex ones have state of their own dtype.
        wanted: "float32" or "bfloat16".
    """
    if param.is_complex():
        return torch.promote_types(param.dtype, torch.complex64)
    dtype = torch.promote_types(param.dtype, torch.float32)
    return torch.bfloat16 if wanted == "bfloat16" and dtype is torch.float32 else dtype


def leaf_of(param: Any, grad: Any, state: tuple[Any, ...], key: int | None = None, round_param: bool = False) -> Leaf:
    """What the engines work on: this process's part of a sharded tensor, a complex number as two real ones.

    Args:
        param: the parameter.
        grad: its gradient.
        state: its state arrays.
        key: its `rounding.base_key`, where the group rounds at random.
        round_param: whether a parameter in bfloat16 is to be rounded so, too.
    """
    part = Part(0, ())
    if not is_plain(param) and hasattr(param, "to_local"):
        part = _part(state[0]) if key is not None else part
        if getattr(grad, "placements", None) != param.placements:
            grad = grad.redistribute(param.device_mesh, param.placements)
        param, grad, *parts = (tensor.to_local() for tensor in (param, grad, *state))
        state = tuple(parts)
    if param.is_complex():
        # Of the gradient a conjugate is as good as any; a parameter that is one cannot be written to.
        param, grad, *parts = (torch.view_as_real(tensor) for tensor in (param, grad.resolve_conj(), *state))
        state = tuple(parts)
    of_param = round_param and param.dtype is torch.bfloat16
    noise = None
    if key is not None and (of_param or state[0].dtype is torch.bfloat16):
        origin = state[0].storage_offset()
        noise = Noise(key, origin, of_param, part) if part.strides else Noise(key, origin - part.first, of_param)
    return Leaf(param, grad, state, noise)


def _part(array: Any) -> Part:
    """Where a shard is in the whole tensor; without strides where it is a contiguous piece of it."""
    # Here, for a build of torch may lack it.
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(array.shape, array.device_mesh, array.placements)
    first = sum(start * stride for start, stride in zip(offset, array.stride(), strict=True))
    sizes_and_strides = zip(shape, array.to_local().stride(), array.stride(), strict=True)
    strides = sorted(((here, there) for size, here, there in sizes_and_strides if size != 1), reverse=True)
    contiguous = all(here == there for here, there in strides) or 0 in shape
    return Part(first, () if contiguous else tuple(strides))


def block_size(leaf: Leaf) -> int:
    """The number of elements of a block of such a leaf."""
    return CPU_BLOCK if leaf.param.is_cpu else DEVICE_BLOCK_BYTES // leaf.dtype.itemsize


def is_plain(tensor: Tensor) -> bool:
    """Whether the tensor is plain memory, which may be viewed anew, and no subclass with operations of its own."""
    kind = type(tensor)
    if kind is not torch.nn.Parameter and kind is not Tensor:
        functions, dispatch = torch._C._disabled_torch_function_impl, torch._C._disabled_torch_dispatch_impl
        if kind.__torch_function__ is not functions or kind.__torch_dispatch__ is not dispatch:
            return False
    return tensor.layout is torch.strided


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill one piece of memory without gaps or overlaps, in any order of dimensions."""
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
    """Whether all tensors of the leaf are dense and in the same order, so that element i of each belongs together."""
    param, *others = leaf.tensors
    if param.is_contiguous():
        return all(map(Tensor.is_contiguous, others))
    return is_dense(param) and all(tensor.stride() == param.stride() for tensor in others)


def blocks(leaf: Leaf, size: int) -> Iterator[Leaf]:
    """The leaf in blocks of at most `size` elements, views of its memory.

    Args:
        leaf: tensors of any strides.
        size: the most elements of a block, at least 1.

    Yields:
        Leaves that cover every element once, in a fixed order.

    Example:
        >>> leaf = Leaf(torch.zeros(3, 2), torch.ones(3, 2), ())
        >>> [block.param.numel() for block in blocks(leaf, 4)]
        [4, 2]
    """
    if leaf.param.numel() <= size or not all(map(is_plain, leaf.tensors)):
        yield leaf
    elif is_flat(leaf):
        param, grad, *state = (tensor.as_strided((tensor.numel(),), (1,)) for tensor in leaf.tensors)
        yield from _split(Leaf(param, grad, tuple(state), leaf.noise), 0, size)
    else:
        shape = leaf.param.shape
        dim = max(range(len(shape)), key=shape.__getitem__)
        length = max(1, size * shape[dim] // leaf.param.numel())
        for part in _split(leaf, dim, length):
            yield from blocks(part, size)


def _split(leaf: Leaf, dim: int, length: int) -> Iterator[Leaf]:
    parts = [torch.split(tensor, length, dim) for tensor in leaf.tensors]
    for param, grad, *state in zip(*parts, strict=True):
        yield Leaf(param, grad, tuple(state), leaf.noise)


def batches(leaves: Sequence[Leaf], size: int) -> Iterator[tuple[list[int], list[Leaf]]]:
    """Blocks of the leaves, in lists of at most `size` elements, with the index of each block's leaf."""
    indices: list[int] = []
    chunk: list[Leaf] = []
    elements = 0
    for index, leaf in enumerate(leaves):
        for block in blocks(leaf, size):
            if chunk and elements + block.param.numel() > size:
                yield indices, chunk
                indices, chunk, elements = [], [], 0
            indices.append(index)
            chunk.append(block)
            elements += block.param.numel()
    if chunk:
        yield indices, chunk


def small_kinds(leaves: Iterable[Leaf]) -> tuple[list[list[Leaf]], list[Leaf]]:
    """Small leaves that may be joined, by kind, and all other leaves.

    Args:
        leaves: of any kind.

    Returns:
        Lists of leaves of equal dtypes on one device; and what is in none of them.

    Example:
        >>> small, large = (Leaf(torch.zeros(n), torch.ones(n), (torch.zeros(n),)) for n in (3, 10_000))
        >>> kinds, others = small_kinds([small, large, small])
        >>> [len(kind) for kind in kinds], len(others)
        ([2], 1)
    """
    kinds: dict[Any, list[Leaf]] = {}
    others: list[Leaf] = []
    for leaf in leaves:
        shape = leaf.param.shape
        # State that does not fit is for the engine to refuse: joined, it might happen to.
        # What is rounded at random stays where the noise of its place is.
        if (
            leaf.noise is None
            and shape.numel() <= SMALL
            and all(is_plain(tensor) and tensor.shape == shape for tensor in leaf.tensors)
        ):
            kinds.setdefault(tuple((tensor.device, tensor.dtype) for tensor in leaf.tensors), []).append(leaf)
        else:
            others.append(leaf)
    return list(kinds.values()), others


def join(leaves: Sequence[Leaf]) -> Leaf:
    """A copy of the leaves as one, flat."""
    param, grad, *state = (
        torch.cat([each.reshape(-1) for each in role]) for role in zip(*(leaf.tensors for leaf in leaves), strict=True)
    )
    return Leaf(param, grad, tuple(state))


def write_back(joined: Leaf, leaves: Sequence[Leaf]) -> None:
    """Copy what a step has written on the leaves' copy to the leaves."""
    sizes = [leaf.param.numel() for leaf in leaves]
    targets = zip(*((leaf.param, *leaf.state) for leaf in leaves), strict=True)
    for whole, role in zip((joined.param, *joined.state), targets, strict=True):
        pieces = [piece.view_as(each) for piece, each in zip(whole.split(sizes), role, strict=True)]
        torch._foreach_copy_(role, pieces)
