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

from vsgd import core, rounding
from vsgd.backends import kernels, numba_ops
from vsgd.backends.numba_arrays import (
    SOURCES,
    compile_cached,
    compute_word,
    get_element,
    load_elements,
    put_element,
    store_elements,
    to_pointer,
    view_arrays,
)
from vsgd.backends.numba_ops import inline

#: Elements in a chunk, a thread's unit of work: the six float32 arrays of a chunk fit into a second-level cache.
CHUNK = 16384

# Numba's workqueue layer aborts the process when two threads start parallel loops at once.
_lock = threading.Lock()

# OpenMP threads do not survive a fork: a child process runs the serial kernel.
_home_process = os.getpid()


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
    version = SOURCES
    update = inline(rule.make_update(numba_ops))
    descend = inline(core.descend)
    n_state = len(rule.state_names)
    for_state, for_param = rounding.MULTIPLIERS[:n_state], rounding.MULTIPLIERS[n_state] if round_params else None

    @inline
    def step_block(param, grad, state, c, lr, decay, grad_scale, key, first_index):
        for i in range(param.shape[0]):
            word = compute_word(np.int32(first_index + np.int32(i)), key)
            direction, new_state = update(grad_scale * get_element(grad, i), load_elements(state, i), c)
            store_elements(state, i, new_state, for_state, word)
            put_element(param, i, descend(get_element(param, i), direction, lr, decay), for_param, word)

    def kernel(addresses, stored, tensors, starts, stops, c, lr, decay, grad_scale, keys, first_indices):
        version  # noqa: B018
        for k in indices(tensors.shape[0]):
            tensor, start = tensors[k], starts[k]
            arrays = view_arrays(addresses, stored, tensor, start, stops[k] - start)
            first_index = np.int32(first_indices[tensor] + start)
            step_block(arrays[0], arrays[1], arrays[2:], c, lr, decay, grad_scale, keys[tensor], first_index)

    return kernel


def _increase_counts(addresses, counts, one):
    for k in range(addresses.shape[0]):
        count = numba.carray(to_pointer(addresses[k], one), 1)
        count[0] += one
        counts[k] = count[0]


@functools.cache
def _compile(rule: core.Rule, round_params: bool, parallel: bool) -> Callable[..., None]:
    kernel = _make_kernel(rule, numba.prange if parallel else range, round_params)
    return compile_cached(numba.njit, kernel, nogil=True, parallel=parallel)


@functools.cache
def _compile_counter() -> Callable[..., None]:
    return compile_cached(numba.njit, _increase_counts, nogil=True)


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
    addresses: np.ndarray,
    chunks: Chunks,
    coefficients: Sequence[float],
    lr: float,
    decay: float,
    *,
    stored: Sequence[Any],
    noise: NoiseTable,
    round_params: bool = False,
    grad_scale: float = 1.0,
    threads: int = 1,
) -> None:
    """Take one step of `rule`, in place, on dense arrays in CPU memory.

    Args:
        rule: the variant to run.
        addresses: an int64 table of the arrays' addresses, with a row for each role (parameter, gradient, and the state arrays
            in the rule's order) and a column for each parameter. The arrays must stay alive and unmoved during the call.
        chunks: the chunks to step.
        coefficients: `rule.coefficients(step, hyper)` as Python numbers, the same for all chunks.
        lr: the step size.
        decay: `1 - lr * weight_decay`.
        stored: the NumPy dtype of each role's arrays: float64 for all, or float32 or uint16 (for bfloat16). The arithmetic is
            float64 or float32. bfloat16 state is rounded stochastically.
        noise: the random bits of stochastic rounding.
        round_params: whether bfloat16 parameters are rounded stochastically, and not to the nearest.
        grad_scale: the factor of gradients.
        threads: the largest number of threads to use.

    Source: `vsgd.core`; arXiv 2404.06549, Algorithm 1.
    """
    scalar = np.float64 if stored[0] is np.float64 else np.float32
    c = type(coefficients)(*map(scalar, coefficients))
    like = tuple(dtype(0) for dtype in stored)
    arguments = (addresses, like, *chunks, c, scalar(lr), scalar(decay), scalar(grad_scale), *noise)
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
