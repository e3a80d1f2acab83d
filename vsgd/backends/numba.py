"""The core's update compiled by numba: one pass over many tensors in CPU memory, in place, without temporaries.

The kernel takes a table of addresses, so one call steps any number of tensors of any framework. Numba inlines the update of
`vsgd.core`, and LLVM vectorizes the loop.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numba
import numpy as np
from numba import types
from numba.extending import intrinsic, overload

from vsgd import core, rounding
from vsgd.backends import kernels, numba_ops
from vsgd.backends.numba_ops import OPTIONS, inline

if numba.config.DISABLE_JIT:
    raise ImportError("vsgd's fused kernel needs numba's compiler, which NUMBA_DISABLE_JIT turns off")

_SOURCES = kernels.hash_sources(numba_ops)

#: Elements in a chunk, a thread's unit of work: the six float32 arrays of a chunk fit into a second-level cache.
CHUNK = 16384

# Numba's workqueue layer aborts the process when two threads start parallel loops at once.
_lock = threading.Lock()

# OpenMP threads do not survive a fork: a child process runs the serial kernel.
_home_process = os.getpid()


@intrinsic
def _pointer(typing_context, address, like):
    """Return an integer address as a pointer to items of the dtype of the scalar `like`."""
    pointer = types.CPointer(like)

    def codegen(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], context.get_value_type(pointer))

    return pointer(address, like), codegen


_compute_word = inline(rounding.make_word(numba_ops))
_to_bfloat16 = inline(rounding.make_round(numba_ops))


def _get(array, i):
    """Return element `i`, widened if it is bfloat16. NumPy lacks bfloat16: it is uint16, the upper half of a float32."""


@overload(_get, jit_options=OPTIONS)
def _(array, i):
    if array.dtype is types.uint16:
        return lambda array, i: numba_ops.view_as_float32(np.int32(np.int32(array[i]) << 16))
    return lambda array, i: array[i]


def _put(array, i, value, multiplier, word):
    """Set element `i`. bfloat16 is rounded with the noise `word * multiplier`, or to the nearest if `multiplier` is None."""


@overload(_put, jit_options=OPTIONS)
def _(array, i, value, multiplier, word):
    if array.dtype is not types.uint16:

        def put_whole(array, i, value, multiplier, word):
            array[i] = value

        return put_whole
    if isinstance(multiplier, types.NoneType):

        def put_nearest(array, i, value, multiplier, word):
            # Less than half a unit goes down, more goes up, and exactly half goes to the even neighbour.
            half = np.int32(0x7FFF + ((numba_ops.view_as_int32(value) >> 16) & 1))
            rounded = _to_bfloat16(value, np.int32(half << 16), 1)
            array[i] = np.uint16(numba_ops.view_as_int32(rounded) >> 16)

        return put_nearest

    def put_at_random(array, i, value, multiplier, word):
        array[i] = np.uint16(numba_ops.view_as_int32(_to_bfloat16(value, word, multiplier)) >> 16)

    return put_at_random


# Numba has no typed loop over a tuple of arrays: these functions recurse at compile time.


def _views(addresses, stored, tensor, start, size):
    """Return one array per role in the table, of `size` elements from element `start` on."""


@overload(_views)
def _(addresses, stored, tensor, start, size):
    if len(addresses) == 0:
        return lambda addresses, stored, tensor, start, size: ()
    itemsize = stored[0].bitwidth // 8

    def views(addresses, stored, tensor, start, size):
        head = numba.carray(_pointer(addresses[0][tensor] + start * itemsize, stored[0]), size)
        return (head, *_views(addresses[1:], stored[1:], tensor, start, size))

    return views


def _load(arrays, i):
    """Return element `i` of each array."""


@overload(_load, jit_options=OPTIONS)
def _(arrays, i):
    if len(arrays) == 0:
        return lambda arrays, i: ()
    return lambda arrays, i: (_get(arrays[0], i), *_load(arrays[1:], i))


def _store(arrays, i, values, multipliers, word):
    """Set element `i` of each array to its value."""


@overload(_store, jit_options=OPTIONS)
def _(arrays, i, values, multipliers, word):
    if len(arrays) == 0:
        return lambda arrays, i, values, multipliers, word: None

    def store(arrays, i, values, multipliers, word):
        _put(arrays[0], i, values[0], multipliers[0], word)
        _store(arrays[1:], i, values[1:], multipliers[1:], word)

    return store


class Chunks(NamedTuple):
    """The work of a step, in units of at most `CHUNK` elements.

    Attributes:
        tensors: the index of each chunk's parameter, int64.
        starts: the index of its first element.
        stops: the index after its last element.
    """

    tensors: np.ndarray
    starts: np.ndarray
    stops: np.ndarray

    def select(self, chosen: np.ndarray) -> Chunks:
        """Return the chunks of some parameters, given a boolean for each parameter."""
        return Chunks(*(each[chosen[self.tensors]] for each in self))


def list_chunks(sizes: np.ndarray) -> Chunks:
    """Cut parameters into chunks.

    Args:
        sizes: the number of elements of each parameter, int64.

    Example:
        >>> tensors, starts, stops = list_chunks(np.array([3, 0, CHUNK + 1]))
        >>> tensors.tolist(), (stops - starts).tolist()
        ([0, 2, 2], [3, 16384, 1])
    """
    tensors, starts = kernels.cut_chunks(sizes, CHUNK)
    return Chunks(tensors, starts, np.minimum(starts + CHUNK, sizes[tensors]))


class NoiseTable(NamedTuple):
    """The random bits of stochastic rounding, for each parameter.

    Attributes:
        keys: the `rounding.host_key` of its step, int32.
        first_indices: the index of its first element in the whole array, int64.
    """

    keys: np.ndarray
    first_indices: np.ndarray


def _make_kernel(rule: core.Rule, indices: Callable[[int], Any], round_params: bool) -> Callable[..., None]:
    # The disk cache's key contains captured values. Without this one it would serve the kernel of an older core, or the serial
    # kernel in place of the parallel one.
    version = _SOURCES
    update = inline(rule.make_update(numba_ops))
    descend = inline(core.descend)
    n_state = len(rule.state_names)
    for_state, for_param = rounding.MULTIPLIERS[:n_state], rounding.MULTIPLIERS[n_state] if round_params else None

    @inline
    def step_block(param, grad, state, c, lr, decay, sign, key, first_index):
        for i in range(param.shape[0]):
            word = _compute_word(np.int32(first_index + np.int32(i)), key)
            direction, new_state = update(sign * _get(grad, i), _load(state, i), c)
            _store(state, i, new_state, for_state, word)
            _put(param, i, descend(_get(param, i), direction, lr, decay), for_param, word)

    def kernel(addresses, stored, tensors, starts, stops, c, lr, decay, sign, keys, first_indices):
        version  # noqa: B018
        for k in indices(tensors.shape[0]):
            tensor, start = tensors[k], starts[k]
            arrays = _views(addresses, stored, tensor, start, stops[k] - start)
            first_index = np.int32(first_indices[tensor] + start)
            step_block(arrays[0], arrays[1], arrays[2:], c, lr, decay, sign, keys[tensor], first_index)

    return kernel


def _increase_counts(addresses, counts, one):
    for k in range(addresses.shape[0]):
        count = numba.carray(_pointer(addresses[k], one), 1)
        count[0] += one
        counts[k] = count[0]


def _jit(function: Callable[..., None], **options: Any) -> Callable[..., None]:
    try:
        return numba.njit(cache=True, nogil=True, **OPTIONS, **options)(function)
    except RuntimeError:  # no folder for the cache is writeable
        return numba.njit(nogil=True, **OPTIONS, **options)(function)


@functools.cache
def _compile(rule: core.Rule, round_params: bool, parallel: bool) -> Callable[..., None]:
    return _jit(_make_kernel(rule, numba.prange if parallel else range, round_params), parallel=parallel)


@functools.cache
def _compile_counter() -> Callable[..., None]:
    return _jit(_increase_counts)


def increase_counts(addresses: np.ndarray, dtype: Any) -> np.ndarray:
    """Add 1 to each step count, in place.

    Args:
        addresses: the addresses of the counts, int64; the counts must stay alive and unmoved during the call.
        dtype: the NumPy dtype of all counts, float32 or float64.

    Returns:
        The new counts, float64.
    """
    counts = np.empty(len(addresses))
    _compile_counter()(addresses, counts, np.dtype(dtype).type(1))
    return counts


def step(
    rule: core.Rule,
    addresses: tuple[np.ndarray, ...],
    chunks: Chunks,
    coefficients: Sequence[float],
    lr: float,
    decay: float,
    *,
    stored: Sequence[Any],
    noise: NoiseTable,
    round_params: bool = False,
    maximize: bool = False,
    threads: int = 1,
) -> None:
    """Take one step of `rule`, in place, on dense arrays in CPU memory.

    Args:
        rule: the variant to run.
        addresses: for each role (parameter, gradient, and the state arrays in the rule's order) an int64 array with the address
            of each parameter's array. The arrays must stay alive and unmoved during the call.
        chunks: the chunks to step.
        coefficients: `rule.coefficients(step, hyper)` as Python numbers, the same for all chunks.
        lr: the step size.
        decay: `1 - lr * weight_decay`.
        stored: the NumPy dtype of each role's arrays: float64 for all, or float32 or uint16 (for bfloat16). The arithmetic is
            float64 or float32. bfloat16 state is rounded stochastically.
        noise: the random bits of stochastic rounding.
        round_params: whether bfloat16 parameters are rounded stochastically, and not to the nearest.
        maximize: whether to step with the negative gradient.
        threads: the largest number of threads to use.

    Source: `vsgd.core`; arXiv 2404.06549, Algorithm 1.
    """
    scalar = np.float64 if stored[0] is np.float64 else np.float32
    c = type(coefficients)(*map(scalar, coefficients))
    like = tuple(dtype(0) for dtype in stored)
    arguments = (addresses, like, *chunks, c, scalar(lr), scalar(decay), scalar(-1 if maximize else 1), *noise)
    threads = min(threads, len(chunks.tensors), numba.config.NUMBA_NUM_THREADS)
    if threads <= 1 or (chunks.stops - chunks.starts).sum() <= CHUNK * 4 or os.getpid() != _home_process:
        _compile(rule, round_params, parallel=False)(*arguments)
        return
    with _lock:
        before = numba.get_num_threads()
        numba.set_num_threads(threads)
        try:
            _compile(rule, round_params, parallel=True)(*arguments)
        finally:
            numba.set_num_threads(before)
