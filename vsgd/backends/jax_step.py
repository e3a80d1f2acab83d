"""The core's update of one JAX array as one primitive: numba's handler on a CPU, XLA's own code elsewhere.

The choice is made when the primitive is lowered, where the devices are known. (`jax.lax.platform_dependent` lowers both.)
"""

from __future__ import annotations

import functools
import inspect
import logging
import threading
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from vsgd import core, rounding
from vsgd.backends.jax import compute_words, list_varying_axes, to_bfloat16, vary_over

#: Smaller arrays are left to XLA: the call of a handler costs more than it saves.
SMALLEST = 4096

_logger = logging.getLogger(__name__)
_lock = threading.Lock()
# NumPy has no bfloat16: the handler takes its bits.
_DTYPES = {"float32": np.float32, "float64": np.float64, "bfloat16": np.uint16}

_step = Primitive("vsgd_step")
_step.multiple_results = True


def step_array(
    rule: core.Rule,
    grad: jax.Array,
    state: Sequence[jax.Array],
    coefficients: Any,
    key: jax.Array | None = None,
    turn: jax.Array | None = None,
    grad_scale: jax.Array | None = None,
) -> tuple[jax.Array, list[jax.Array], jax.Array | None]:
    """Return the direction of a gradient, the new state, and the turn of the next array.

    Steps on a function's arguments could all start at once, and XLA would fill memory with all directions before it used the
    first one. With turns, the handler waits for the last array's, and XLA uses a direction while it is in the caches.

    Args:
        rule: the variant.
        grad: real numbers in the dtype of the arithmetic, or in bfloat16.
        state: arrays of the gradient's shape, float64, float32 or bfloat16.
        coefficients: `rule.coefficients(step, hyper)`, numbers or 0-d arrays.
        key: the key of this array and step, if the state is bfloat16: it is rounded stochastically.
        turn: what the step on another array returned; None: do not wait.
        grad_scale: the factor of the gradient, a 0-d array; None: 1. With 0 there is no step, whatever the gradient is: the
            direction is 0, and the state stays.

    Returns:
        The direction in the gradient's dtype, state in its own, and the next turn, a scalar without meaning.

    Source: `vsgd.core`; arXiv 2404.06549, Algorithm 1.
    """
    if grad.size < SMALLEST:
        direction, *new = _update(rule, coefficients, key, grad, state, grad.shape, grad_scale)
        return direction, new, turn
    dtype = jnp.promote_types(state[0].dtype, jnp.float32)
    numbers = jnp.stack([jnp.asarray(number, dtype) for number in (*coefficients, 1.0 if grad_scale is None else grad_scale)])
    key, turn = (jnp.zeros([], jnp.int32) if each is None else each for each in (key, turn))
    turn, direction, *new = _step.bind(numbers, key, turn, grad, *state, rule=rule)
    return direction, new, turn


def _update(
    rule: core.Rule,
    coefficients: Any,
    key: Any,
    grad: jax.Array,
    state: Sequence[jax.Array],
    shape: tuple[int, ...],
    grad_scale: jax.Array | None,
) -> list[jax.Array]:
    dtype = jnp.promote_types(state[0].dtype, jnp.float32)
    wide = tuple(array.astype(dtype) for array in state)
    scaled = grad.astype(dtype) if grad_scale is None else grad.astype(dtype) * grad_scale.astype(dtype)
    direction, new = rule.make_update(jnp)(scaled, wide, coefficients)
    if state[0].dtype == jnp.bfloat16:
        words = compute_words(key, shape)
        new = tuple(to_bfloat16(array, words, multiplier) for array, multiplier in zip(new, rounding.MULTIPLIERS, strict=False))
    results = [direction.astype(grad.dtype), *(array.astype(state[0].dtype) for array in new)]
    if grad_scale is None:
        return results
    unchanged = jnp.zeros_like(grad), *state
    return [jnp.where(grad_scale == 0, old, new) for old, new in zip(unchanged, results, strict=True)]


def _compute_step(
    numbers: jax.Array, key: jax.Array, turn: jax.Array, grad: jax.Array, *state: jax.Array, rule: core.Rule
) -> list[jax.Array]:
    """Compute what the primitive means. Under `vmap`, each row of `numbers` and each key is for a row of the arrays."""
    rows = (*key.shape, *[1] * (grad.ndim - key.ndim))
    kind = type(rule.coefficients(1.0, rule.hyperparameters()))
    *coefficients, grad_scale = (numbers[..., i].reshape(rows) for i in range(numbers.shape[-1]))
    return [turn, *_update(rule, kind(*coefficients), key.reshape(rows), grad, state, grad.shape[key.ndim :], grad_scale)]


@functools.cache
def _compile(rule: core.Rule) -> Any:
    return jax.jit(functools.partial(_step.bind, rule=rule))


@_step.def_impl  # type: ignore[untyped-decorator]
def _(*operands: jax.Array, rule: core.Rule) -> Any:
    return _compile(rule)(*operands)


@_step.def_abstract_eval  # type: ignore[untyped-decorator]
def _(numbers: Any, key: Any, *arrays: Any, rule: core.Rule) -> list[Any]:
    # Where all inputs of `shard_map` do not vary together, the outputs vary as all of them do.
    varying = frozenset[str]().union(*map(list_varying_axes, (numbers, key, *arrays)))
    return [vary_over(each.update(weak_type=False), varying) for each in arrays]


def _differentiate(primals: Sequence[Any], tangents: Sequence[Any], *, rule: core.Rule) -> Any:
    tangents = [ad.instantiate_zeros(tangent) for tangent in tangents]
    return jax.jvp(functools.partial(_compute_step, rule=rule), tuple(primals), tuple(tangents))


def _batch(operands: Sequence[Any], axes: Sequence[int | None], *, rule: core.Rule) -> tuple[Any, list[int]]:
    (size,) = {operand.shape[axis] for operand, axis in zip(operands, axes, strict=True) if axis is not None}
    rows = (
        jnp.broadcast_to(operand, (size, *operand.shape)) if axis is None else jnp.moveaxis(operand, axis, 0)
        for operand, axis in zip(operands, axes, strict=True)
    )
    return _step.bind(*rows, rule=rule), [0] * (len(operands) - 2)


@functools.cache
def _register_handler(rule: core.Rule, grad_dtype: str, stored: str) -> str | None:
    """Compile and register a handler; return its name, or None where it cannot be had."""
    try:
        from vsgd.backends.xla_handler import compile_handler

        handler = compile_handler(rule, _DTYPES[grad_dtype], _DTYPES[stored])
        jax.ffi.register_ffi_target(handler.name, jax.ffi.pycapsule(handler.address), platform="cpu")
    except Exception as error:  # whatever is missing or refused, XLA's own code does the same
        _logger.info("XLA compiles the step of VSGD by itself, for there is no handler: %s", error)
        return None
    return handler.name


def _choose_handler(context: Any, rule: core.Rule) -> str | None:
    """Return the name of the handler for a lowering, or None where XLA must compile the step itself."""
    # These attributes are not quite public: without them, XLA compiles the step.
    module = context.module_context
    axes = getattr(module, "axis_context", None)
    mesh = getattr(axes, "mesh", None)
    manual = mesh is not None and set(getattr(axes, "manual_axes", ())) == set(mesh.axis_names)
    alone = getattr(axes, "num_devices", None) == 1 or manual
    exported = getattr(getattr(module, "lowering_parameters", None), "for_export", True)
    if not alone or exported or tuple(module.platforms) != ("cpu",):
        return None
    grad_dtype, stored = (context.avals_in[i].dtype.name for i in (3, 4))
    with _lock:
        return _register_handler(rule, grad_dtype, stored)


_lower_plain = mlir.lower_fun(_compute_step, multiple_results=True)


def _lower(context: Any, *operands: Any, rule: core.Rule) -> Any:
    name = _choose_handler(context, rule)
    if name is None:
        return _lower_plain(context, *operands, rule=rule)
    computed = type(operands[3]).__name__ == "OpResult"
    # The direction takes the place of a gradient that was computed here; XLA would copy an argument for that.
    aliases = {2 + i: i for i in range(len(operands) - 2) if computed or i != 1}
    results = list(jax.ffi.ffi_lowering(name, operand_output_aliases=aliases)(context, *operands))
    if computed:
        results[0] = operands[2]  # the next step need not wait for this one
    return results


ad.primitive_jvps[_step] = _differentiate
batching.primitive_batchers[_step] = _batch
# A cached lowering sees a function's arguments only.
_uncached: dict[str, Any] = {"cacheable": False} if "cacheable" in inspect.signature(mlir.register_lowering).parameters else {}
mlir.register_lowering(_step, _lower, **_uncached)
