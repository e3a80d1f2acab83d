"""The core's update compiled by numba: one pass over many tensors in CPU memory, in place, without temporaries.

Arrays come as a table of addresses, so that one call serves any number of tensors of any framework. The update is the
function that `vsgd.core` states; numba inlines it, and LLVM vectorizes the loop.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import os
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numba
import numpy as np
from numba import types
from numba.extending import intrinsic, overload, register_jitable

from vsgd import core
from vsgd.backends.chunks import chunks

if numba.config.DISABLE_JIT:
    raise ImportError("vsgd's fused kernel needs numba's compiler, which NUMBA_DISABLE_JIT turns off")

#: Elements in a chunk, the unit of work of a thread: the six arrays of a float32 chunk fit a second-level cache.
CHUNK = 16384

# Never nnan or ninf: a NaN gradient must show.
_OPTIONS = {"fastmath": {"contract", "arcp", "nsz"}, "error_model": "numpy"}

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


# Numba has no typed loop over a tuple of arrays: these recurse at compile time, for any number of arrays.


def _views(addresses, tensor, start, size, like):
    """Arrays of `size` elements from element `start` on, one for each role in the table."""


@overload(_views)
def _(addresses, tensor, start, size, like):
    itemsize = like.bitwidth // 8
    if len(addresses) == 0:
        return lambda addresses, tensor, start, size, like: ()

    def views(addresses, tensor, start, size, like):
        head = numba.carray(_pointer(addresses[0][tensor] + start * itemsize, like), size)
        return (head, *_views(addresses[1:], tensor, start, size, like))

    return views


def _load(arrays, i):
    """Element `i` of each array."""


@overload(_load)
def _(arrays, i):
    if len(arrays) == 0:
        return lambda arrays, i: ()
    return lambda arrays, i: (arrays[0][i], *_load(arrays[1:], i))


def _store(arrays, i, values):
    """Set element `i` of each array to its value."""


@overload(_store)
def _(arrays, i, values):
    if len(arrays) == 0:
        return lambda arrays, i, values: None

    def store(arrays, i, values):
        arrays[0][i] = values[0]
        _store(arrays[1:], i, values[1:])

    return store


class Table(NamedTuple):
    """Dense arrays of equal dtype in CPU memory.

    Attributes:
        addresses: one int64 array for each role (parameter, gradient, and the state arrays in the rule's order), holding the
            address of that array for each parameter.
        sizes: the number of elements of each parameter, int64.
    """

    addresses: tuple[np.ndarray, ...]
    sizes: np.ndarray


def _kernel_of(rule: core.Rule, indices: Callable[[int], Any]) -> Callable[..., None]:
    # Captured, for the disk cache's key holds captured values: without them it would serve the kernel of an older core, or
    # the serial kernel in place of the parallel one.
    core_version = hashlib.sha256(inspect.getsource(core).encode()).hexdigest()
    update = register_jitable(**_OPTIONS)(rule.make_update(np))
    descend = register_jitable(**_OPTIONS)(core.descend)

    @register_jitable(**_OPTIONS)
    def step_block(param, grad, state, c, lr, decay, sign):
        for i in range(param.shape[0]):
            direction, new_state = update(sign * grad[i], _load(state, i), c)
            _store(state, i, new_state)
            param[i] = descend(param[i], direction, lr, decay)

    def kernel(addresses, tensors, starts, stops, c, lr, decay, sign):
        core_version  # noqa: B018
        for k in indices(tensors.shape[0]):
            arrays = _views(addresses, tensors[k], starts[k], stops[k] - starts[k], lr)
            step_block(arrays[0], arrays[1], arrays[2:], c, lr, decay, sign)

    return kernel


@functools.cache
def _compiled(rule: core.Rule, parallel: bool) -> Callable[..., None]:
    options = {**_OPTIONS, "nogil": True, "parallel": parallel}
    kernel = _kernel_of(rule, numba.prange if parallel else range)
    try:
        return numba.njit(cache=True, **options)(kernel)
    except RuntimeError:  # there is no place to write the cache to
        return numba.njit(**options)(kernel)


def step(
    rule: core.Rule,
    table: Table,
    coefficients: Sequence[float],
    lr: float,
    decay: float,
    *,
    dtype: Any,
    maximize: bool = False,
    threads: int = 1,
) -> None:
    """One step of `rule`, in place, on all arrays of `table`.

    Args:
        rule: the variant to run.
        table: where the arrays lie; they stay alive and unmoved during the call.
        coefficients: `rule.coefficients(step, hyper)` with Python numbers, the same for all parameters.
        lr: step size.
        decay: `1 - lr * weight_decay`.
        dtype: numpy dtype of all arrays, float32 or float64.
        maximize: whether to step with the negative gradient.
        threads: the most threads to use.

    Source: `vsgd.core`; arXiv 2404.06549, Algorithm 1.
    """
    scalar = np.dtype(dtype).type
    tensors, starts = chunks(table.sizes, CHUNK)
    stops = np.minimum(starts + CHUNK, table.sizes[tensors])
    c = type(coefficients)(*map(scalar, coefficients))
    arguments = (table.addresses, tensors, starts, stops, c, scalar(lr), scalar(decay), scalar(-1 if maximize else 1))
    threads = min(threads, numba.config.NUMBA_NUM_THREADS)
    if threads == 1 or len(tensors) == 1 or table.sizes.sum() <= CHUNK * 4 or os.getpid() != _home_process:
        _compiled(rule, parallel=False)(*arguments)
        return
    with _lock:
        before = numba.get_num_threads()
        numba.set_num_threads(threads)
        try:
            _compiled(rule, parallel=True)(*arguments)
        finally:
            numba.set_num_threads(before)
