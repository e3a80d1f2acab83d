"""The core's update compiled by numba: one pass over many tensors in CPU memory, in place, without temporaries.

Arrays come as a table of addresses, so that one call serves any number of tensors of any framework. The update is the
function that `vsgd.core` states; numba inlines it, and LLVM vectorizes the loop.
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

_SOURCES = kernels.digest(numba_ops)

#: Elements in a chunk, the unit of work of a thread: the six arrays of a float32 chunk fit a second-level cache.
CHUNK = 16384

# Numba's workqueue layer aborts the process when two threads start parallel loops at once.
_lock = threading.Lock()

# OpenMP threads do not survive a fork: a child process runs the serial kernel.
_home_process = os.getpid()


@intrinsic
def _pointer(typing_context, address, like):
    """An integer address as a pointer to items of the dtype of the scalar `like`."""
    pointer = types.CPointer(like)

    def codegen(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], context.get_value_type(pointer))

    return pointer(address, like), codegen


_word = inline(rounding.make_word(numba_ops))
_to_bfloat16 = inline(rounding.make_round(numba_ops))


def _get(array, i):
    """Element `i`, as a number to compute with. bfloat16, which NumPy lacks, comes as uint16: the upper half of a float32."""


@overload(_get, jit_options=OPTIONS)
def _(array, i):
    if array.dtype is types.uint16:
        return lambda array, i: numba_ops.floats(np.int32(np.int32(array[i]) << 16))
    return lambda array, i: array[i]


def _put(array, i, value, rounder, word):
    """Set element `i`: bfloat16 with the noise that the factor `rounder` makes of `word`, to the nearest where it is None."""


@overload(_put, jit_options=OPTIONS)
def _(array, i, value, rounder, word):
    if array.dtype is not types.uint16:

        def put_whole(array, i, value, rounder, word):
            array[i] = value

        return put_whole
    if isinstance(rounder, types.NoneType):

        def put_nearest(array, i, value, rounder, word):
            # Less than a half goes down, more goes up, and a half to the even one.
            half = np.int32(0x7FFF + ((numba_ops.bits(value) >> 16) & 1))
            rounded = _to_bfloat16(value, np.int32(half << 16), 1)
            array[i] = np.uint16(numba_ops.bits(rounded) >> 16)

        return put_nearest

    def put_at_random(array, i, value, rounder, word):
        array[i] = np.uint16(numba_ops.bits(_to_bfloat16(value, word, rounder)) >> 16)

    return put_at_random


# Numba has no typed loop over a tuple of arrays: these recurse at compile time, for any number of arrays.


def _views(addresses, stored, tensor, start, size):
    """Arrays of `size` elements from element `start` on, one for each role in the table."""


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
    """Element `i` of each array."""


@overload(_load, jit_options=OPTIONS)
def _(arrays, i):
    if len(arrays) == 0:
        return lambda arrays, i: ()
    return lambda arrays, i: (_get(arrays[0], i), *_load(arrays[1:], i))


def _store(arrays, i, values, rounders, word):
    """Set element `i` of each array to its value."""


@overload(_store, jit_options=OPTIONS)
def _(arrays, i, values, rounders, word):
    if len(arrays) == 0:
        return lambda arrays, i, values, rounders, word: None

    def store(arrays, i, values, rounders, word):
        _put(arrays[0], i, values[0], rounders[0], word)
        _store(arrays[1:], i, values[1:], rounders[1:], word)

    return store


class Chunks(NamedTuple):
    """The work of a step, in units of at most `CHUNK` elements.

    Attributes:
        tensors: which parameter each chunk is of, int64.
        starts: its first element.
        stops: the element behind its last.
    """

    tensors: np.ndarray
    starts: np.ndarray
    stops: np.ndarray

    def of(self, chosen: np.ndarray) -> Chunks:
        """The chunks of some parameters, told by a boolean for each parameter."""
        return Chunks(*(each[chosen[self.tensors]] for each in self))


def chunks(sizes: np.ndarray) -> Chunks:
    """All chunks of parameters of these sizes.

    Args:
        sizes: the number of elements of each parameter, int64.

    Example:
        >>> tensors, starts, stops = chunks(np.array([3, 0, CHUNK + 1]))
        >>> tensors.tolist(), (stops - starts).tolist()
        ([0, 2, 2], [3, 16384, 1])
    """
    tensors, starts = kernels.chunks(sizes, CHUNK)
    return Chunks(tensors, starts, np.minimum(starts + CHUNK, sizes[tensors]))


class Noise(NamedTuple):
    """What bfloat16 is rounded with, for each parameter.

    Attributes:
        keys: `rounding.host_key` of its step, int32.
        places: the place of its first element in the array that the noise is made for, int64.
    """

    keys: np.ndarray
    places: np.ndarray


def _kernel_of(rule: core.Rule, indices: Callable[[int], Any], round_params: bool) -> Callable[..., None]:
    # Captured, for the disk cache's key holds captured values: without them it would serve the kernel of an older core, or
    # the serial kernel in place of the parallel one.
    version = _SOURCES
    update = inline(rule.make_update(numba_ops))
    descend = inline(core.descend)
    n_state = len(rule.state_names)
    of_state, of_param = rounding.MULTIPLIERS[:n_state], rounding.MULTIPLIERS[n_state] if round_params else None

    @inline
    def step_block(param, grad, state, c, lr, decay, sign, key, place):
        for i in range(param.shape[0]):
            word = _word(np.int32(place + np.int32(i)), key)
            direction, new_state = update(sign * _get(grad, i), _load(state, i), c)
            _store(state, i, new_state, of_state, word)
            _put(param, i, descend(_get(param, i), direction, lr, decay), of_param, word)

    def kernel(addresses, stored, tensors, starts, stops, c, lr, decay, sign, keys, places):
        version  # noqa: B018
        for k in indices(tensors.shape[0]):
            tensor, start = tensors[k], starts[k]
            arrays = _views(addresses, stored, tensor, start, stops[k] - start)
            place = np.int32(places[tensor] + start)
            step_block(arrays[0], arrays[1], arrays[2:], c, lr, decay, sign, keys[tensor], place)

    return kernel


def _count(addresses, counts, one):
    for k in range(addresses.shape[0]):
        count = numba.carray(_pointer(addresses[k], one), 1)
        count[0] += one
        counts[k] = count[0]


def _jit(function: Callable[..., None], **options: Any) -> Callable[..., None]:
    try:
        return numba.njit(cache=True, nogil=True, **OPTIONS, **options)(function)
    except RuntimeError:  # there is no place to write the cache to
        return numba.njit(nogil=True, **OPTIONS, **options)(function)


@functools.cache
def _compiled(rule: core.Rule, round_params: bool, parallel: bool) -> Callable[..., None]:
    return _jit(_kernel_of(rule, numba.prange if parallel else range, round_params), parallel=parallel)


@functools.cache
def _compiled_count() -> Callable[..., None]:
    return _jit(_count)


def count(addresses: np.ndarray, dtype: Any) -> np.ndarray:
    """Add 1 to each step count, in place.

    Args:
        addresses: where the counts lie, int64; they stay alive and unmoved during the call.
        dtype: numpy dtype of all counts, float32 or float64.

    Returns:
        The new counts, float64.
    """
    counts = np.empty(len(addresses))
    _compiled_count()(addresses, counts, np.dtype(dtype).type(1))
    return counts


def step(
    rule: core.Rule,
    addresses: tuple[np.ndarray, ...],
    work: Chunks,
    coefficients: Sequence[float],
    lr: float,
    decay: float,
    *,
    stored: Sequence[Any],
    noise: Noise,
    round_params: bool = False,
    maximize: bool = False,
    threads: int = 1,
) -> None:
    """One step of `rule`, in place, on dense arrays in CPU memory.

    Args:
        rule: the variant to run.
        addresses: one int64 array for each role (parameter, gradient, and the state arrays in the rule's order), holding the
            address of that array for each parameter. The arrays stay alive and unmoved during the call.
        work: the chunks to step.
        coefficients: `rule.coefficients(step, hyper)` with Python numbers, the same for all chunks.
        lr: step size.
        decay: `1 - lr * weight_decay`.
        stored: the numpy dtype of each role's arrays: float64 for all, or float32, or uint16 for bfloat16. The arithmetic is
            float64 or float32. State in bfloat16 is rounded at random.
        noise: with which.
        round_params: whether parameters in bfloat16 are rounded at random, and not to the nearest.
        maximize: whether to step with the negative gradient.
        threads: the most threads to use.

    Source: `vsgd.core`; arXiv 2404.06549, Algorithm 1.
    """
    scalar = np.float64 if stored[0] is np.float64 else np.float32
    c = type(coefficients)(*map(scalar, coefficients))
    like = tuple(dtype(0) for dtype in stored)
    arguments = (addresses, like, *work, c, scalar(lr), scalar(decay), scalar(-1 if maximize else 1), *noise)
    threads = min(threads, len(work.tensors), numba.config.NUMBA_NUM_THREADS)
    if threads <= 1 or (work.stops - work.starts).sum() <= CHUNK * 4 or os.getpid() != _home_process:
        _compiled(rule, round_params, parallel=False)(*arguments)
        return
    with _lock:
        before = numba.get_num_threads()
        numba.set_num_threads(threads)
        try:
            _compiled(rule, round_params, parallel=True)(*arguments)
        finally:
            numba.set_num_threads(before)
