"""The core's update of JAX arrays as one primitive: numba's handler on a CPU, XLA's own code elsewhere.

The choice is made when the primitive is lowered, where the devices are known. (`jax.lax.platform_dependent` lowers both.)
"""

from __future__ import annotations

import functools
import inspect
import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from vsgd import core, rounding
from vsgd.backends.jax import compute_words, list_varying_axes, to_bfloat16, vary_over

#: Arrays of fewer elements share one call of a handler.
SMALLEST = 4096
#: Fewer small arrays are left to XLA: for a small model the handler's compilation takes longer than it ever saves.
FEWEST = 64

_logger = logging.getLogger(__name__)
_lock = threading.Lock()
# NumPy has no bfloat16: the handler takes its bits.
_DTYPES = {"float32": np.float32, "float64": np.float64, "bfloat16": np.uint16}

_step = Primitive("vsgd_step")
_step.multiple_results = True


class Leaf(NamedTuple):
    """An array to step.

    Attributes:
        grad: real numbers in the dtype of the arithmetic, or in bfloat16.
        state: arrays of the gradient's shape, float64, float32 or bfloat16.
        key: the key of this array and step if the state is bfloat16, which is rounded stochastically; else None.
    """

    grad: jax.Array
    state: Sequence[jax.Array]
    key: jax.Array | None = None


def step_leaves(
    rule: core.Rule,
    leaves: Sequence[Leaf],
    compute_coefficients: Callable[[Any], Any],
    grad_scale: jax.Array | None = None,
) -> list[tuple[jax.Array, list[jax.Array]]]:
    """Return each leaf's direction, in the gradient's dtype, and its new state.

    Args:
        rule: the variant.
        leaves: the arrays.
        compute_coefficients: returns `rule.coefficients(step, hyper)`, numbers or 0-d arrays, in a dtype.
        grad_scale: the factor of all gradients, a 0-d array; None: 1. With 0 there is no step, whatever the gradients are: the
            directions are 0, and the state stays.

    Source: `vsgd.core`; arXiv 2404.06549, Algorithm 1.
    """
    groups: dict[tuple[Any, ...], list[int]] = {}
    for place, leaf in enumerate(leaves):
        alone = None if leaf.grad.size < SMALLEST else place
        groups.setdefault((leaf.grad.dtype, leaf.state[0].dtype, alone), []).append(place)
    stepped: dict[int, tuple[jax.Array, list[jax.Array]]] = {}
    # Steps on a function's arguments could all start at once, and XLA would fill memory with all directions before it used the
    # first one. With turns, the handler waits for the last call, and XLA uses a direction while it is in the caches.
    turn = jnp.zeros([], jnp.int32)
    for (_, stored, alone), places in groups.items():
        dtype = jnp.promote_types(stored, jnp.float32)
        coefficients = compute_coefficients(dtype)
        members = [leaves[place] for place in places]
        found: Sequence[Sequence[Any]]
        if alone is None and len(places) < FEWEST:
            found = [_update(rule, coefficients, leaf.key, leaf.grad, leaf.state, grad_scale) for leaf in members]
        else:
            factor = 1.0 if grad_scale is None else grad_scale
            numbers = jnp.stack([jnp.asarray(number, dtype) for number in (*coefficients, factor)])
            keys = jnp.stack([jnp.asarray(0 if leaf.key is None else leaf.key, jnp.int32) for leaf in members])
            arrays = (array for leaf in members for array in (leaf.grad, *leaf.state))
            turn, *results = _step.bind(numbers, keys, turn, *arrays, rule=rule)
            found = _split_by_leaf(rule, results)
        stepped.update(zip(places, ((direction, new) for direction, *new in found), strict=True))
    return [stepped[place] for place in range(len(leaves))]


def _split_by_leaf(rule: core.Rule, arrays: Sequence[Any]) -> list[Sequence[Any]]:
    """Split arrays into those of each leaf: gradient or direction, and state."""
    size = 1 + len(rule.state_names)
    return [arrays[start : start + size] for start in range(0, len(arrays), size)]


def _update(
    rule: core.Rule,
    coefficients: Any,
    key: Any,
    grad: jax.Array,
    state: Sequence[jax.Array],
    grad_scale: jax.Array | None,
    rows: int = 0,
) -> list[jax.Array]:
    """Compute a step by JAX's own operators; the first `rows` dimensions of all arrays number the rows of a `vmap`."""
    dtype = jnp.promote_types(state[0].dtype, jnp.float32)
    wide = tuple(array.astype(dtype) for array in state)
    scaled = grad.astype(dtype) if grad_scale is None else grad.astype(dtype) * grad_scale.astype(dtype)
    direction, new = rule.make_update(jnp)(scaled, wide, coefficients)
    if state[0].dtype == jnp.bfloat16:
        words = compute_words(key, grad.shape[rows:])
        new = tuple(to_bfloat16(array, words, multiplier) for array, multiplier in zip(new, rounding.MULTIPLIERS, strict=False))
    results = [direction.astype(grad.dtype), *(array.astype(state[0].dtype) for array in new)]
    if grad_scale is None:
        return results
    unchanged = jnp.zeros_like(grad), *state
    return [jnp.where(grad_scale == 0, old, new) for old, new in zip(unchanged, results, strict=True)]


def _compute_step(numbers: jax.Array, keys: jax.Array, turn: jax.Array, *arrays: jax.Array, rule: core.Rule) -> list[jax.Array]:
    """Compute what the primitive means. Under `vmap`, each row of `numbers` and `keys` is for a row of the arrays."""
    kind = type(rule.coefficients(1.0, rule.hyperparameters()))
    rows = numbers.ndim - 1
    results = [turn]
    for place, (grad, *state) in enumerate(_split_by_leaf(rule, arrays)):
        shape = (*numbers.shape[:rows], *[1] * (grad.ndim - rows))
        *coefficients, grad_scale = (numbers[..., i].reshape(shape) for i in range(numbers.shape[-1]))
        key = keys[..., place].reshape(shape)
        results += _update(rule, kind(*coefficients), key, grad, state, grad_scale, rows)
    return results


@functools.cache
def _compile(rule: core.Rule) -> Any:
    return jax.jit(functools.partial(_step.bind, rule=rule))


@_step.def_impl  # type: ignore[untyped-decorator]
def _(*operands: jax.Array, rule: core.Rule) -> Any:
    return _compile(rule)(*operands)


@_step.def_abstract_eval  # type: ignore[untyped-decorator]
def _(numbers: Any, keys: Any, turn: Any, *arrays: Any, rule: core.Rule) -> list[Any]:
    results = [turn]
    for leaf in _split_by_leaf(rule, arrays):
        # Where a leaf's inputs of `shard_map` do not vary together, its outputs vary as all of them do.
        varying = frozenset[str]().union(*map(list_varying_axes, (numbers, keys, *leaf)))
        results += [vary_over(each.update(weak_type=False), varying) for each in leaf]
    return results


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
    # The direction takes the place of a gradient that was computed here; XLA would copy an argument for that.
    computed = [type(leaf[0]).__name__ == "OpResult" for leaf in _split_by_leaf(rule, operands[3:])]
    size = 1 + len(rule.state_names)
    kept = {3 + place * size for place, each in enumerate(computed) if not each}
    results = list(
        jax.ffi.ffi_lowering(name, operand_output_aliases={i: i - 2 for i in range(2, len(operands)) if i not in kept})(
            context, *operands
        )
    )
    if all(computed):
        results[0] = operands[2]  # the next step need not wait for this one
    return results


ad.primitive_jvps[_step] = _differentiate
batching.primitive_batchers[_step] = _batch
# A cached lowering sees a function's arguments only.
_uncached: dict[str, Any] = {"cacheable": False} if "cacheable" in inspect.signature(mlir.register_lowering).parameters else {}
mlir.register_lowering(_step, _lower, **_uncached)
