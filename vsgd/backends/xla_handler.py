"""The core's update as a handler of XLA's foreign function interface (FFI), compiled by numba, on Linux CPUs.

XLA's own code for a CPU is one kernel for each output of a step, each of which reads the inputs again. The handler makes one
pass over all arrays, in XLA's buffers and on XLA's threads.

XLA calls a handler with the address of a call frame. The structs below are those of `xla/ffi/api/c_api.h`, version 0.1, to
which later minor versions only append. At registration XLA queries the handler's version; if the call frame has an
unexpected size, the handler returns a version that XLA rejects.
"""

from __future__ import annotations

import functools
import hashlib
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import llvmlite.binding
import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, overload

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

if sys.platform != "linux":
    raise ImportError(f"vsgd's XLA handler has been tested on Linux only, not on {sys.platform}")

_SOURCES = kernels.hash_sources(sys.modules[__name__]) + SOURCES

#: Elements that a thread takes at once.
TASK = 32768
#: Leaves of at most so many elements are stepped by one thread.
SERIAL = 65536


def _make_struct(*fields: str, **dtypes: Any) -> np.dtype:
    """Return a C struct of these fields, 64-bit integers or addresses but for those whose dtype is given."""
    return np.dtype([(name, dtypes.get(name, np.int64)) for name in fields], align=True)


_ARRAYS = ("size", "extension", "count", "types", "items")
_FRAME = _make_struct(
    *("size", "extension", "api", "context", "stage"),
    *(f"{role}_{name}" for role in ("arguments", "results", "attributes") for name in _ARRAYS),
    "attribute_values",
    stage=np.int32,
)
_FRAME_SIZES = (_FRAME.itemsize, _FRAME.itemsize + 8)  # before and after a field for asynchronous handlers was appended
_BUFFER = _make_struct("size", "extension", "dtype", "data", "rank", "dimensions", dtype=np.int32)
_API = _make_struct(
    *("size", "extension", "version_size", "version_extension", "major", "minor", "internal"),
    *("create_error", "get_message", "destroy_error", "register", "get_stream", "register_type", "get_context"),
    *("set_state", "get_state", "allocate", "free", "schedule", "get_threads"),
    major=np.int32,
    minor=np.int32,
)
_EXTENSION = _make_struct("size", "kind", "next", "metadata", kind=np.int32)
_METADATA = _make_struct("size", "version_size", "version_extension", "major", "minor", major=np.int32, minor=np.int32)
_CALL = _make_struct("size", "extension", "subject", "first", "second")  # the arguments of a function of the API
_METADATA_KIND, _EXECUTE = 1, 3

#: What the threads of a step share. The addresses of the leaf's arrays follow.
_JOB = _make_struct(
    *("next", "done", "references", "tasks", "parts", "row_size", "coefficients", "keys", "key_stride", "gradient")
)
# Compiled code cannot read a dtype's attributes.
_API_BYTES, _CALL_BYTES, _JOB_BYTES = _API.itemsize, _CALL.itemsize, _JOB.itemsize
_NEXT, _DONE, _REFERENCES = 0, 8, 16  # where the job's first fields are

_malloc = types.ExternalFunction("malloc", types.int64(types.int64))
_free = types.ExternalFunction("free", types.void(types.int64))
_madvise = types.ExternalFunction("madvise", types.intc(types.int64, types.int64, types.intc))
_HUGE_PAGE, _MADV_HUGEPAGE = 1 << 21, 14
_sched_yield = types.ExternalFunction("sched_yield", types.intc())


@intrinsic
def _to_address(typing_context, address):
    """Return an integer as an untyped pointer."""

    def codegen(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], context.get_value_type(types.voidptr))

    return types.voidptr(address), codegen


@intrinsic
def _fetch_add(typing_context, address, value):
    """Add to the 64-bit integer at an address atomically, and return what it was."""

    def codegen(context, builder, signature, arguments):
        pointer = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", pointer, arguments[1], "seq_cst")

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def _call(typing_context, function, argument):
    """Call the C function at an address with one pointer, and return its pointer."""

    def codegen(context, builder, signature, arguments):
        kind = ir.FunctionType(ir.IntType(64), [ir.IntType(64)]).as_pointer()
        return builder.call(builder.inttoptr(arguments[0], kind), [arguments[1]])

    return types.int64(types.int64, types.int64), codegen


@intrinsic(prefer_literal=True)
def _find_symbol(typing_context, name):
    """Return the address that `llvmlite.binding.add_symbol` gave a name, looked up when the code is loaded."""
    symbol = name.literal_value

    def codegen(context, builder, signature, arguments):
        function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(ir.VoidType(), [ir.IntType(64)]), symbol)
        return builder.ptrtoint(function, ir.IntType(64))

    return types.int64(name), codegen


@inline
def _read(address, struct):
    """Return the struct at an address; writing to its fields writes there."""
    return numba.carray(_to_address(address), 1, struct)[0]


@inline
def _read_words(address, shape):
    """Return the 64-bit integers at an address."""
    return numba.carray(_to_address(address), shape, np.int64)


@inline
def _get_buffer(buffers, i):
    """Return the `i`-th of the buffers whose addresses are stored at an address."""
    return _read(_read_words(buffers, i + 1)[i], _BUFFER)


@inline
def _count_elements(buffer):
    """Return the number of elements of a buffer."""
    count = 1
    for size in _read_words(buffer.dimensions, buffer.rank):
        count *= size
    return count


def _read_numbers(numbers, likes):
    """Return the first items of an array, one for each of the scalars `likes`, as a tuple."""


@overload(_read_numbers)
def _(numbers, likes):
    if len(likes) == 0:
        return lambda numbers, likes: ()
    return lambda numbers, likes: (numbers[0], *_read_numbers(numbers[1:], likes[1:]))


@inline
def _succeeds(api, function, subject, first, second):
    """Call a function of the API, whose arguments are at most three words, and return whether it succeeded."""
    call = np.zeros(1, _CALL)
    call[0].size, call[0].subject, call[0].first, call[0].second = _CALL_BYTES, subject, first, second
    error = _call(function, call.ctypes.data)
    if error != 0:
        call[0].subject = error
        _call(api.destroy_error, call.ctypes.data)
    return error == 0


@inline
def _view_array(address, like, size):
    """Return an array of the dtype of the scalar `like` at an address."""
    return numba.carray(to_pointer(address, like), size)


@inline
def _answer_version(frame):
    """Return whether XLA queries the version; if so, set 0.1, or one that XLA rejects if its call frame is unknown."""
    if frame.extension == 0 or _read(frame.extension, _EXTENSION).kind != _METADATA_KIND:
        return False
    metadata = _read(_read(frame.extension, _EXTENSION).metadata, _METADATA)
    metadata.major = 0 if frame.size == _FRAME_SIZES[0] or frame.size == _FRAME_SIZES[1] else -1
    metadata.minor = 1
    return True


@inline
def _count_leaves(frame, n_roles):
    """Return the number of leaves of a call: all arguments after the first three are theirs."""
    return (frame.arguments_count - 3) // n_roles


@inline
def _make_job(frame, leaf, n_roles, itemsize):
    """Return the address of a new job for one thread, or 0 if the leaf has no elements."""
    gradient = _get_buffer(frame.arguments_items, 3 + leaf * n_roles)
    size = _count_elements(gradient)
    if size == 0:
        return 0
    keys, n_leaves = _get_buffer(frame.arguments_items, 1), _count_leaves(frame, n_roles)
    rows = _count_elements(keys) // n_leaves
    address = _malloc(_JOB_BYTES + 8 * n_roles)
    job, addresses = _read(address, _JOB), _read_words(address + _JOB_BYTES, n_roles)
    job.next, job.done, job.references = 0, 0, 1
    job.row_size = size // rows
    job.parts = -(-job.row_size // TASK)
    job.tasks = rows * job.parts
    job.coefficients = _get_buffer(frame.arguments_items, 0).data
    job.keys, job.key_stride = keys.data + 4 * leaf, n_leaves
    job.gradient = gradient.data
    for role in range(n_roles):
        addresses[role] = _get_buffer(frame.results_items, 1 + leaf * n_roles + role).data
    if job.gradient != addresses[0] and size * itemsize >= _HUGE_PAGE // 2:
        # XLA takes the direction's memory from the system in each step: large pages need fewer page faults.
        first = addresses[0] & -_HUGE_PAGE
        _madvise(first, addresses[0] + size * itemsize - first, _MADV_HUGEPAGE)
    return address


@inline
def _start_helpers(frame, address, run_task):
    """Let other threads of XLA work on a large job, as far as there are some."""
    job, api = _read(address, _JOB), _read(frame.api, _API)
    # Later minor versions only append to the API; with another one this thread works alone.
    if job.tasks * job.row_size <= SERIAL * job.parts or api.size < _API_BYTES or api.major != 0:
        return
    threads = np.ones(1, np.int64)
    if not _succeeds(api, api.get_threads, frame.context, threads.ctypes.data, 0):
        return
    for _ in range(min(threads[0], job.tasks) - 1):
        _fetch_add(address + _REFERENCES, 1)
        if not _succeeds(api, api.schedule, frame.context, run_task, address):
            _fetch_add(address + _REFERENCES, -1)
            return


@inline
def _take_task(address):
    """Return the number of the next task of a job, which no other thread gets."""
    return _fetch_add(address + _NEXT, 1)


@inline
def _finish_task(address):
    """Count a task of a job as done."""
    _fetch_add(address + _DONE, 1)


@inline
def _wait(address):
    """Wait until the tasks of a job are done. Each was taken by a running thread; none waits in a queue."""
    while _fetch_add(address + _DONE, 0) < _read(address, _JOB).tasks:
        _sched_yield()


@inline
def _release(address):
    """Free a job after its last use."""
    if _fetch_add(address + _REFERENCES, -1) == 1:
        _free(address)


class Handler(NamedTuple):
    """A compiled handler.

    Attributes:
        name: a name that depends on all that the handler was compiled from.
        address: where it is.
        code: what must stay alive.
    """

    name: str
    address: int
    code: tuple[Any, ...]


@functools.cache
def compile_handler(rule: core.Rule, grad_dtype: Any, stored: Any) -> Handler:
    """Compile the handler of a rule.

    Its operands are numbers (rows x the coefficients and the factor of the gradients), the keys of stochastic rounding (rows x
    leaves, int32), turns (rows, int32), and for each leaf its gradient and its state (rows x the leaf's shape). Its results are
    turns, which only order the calls, and for each leaf the direction, and the new state in the buffers of the old one. With a
    factor of 0 there is no step.

    Args:
        rule: the variant.
        grad_dtype: the NumPy dtype of gradient and direction: float64, float32, or uint16 for bfloat16.
        stored: the NumPy dtype of the state; float64 if and only if the gradient's is. bfloat16 is rounded stochastically.

    Returns:
        The handler, which must stay alive as long as XLA may call it.
    """
    coefficients = rule.coefficients(1.0, rule.hyperparameters())
    kind, scalar = type(coefficients), np.float64 if stored is np.float64 else np.float32
    likes = (scalar(0),) * (len(coefficients) + 1)
    n_state = len(rule.state_names)
    n_roles = 1 + n_state
    multipliers = rounding.MULTIPLIERS[:n_state] if stored is np.uint16 else (None,) * n_state
    like = (grad_dtype(0), *[stored(0)] * n_state)
    row_bytes, itemsize = len(likes) * scalar(0).itemsize, grad_dtype(0).itemsize
    update = inline(rule.make_update(numba_ops))
    identity = repr((_SOURCES, rule.hyperparameters._fields, rule.state_names, grad_dtype, stored))
    tag = hashlib.sha256(identity.encode()).hexdigest()[:16]
    task_symbol = f"vsgd_task_{tag}"

    def name_apart(function: Callable[..., Any]) -> Callable[..., Any]:
        # Of two kernels from the disk cache with equal names and types of arguments, one would be called in place of the other.
        function.__name__, function.__qualname__ = f"{function.__name__}_{tag}", f"{function.__qualname__}_{tag}"
        return function

    @inline
    @name_apart
    def step_element(i, direction, grad, state, c, grad_scale, key, first_index):
        word = compute_word(np.int32(first_index + np.int32(i)), key)
        value, new_state = update(grad_scale * get_element(grad, i), load_elements(state, i), c)
        store_elements(state, i, new_state, multipliers, word)
        put_element(direction, i, value, None, word)

    # Two loops, because LLVM does not vectorize if two arrays may overlap.

    @inline
    @name_apart
    def step_in_place(grad, state, c, grad_scale, key, first_index):
        for i in range(grad.shape[0]):
            step_element(i, grad, grad, state, c, grad_scale, key, first_index)

    @inline
    @name_apart
    def step_apart(direction, grad, state, c, grad_scale, key, first_index):
        for i in range(grad.shape[0]):
            step_element(i, direction, grad, state, c, grad_scale, key, first_index)

    @inline
    @name_apart
    def stay(direction):
        for i in range(direction.shape[0]):
            put_element(direction, i, scalar(0), None, np.int32(0))

    @inline
    @name_apart
    def work(address):
        job, addresses = _read(address, _JOB), _read_words(address + _JOB_BYTES, (n_roles, 1))
        while True:
            task = _take_task(address)
            if task >= job.tasks:
                return
            row, part = divmod(task, job.parts)
            numbers = _view_array(job.coefficients + row * row_bytes, likes[0], len(likes))
            c, grad_scale = kind(*_read_numbers(numbers, likes[1:])), numbers[len(likes) - 1]
            key = _view_array(job.keys + 4 * row * job.key_stride, np.int32(0), 1)[0]
            start = part * TASK
            first, size = row * job.row_size + start, min(TASK, job.row_size - start)
            arrays = view_arrays(addresses, like, 0, first, size)
            if grad_scale == 0:
                stay(arrays[0])
            elif job.gradient == addresses[0, 0]:
                step_in_place(arrays[0], arrays[1:], c, grad_scale, key, np.int32(start))
            else:
                grad = _view_array(job.gradient + first * itemsize, like[0], size)
                step_apart(arrays[0], grad, arrays[1:], c, grad_scale, key, np.int32(start))
            _finish_task(address)

    # Only these two may call an intrinsic: in a function that they capture it would have another cache key in each process.

    @name_apart
    def run_task(address):
        work(address)
        _release(address)

    @name_apart
    def handle(address):
        frame = _read(address, _FRAME)
        if not _answer_version(frame) and frame.stage == _EXECUTE:
            for leaf in range(_count_leaves(frame, n_roles)):
                job = _make_job(frame, leaf, n_roles, itemsize)
                if job != 0:
                    _start_helpers(frame, job, _find_symbol(task_symbol))
                    work(job)
                    _wait(job)
                    _release(job)
        return 0

    task = compile_cached(functools.partial(numba.cfunc, types.void(types.int64)), run_task)
    llvmlite.binding.add_symbol(task_symbol, task.address)
    handler = compile_cached(functools.partial(numba.cfunc, types.int64(types.int64)), handle)
    return Handler(f"vsgd_{tag}", handler.address, (task, handler))
