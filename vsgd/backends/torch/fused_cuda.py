"""The core's update compiled by Triton: one pass over many tensors in a GPU's memory, in place, without temporaries.

The kernel takes a table of addresses, so one launch steps any number of tensors. While Triton compiles the kernel, the update
of `vsgd.core` runs once, on symbolic values whose operators write Triton's instructions; so does `vsgd.rounding`. Every
operation is rounded as in IEEE 754 and none are contracted, so the results equal NumPy's bit for bit.
"""

from __future__ import annotations

import functools
import operator
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from vsgd import core, rounding
from vsgd.backends import kernels
from vsgd.backends.torch.leaves import Engine, Leaf, StepOptions, is_flat, is_plain, list_tensors
from vsgd.backends.torch.rounding import key_noise, key_noises
from vsgd.ops import BitOps

_SOURCES = kernels.hash_sources(sys.modules[__name__])

#: Elements in a chunk, the work of one program: four for each thread of eight warps, so that float32 moves in vectors of 128
#: bits, and half precision in the same layout.
CHUNK = 1024

#: Compiler options: `a * b + c` stays two operations, each of them rounded.
OPTIONS = {"num_warps": 8, "enable_fp_fusion": False}

_TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32, torch.float64: tl.float64}

#: The types of device that the kernel runs on; Triton's interpreter also takes tensors of the CPU.
_DEVICES = ("cuda", "cpu") if triton.knobs.runtime.interpret else ("cuda",)

#: The alignment of addresses that vector loads need, in bytes.
_ALIGNMENT = 16

# A CUDA graph copies its tables from the host at each replay, and reports no end of its life: keep them until the process ends.
_captured: list[Tensor] = []


class _Value:
    """A symbolic value, with operators that write the kernel's instructions."""

    def __init__(self, tensor: tl.tensor, semantic: Any) -> None:
        self.tensor = tensor
        self.semantic = semantic

    def __eq__(self, other: object) -> _Value:  # type: ignore[override]
        return self._apply(tl.tensor.__eq__, other)

    def __add__(self, other: _Value) -> _Value:
        return self._apply(tl.tensor.__add__, other)

    def __sub__(self, other: _Value) -> _Value:
        return self._apply(tl.tensor.__sub__, other)

    def __mul__(self, other: _Value) -> _Value:
        return self._apply(tl.tensor.__mul__, other)

    def __truediv__(self, other: _Value) -> _Value:
        # Triton's float32 division is approximate. Its float64 division is exact, and `div_rn` rejects float64.
        return self._apply(tl.div_rn if self.tensor.dtype == tl.float32 else tl.tensor.__truediv__, other)

    def __and__(self, other: int) -> _Value:
        return self._apply(tl.tensor.__and__, other)

    def __xor__(self, other: _Value) -> _Value:
        return self._apply(tl.tensor.__xor__, other)

    def __rshift__(self, other: int) -> _Value:
        return self._apply(tl.tensor.__rshift__, other)

    def _apply(self, operation: Any, other: Any) -> _Value:
        other = other.tensor if isinstance(other, _Value) else other
        return _Value(operation(self.tensor, other, _semantic=self.semantic), self.semantic)


class _ArrayOps:
    """The array operations of `_Value`."""

    def sqrt(self, x: _Value) -> _Value:
        root = tl.sqrt_rn if x.tensor.dtype == tl.float32 else tl.sqrt
        return _Value(root(x.tensor, _semantic=x.semantic), x.semantic)

    # By default Triton prefers a number to NaN.
    def minimum(self, x: _Value, y: _Value) -> _Value:
        return _Value(tl.minimum(x.tensor, y.tensor, tl.PropagateNan.ALL, _semantic=x.semantic), x.semantic)

    def maximum(self, x: _Value, y: _Value) -> _Value:
        return _Value(tl.maximum(x.tensor, y.tensor, tl.PropagateNan.ALL, _semantic=x.semantic), x.semantic)


class _IntegerOps(BitOps):
    """The integer operations of `_Value`."""

    def multiply(self, i: _Value, factor: int) -> _Value:
        # With debug checks on, Triton's operator reports a product that wraps around as an error.
        return _Value(tl.mul(i.tensor, factor, sanitize_overflow=False, _semantic=i.semantic), i.semantic)

    def view_as_int32(self, x: _Value) -> _Value:
        return _Value(x.tensor.to(tl.int32, bitcast=True, _semantic=x.semantic), x.semantic)

    def view_as_float32(self, i: _Value) -> _Value:
        return _Value(i.tensor.to(tl.float32, bitcast=True, _semantic=i.semantic), i.semantic)

    def where(self, condition: _Value, x: int, y: _Value) -> _Value:
        return _Value(tl.where(condition.tensor, x, y.tensor, _semantic=y.semantic), y.semantic)


_compute_word = rounding.make_word(_IntegerOps())
_to_bfloat16 = rounding.make_round(_IntegerOps())


class Step:
    """The step of a rule on one element, a function that the kernel calls.

    Args:
        rule: the variant to run.
        round_param: whether to round the new parameter to bfloat16 stochastically.
        round_state: whether to round the new state to bfloat16 stochastically.
    """

    # Triton then calls the object instead of compiling it.
    __triton_builtin__ = True

    def __init__(self, rule: core.Rule, round_param: bool = False, round_state: bool = False) -> None:
        self.update = rule.make_update(_ArrayOps())
        self.coefficients = type(rule.coefficients(1, rule.hyperparameters()))
        n_state = len(rule.state_names)
        of_param = rounding.MULTIPLIERS[n_state] if round_param else None
        self.rounders = (of_param, *(rounding.MULTIPLIERS[:n_state] if round_state else (None,) * n_state))
        self.version = f"{self.coefficients.__name__} {self.rounders} {_SOURCES}"

    def __repr__(self) -> str:
        """Return the key of Triton's disk cache, with the hash of sources: an edited core must not hit the cache."""
        return self.version

    @staticmethod
    def _wrap(tensors: Any, semantic: Any) -> list[Any]:
        return [_Value(tensor, semantic) for tensor in tensors]

    def __call__(self, arrays: Any, scalars: Any, indices: Any, key: Any, _semantic: Any = None) -> tuple[tl.tensor, ...]:
        """Return the new parameter and state.

        Args:
            arrays: parameter, gradient, *state.
            scalars: *coefficients, lr, decay, grad_scale.
            indices: the elements' indices in the whole array, int32; None where nothing is rounded stochastically.
            key: the key of the step, int32; None where nothing is rounded stochastically.
        """
        param, grad, *state = self._wrap(arrays, _semantic)
        *coefficients, lr, decay, grad_scale = self._wrap(scalars, _semantic)
        direction, new_state = self.update(grad * grad_scale, tuple(state), self.coefficients(*coefficients))
        new = (core.descend(param, direction, lr, decay), *new_state)
        if any(self.rounders):
            word = _compute_word(_Value(indices, _semantic), _Value(key, _semantic))
            new = tuple(_to_bfloat16(value, word, m) if m else value for value, m in zip(new, self.rounders, strict=True))
        return tuple(value.tensor for value in new)


@triton.jit
def _step_chunk(
    row, start, left, scalars, key, step: tl.constexpr, types: tl.constexpr, aligned: tl.constexpr, size: tl.constexpr
):
    """Step `size` elements from `start` on, or the remaining ones."""
    offsets = tl.arange(0, size)
    mask = None if left is None else offsets < left
    pointers = tl.tuple(())
    arrays = tl.tuple(())
    for role in tl.static_range(len(types)):
        pointer = tl.load(row + role).to(tl.pointer_type(types[role])) + start
        if aligned:
            pointer = tl.multiple_of(pointer, 16)
        pointers += (pointer,)
        arrays += (tl.load(pointer + offsets, mask=mask).to(scalars[0].dtype),)
    # In 64 bits first, because an index beyond 2**31 wraps around.
    indices = None if key is None else (tl.load(row + len(types) + 2) + start + offsets).to(tl.int32)
    new = step(arrays, scalars, indices, key)
    tl.store(pointers[0] + offsets, new[0].to(types[0]), mask=mask)
    for role in tl.static_range(2, len(types)):
        tl.store(pointers[role] + offsets, new[role - 1].to(types[role]), mask=mask)


@triton.jit
def kernel(
    tensors,
    chunks,
    scalars,
    keys,
    step: tl.constexpr,
    types: tl.constexpr,
    count: tl.constexpr,
    aligned: tl.constexpr,
    size: tl.constexpr,
):
    """Step one chunk of one parameter.

    Args:
        tensors: for each parameter the addresses of its arrays, its size, the row of its scalars and, with keys, the index of
            its first element, int64.
        chunks: for each program the parameter and the first element of its chunk, int64.
        scalars: rows of (*coefficients, lr, decay, grad_scale), in the dtype of the arithmetic.
        keys: for each parameter the key of this step, int32; None where nothing is rounded stochastically.
        step: the rule's `Step`.
        types: the dtype of each array, in the order parameter, gradient, state.
        count: the number of scalars in a row.
        aligned: whether all addresses are aligned for vector loads.
        size: the number of elements in a chunk.
    """
    chunk = chunks + 2 * tl.program_id(0).to(tl.int64)
    tensor = tl.load(chunk)
    row = tensors + tensor * (len(types) + (2 if keys is None else 3))
    start = tl.load(chunk + 1)
    left = tl.load(row + len(types)) - start
    scalars += tl.load(row + len(types) + 1) * count
    values = tl.tuple(())
    for i in tl.static_range(count):
        values += (tl.load(scalars + i),)
    key = None if keys is None else tl.load(keys + tensor)
    if left >= size:
        # Without a mask: a mask that ends anywhere forbids vector loads.
        _step_chunk(row, start, None, values, key, step, types, aligned, size)
    else:
        _step_chunk(row, start, left, values, key, step, types, aligned, size)


def _copy_to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """Copy an array to the device in the order of its stream, without waiting for the copy."""
    host = torch.from_numpy(array)
    if device.type == "cpu":  # in Triton's interpreter
        return host
    if _is_capturing(device):
        _captured.append(host)  # not pinned: the allocator of pinned memory records events, which a capture forbids
    else:
        host = host.pin_memory()
    return host.to(device, non_blocking=True)


def _is_capturing(device: torch.device) -> bool:
    """Return whether the device's current stream captures a graph; the current device may be another one."""
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def _make_table(rows: tuple[tuple[int, ...], ...], device: torch.device, stream: int | None) -> Tensor:
    return _copy_to_device(np.array(rows, dtype=np.int64), device)


def _make_chunks(sizes: tuple[int, ...], device: torch.device, stream: int | None) -> Tensor:
    return _copy_to_device(np.stack(kernels.cut_chunks(np.array(sizes, dtype=np.int64), CHUNK), axis=1), device)


# Keyed by content and by the stream of the copy, so that a table is reused as long as the addresses stay. Each group of
# parameters has a table for each combination of dtypes.
_make_cached_table = functools.lru_cache(maxsize=256)(_make_table)
_make_cached_chunks = functools.lru_cache(maxsize=256)(_make_chunks)


@functools.cache
def _make_step(rule: core.Rule, round_param: bool, round_state: bool) -> Step:
    return Step(rule, round_param, round_state)


class FusedCuda(Engine):
    """Steps dense floating-point tensors of one layout on CUDA."""

    def accepts(self, leaf: Leaf) -> bool:
        """Return whether the kernel can step the leaf: dense floating-point tensors of one layout on one device."""
        param, grad, state, noise = leaf
        wide = torch.promote_types(param.dtype, torch.float32)
        stored = state[0].dtype
        if stored is not wide and (noise is None or (stored, wide) != (torch.bfloat16, torch.float32)):
            return False
        if not is_plain(param) or not is_plain(grad) or any(tensor.dtype is not stored for tensor in state):
            return False
        if param.device.type not in _DEVICES or (noise is not None and noise.part is not None):  # it counts indices one by one
            return False
        for tensor in list_tensors(leaf):
            if tensor.dtype not in _TYPES or tensor.shape != param.shape or tensor.device != param.device or tensor.is_neg():
                return False
        return is_flat(leaf)

    def step(self, leaves: Sequence[Leaf], counts: float | Sequence[Tensor], options: StepOptions) -> None:
        """Take one step, in place, with one launch per device and combination of dtypes.

        Numbers go to the device in one small copy. Nothing is read back, so a CUDA graph can capture a step whose counts are
        tensors. See `vsgd.backends.torch.leaves.Engine`.
        """
        for device in dict.fromkeys(leaf.param.device for leaf in leaves):
            chosen = [index for index, leaf in enumerate(leaves) if leaf.param.device == device]
            members: Sequence[Leaf] = [leaves[index] for index in chosen]
            step: float | Tensor
            if isinstance(counts, (int, float)):
                step = counts
                members = [key_noise(leaf, counts) for leaf in members]
            else:
                # In float64, as numbers are: each of the kernel's scalars is then rounded once.
                step = torch.stack([counts[index] for index in chosen]).double()
                members = key_noises(members, step)
            coefficients = options.rule.coefficients(step, options.hyper)
            decay = 1 - options.lr * options.weight_decay
            scalars = _make_scalars((*coefficients, options.lr, decay, options.grad_scale), len(members), device)
            _step_device(members, scalars, options)


def _step_device(leaves: Sequence[Leaf], scalars: Tensor, options: StepOptions) -> None:
    device = scalars.device
    groups: dict[Any, list[tuple[tuple[int, ...], Any]]] = {}
    for index, leaf in enumerate(leaves):
        tensors, noise = list_tensors(leaf), leaf.noise
        addresses = [tensor.data_ptr() for tensor in tensors]
        aligned = not functools.reduce(operator.or_, addresses) % _ALIGNMENT
        first_index = () if noise is None else (leaf.state[0].storage_offset() - noise.origin,)
        row = (*addresses, leaf.param.numel(), index if len(scalars) > 1 else 0, *first_index)
        key = (aligned, noise is not None, noise is not None and noise.round_param, *[tensor.dtype for tensor in tensors])
        groups.setdefault(key, []).append((row, None if noise is None else noise.key))
    for (aligned, rounds, round_param, *dtypes), members in groups.items():
        rows, keys = zip(*members, strict=True)
        step = _make_step(options.rule, round_param, rounds and dtypes[-1] is torch.bfloat16)
        wide = scalars.to(torch.promote_types(dtypes[-1], torch.float32))
        key_table = None
        if rounds:
            on_device = isinstance(keys[0], Tensor)
            key_table = torch.stack(keys) if on_device else _copy_to_device(np.array(keys, dtype=np.int32), device)
        _launch(step, rows, wide, key_table, dtypes, aligned)
    # Autograd must see the writes, as it sees those of torch's own operations.
    torch.autograd.graph.increment_version([tensor for leaf in leaves for tensor in (leaf.param, *leaf.state)])


def _make_scalars(values: Sequence[float | Tensor], count: int, device: torch.device) -> Tensor:
    """Return the scalars as rows in float64: one row for all leaves, or one for each if some are tensors."""
    if not any(isinstance(value, Tensor) for value in values):
        return _copy_to_device(np.array([values], dtype=np.float64), device)
    zeros = torch.zeros(count, dtype=torch.float64, device=device)
    return torch.stack([zeros + value for value in values], dim=1)


def _launch(
    step: Step,
    rows: tuple[tuple[int, ...], ...],
    scalars: Tensor,
    keys: Tensor | None,
    dtypes: list[torch.dtype],
    aligned: bool,
) -> None:
    device = scalars.device
    stream = None if device.type == "cpu" else torch.cuda.current_stream(device).cuda_stream
    # A table copied during capture reaches the device only when the graph is replayed: do not cache it.
    capturing = stream is not None and _is_capturing(device)
    make_table, make_chunks = (_make_table, _make_chunks) if capturing else (_make_cached_table, _make_cached_chunks)
    chunks = make_chunks(tuple(row[len(dtypes)] for row in rows), device, stream)
    if len(chunks) == 0:
        return
    types = tuple(_TYPES[dtype] for dtype in dtypes)
    with torch.cuda.device_of(scalars):
        kernel[(len(chunks),)](
            make_table(rows, device, stream), chunks, scalars, keys, step, types, scalars.shape[1], aligned, CHUNK, **OPTIONS
        )
