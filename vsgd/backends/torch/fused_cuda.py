"""The core's update compiled by Triton: one pass over many tensors in a GPU's memory, in place, without temporaries.

Arrays come as a table of addresses, so that one launch serves any number of tensors. The update is the function that
`vsgd.core` states: it runs once, while the kernel is compiled, on symbolic values whose operators write Triton's.
Every operation is rounded as IEEE 754 says and none are contracted, so that the results are NumPy's, bit for bit.
The rounding at random of `vsgd.rounding` comes into the kernel in the same way.
"""

from __future__ import annotations

import functools
import operator
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from vsgd import core, rounding
from vsgd.backends import kernels
from vsgd.backends.kernels import chunks
from vsgd.backends.torch.leaves import Leaf, is_flat, is_plain

_SOURCES = kernels.digest(sys.modules[__name__])

#: Elements in a chunk, the work of one program: four for each thread of eight warps, so that float32 goes in vectors of 128
#: bits, and half precision beside it in the same layout.
CHUNK = 1024

#: What a launch asks of the compiler: `a * b + c` stays two operations, each rounded.
OPTIONS = {"num_warps": 8, "enable_fp_fusion": False}

_TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32, torch.float64: tl.float64}

#: Where it can run: Triton's interpreter takes tensors of the CPU too.
_DEVICES = ("cuda", "cpu") if triton.knobs.runtime.interpret else ("cuda",)

#: Addresses are so aligned for vector loads.
_ALIGNMENT = 16

# A CUDA graph copies its tables from the host at each replay, and does not tell when it is gone.
_captured: list[Tensor] = []


class _Value:
    """A value of the kernel to be, with operators that write its instructions."""

    def __init__(self, tensor: tl.tensor, semantic: Any) -> None:
        self.tensor = tensor
        self.semantic = semantic

    def __neg__(self) -> _Value:
        return _Value(self.tensor.__neg__(_semantic=self.semantic), self.semantic)

    def __eq__(self, other: object) -> _Value:  # type: ignore[override]
        return self._apply(tl.tensor.__eq__, other)

    def __add__(self, other: _Value) -> _Value:
        return self._apply(tl.tensor.__add__, other)

    def __sub__(self, other: _Value) -> _Value:
        return self._apply(tl.tensor.__sub__, other)

    def __mul__(self, other: _Value) -> _Value:
        return self._apply(tl.tensor.__mul__, other)

    def __truediv__(self, other: _Value) -> _Value:
        # In float32 Triton's own division is approximate; in float64 it is not, and `div_rn` does not take it.
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


class _Namespace:
    """The array namespace of `_Value`."""

    @staticmethod
    def sqrt(value: _Value) -> _Value:
        root = tl.sqrt_rn if value.tensor.dtype == tl.float32 else tl.sqrt
        return _Value(root(value.tensor, _semantic=value.semantic), value.semantic)

    # Triton's own would prefer a number to NaN.
    @staticmethod
    def minimum(one: _Value, other: _Value) -> _Value:
        smaller = tl.minimum(one.tensor, other.tensor, tl.PropagateNan.ALL, _semantic=one.semantic)
        return _Value(smaller, one.semantic)

    @staticmethod
    def maximum(one: _Value, other: _Value) -> _Value:
        larger = tl.maximum(one.tensor, other.tensor, tl.PropagateNan.ALL, _semantic=one.semantic)
        return _Value(larger, one.semantic)


class _Integers(rounding.Wrapping):
    """The integer namespace of `_Value`."""

    @staticmethod
    def times(i: _Value, factor: int) -> _Value:
        # Triton's operator, where it is asked to look for mistakes, takes a product that wraps around for one.
        return _Value(tl.mul(i.tensor, factor, sanitize_overflow=False, _semantic=i.semantic), i.semantic)

    @staticmethod
    def bits(x: _Value) -> _Value:
        return _Value(x.tensor.to(tl.int32, bitcast=True, _semantic=x.semantic), x.semantic)

    @staticmethod
    def floats(i: _Value) -> _Value:
        return _Value(i.tensor.to(tl.float32, bitcast=True, _semantic=i.semantic), i.semantic)

    @staticmethod
    def where(condition: _Value, a: int, b: _Value) -> _Value:
        return _Value(tl.where(condition.tensor, a, b.tensor, _semantic=b.semantic), b.semantic)


_word = rounding.make_word(_Integers)
_to_bfloat16 = rounding.make_round(_Integers)


class Step:
    """The step of a rule on one element, to be called in a kernel.

    Args:
        rule: the variant to run.
        maximize: whether to step with the negative gradient.
        round_param: whether the new parameter is rounded to bfloat16 at random.
        round_state: whether the new state is.
    """

    # So Triton knows what it should call, not compile.
    __triton_builtin__ = True

    def __init__(self, rule: core.Rule, maximize: bool, round_param: bool = False, round_state: bool = False) -> None:
        self.update = rule.make_update(_Namespace)
        self.coefficients = type(rule.coefficients(1, rule.hyperparameters()))
        self.maximize = maximize
        n_state = len(rule.state_names)
        of_param = rounding.MULTIPLIERS[n_state] if round_param else None
        self.rounders = (of_param, *(rounding.MULTIPLIERS[:n_state] if round_state else (None,) * n_state))
        self.version = f"{self.coefficients.__name__} {maximize} {self.rounders} {_SOURCES}"

    def __repr__(self) -> str:
        """What Triton keys its disk cache by: an edited core must not be served from there."""
        return self.version

    def __call__(self, arrays: Any, scalars: Any, places: Any, key: Any, _semantic: Any = None) -> tuple[tl.tensor, ...]:
        """The new parameter and state.

        Args:
            arrays: parameter, gradient, *state.
            scalars: *coefficients, lr, decay.
            places: of the elements in the array that their noise is made for, int32; None where nothing is rounded at random.
            key: of the step, likewise.
        """
        param, grad, *state = (_Value(array, _semantic) for array in arrays)
        *coefficients, lr, decay = (_Value(scalar, _semantic) for scalar in scalars)
        direction, new_state = self.update(-grad if self.maximize else grad, tuple(state), self.coefficients(*coefficients))
        new = (core.descend(param, direction, lr, decay), *new_state)
        if any(self.rounders):
            word = _word(_Value(places, _semantic), _Value(key, _semantic))
            new = tuple(_to_bfloat16(value, word, m) if m else value for value, m in zip(new, self.rounders, strict=True))
        return tuple(value.tensor for value in new)


@triton.jit
def _step_chunk(
    row, start, left, scalars, key, step: tl.constexpr, types: tl.constexpr, aligned: tl.constexpr, size: tl.constexpr
):
    """Step `size` elements from `start` on, or those that are left."""
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
    # In 64 bits first, for a place beyond 2**31 wraps around.
    places = None if key is None else (tl.load(row + len(types) + 2) + start + offsets).to(tl.int32)
    new = step(arrays, scalars, places, key)
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
        tensors: for each parameter the addresses of its arrays, its size, the row of its scalars and, where there are keys, the
            place of its first element, int64.
        chunks: for each program the parameter and the first element of its chunk, int64.
        scalars: rows of (*coefficients, lr, decay), in the dtype of the arithmetic.
        keys: for each parameter what its noise at this step is made of, int32; None where nothing is rounded at random.
        step: the rule's `Step`.
        types: the dtype of each array, in the order parameter, gradient, state.
        count: how many scalars a row has.
        aligned: whether all addresses are fit for vector loads.
        size: elements in a chunk.
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
        # Without a mask, for one that ends anywhere would forbid vector loads.
        _step_chunk(row, start, None, values, key, step, types, aligned, size)
    else:
        _step_chunk(row, start, left, values, key, step, types, aligned, size)


def _to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """A copy on the device, made in the order of its stream, without waiting for it."""
    host = torch.from_numpy(array)
    if device.type == "cpu":  # in Triton's interpreter
        return host
    host = host.pin_memory()
    if torch.cuda.is_current_stream_capturing():
        _captured.append(host)
    return host.to(device, non_blocking=True)


def _tensors(rows: tuple[tuple[int, ...], ...], device: torch.device, stream: int | None) -> Tensor:
    return _to_device(np.array(rows, dtype=np.int64), device)


def _chunks(sizes: tuple[int, ...], device: torch.device, stream: int | None) -> Tensor:
    return _to_device(np.stack(chunks(np.array(sizes, dtype=np.int64), CHUNK), axis=1), device)


# By what they hold, so that they serve as long as addresses stay; and by the stream that they were copied in.
_kept_tensors = functools.lru_cache(maxsize=16)(_tensors)
_kept_chunks = functools.lru_cache(maxsize=16)(_chunks)


@functools.cache
def _step_of(rule: core.Rule, maximize: bool, round_param: bool, round_state: bool) -> Step:
    return Step(rule, maximize, round_param, round_state)


def accepts(leaf: Leaf) -> bool:
    """Whether the kernel can run on the leaf: dense floating-point tensors of one layout in the memory of one device."""
    param, grad, state, noise = leaf
    wide = torch.promote_types(param.dtype, torch.float32)
    stored = state[0].dtype
    if stored is not wide and (noise is None or (stored, wide) != (torch.bfloat16, torch.float32)):
        return False
    if not is_plain(param) or not is_plain(grad) or any(tensor.dtype is not stored for tensor in state):
        return False
    if param.device.type not in _DEVICES or (noise is not None and noise.part is not None):  # it counts places one by one
        return False
    for tensor in leaf.tensors:
        if tensor.dtype not in _TYPES or tensor.shape != param.shape or tensor.device != param.device or tensor.is_neg():
            return False
    return is_flat(leaf)


def step(
    rule: core.Rule,
    leaves: Sequence[Leaf],
    coefficients: Iterable[float | Tensor],
    lr: float | Tensor,
    decay: float | Tensor,
    *,
    maximize: bool = False,
) -> None:
    """One step, in place, on all leaves: one launch for each combination of dtypes.

    Numbers go to the device in one small copy; nothing is ever read back, so that a CUDA graph can capture a step whose
    coefficients are tensors.

    Args:
        rule: the variant to run.
        leaves: parameters that `accepts`, on one device, with the noise of this step.
        coefficients: `rule.coefficients(step, hyper)`, each a number or a tensor with one element for all leaves or for each.
        lr: step size, likewise.
        decay: `1 - lr * weight_decay`, likewise.
        maximize: whether to step with the negative gradient.
    """
    device = leaves[0].param.device
    scalars = _scalars((*coefficients, lr, decay), len(leaves), device)
    per_leaf = len(scalars) > 1
    groups: dict[Any, list[tuple[tuple[int, ...], Any]]] = {}
    for index, leaf in enumerate(leaves):
        tensors, noise = leaf.tensors, leaf.noise
        addresses = [tensor.data_ptr() for tensor in tensors]
        aligned = not functools.reduce(operator.or_, addresses) % _ALIGNMENT
        place = () if noise is None else (leaf.state[0].storage_offset() - noise.origin,)
        row = (*addresses, leaf.param.numel(), index if per_leaf else 0, *place)
        kind = (aligned, noise is not None, noise is not None and noise.of_param, *[tensor.dtype for tensor in tensors])
        groups.setdefault(kind, []).append((row, None if noise is None else noise.key))
    for (aligned, rounds, round_param, *dtypes), members in groups.items():
        rows, keys = zip(*members, strict=True)
        of_kind = _step_of(rule, maximize, round_param, round_state=rounds and dtypes[-1] is torch.bfloat16)
        wide = scalars.to(torch.promote_types(dtypes[-1], torch.float32))
        _launch(of_kind, rows, wide, _keys(keys, device) if rounds else None, dtypes, aligned)
    # Autograd must see that these changed, as it does with torch's own operations.
    torch.autograd.graph.increment_version([tensor for leaf in leaves for tensor in (leaf.param, *leaf.state)])


def _scalars(values: Sequence[float | Tensor], count: int, device: torch.device) -> Tensor:
    """The scalars as rows, one for all leaves or, where tensors hold them, one for each; in float64."""
    if not any(isinstance(value, Tensor) for value in values):
        return _to_device(np.array([values], dtype=np.float64), device)
    zeros = torch.zeros(count, dtype=torch.float64, device=device)
    return torch.stack([zeros + value for value in values], dim=1)


def _keys(keys: Sequence[Any], device: torch.device) -> Tensor:
    """One for each leaf, int32."""
    if isinstance(keys[0], Tensor):
        return torch.stack(list(keys))
    return _to_device(np.array(keys, dtype=np.int32), device)


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
    # What a capture copies is on the device only when the graph is replayed: of no use to others.
    capturing = stream is not None and torch.cuda.is_current_stream_capturing()
    make_tensors, make_chunks = (_tensors, _chunks) if capturing else (_kept_tensors, _kept_chunks)
    work = make_chunks(tuple(row[len(dtypes)] for row in rows), device, stream)
    if len(work) == 0:
        return
    types = tuple(_TYPES[dtype] for dtype in dtypes)
    with torch.cuda.device_of(scalars):
        kernel[(len(work),)](
            make_tensors(rows, device, stream), work, scalars, keys, step, types, scalars.shape[1], aligned, CHUNK, **OPTIONS
        )
