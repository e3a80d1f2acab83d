"""The core on tensors of Keras' backend: dtypes, complex parts, stochastic rounding, and compilation where Keras does none."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import keras
from keras import ops

from vsgd import core, prior, rounding
from vsgd.ops import BitOps

if keras.backend.backend() == "torch":
    import torch
if keras.backend.backend() == "jax":
    from vsgd.backends.jax_step import Leaf, step_leaves


class _KerasIntegers(BitOps):
    def shift_right(self, i: Any, places: int) -> Any:
        # TensorFlow's tensors have no operator for shifts.
        return ops.right_shift(i, places) & (0xFFFFFFFF >> places)

    def view_as_int32(self, x: Any) -> Any:
        return _bitcast(x, "int32")

    def view_as_float32(self, i: Any) -> Any:
        return _bitcast(i, "float32")

    def where(self, condition: Any, x: Any, y: Any) -> Any:
        return ops.where(condition, x, y)


def _bitcast(x: Any, dtype: str) -> Any:
    """Return the bits of an array as another dtype of the same size."""
    # Not `ops.view`, which Keras 3.10 lacks.
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        return tf.bitcast(x, dtype)
    return x.view(getattr(torch, dtype) if keras.backend.backend() == "torch" else dtype)


_OPS = _KerasIntegers()
_compute_key = rounding.make_key(_OPS)
_compute_word = rounding.make_word(_OPS)
_to_bfloat16 = rounding.make_round(_OPS)


def _iota(shape: Sequence[int], dimension: int) -> Any:
    """Return the indices along a dimension, in a shape that broadcasts."""
    return ops.reshape(ops.arange(shape[dimension], dtype="int32"), (shape[dimension], *[1] * (len(shape) - dimension - 1)))


class Scalars(NamedTuple):
    """The scalars of one step, as tensors. Passed as `learning_rate` because Keras copies it to every replica.

    Attributes:
        by_dtype: for each dtype of the arithmetic the step size, the rule's coefficients and the factor of gradients: None for
            gradients as they are, and 0 where there is no step.
        step: the count of this step, int32; None where nothing is rounded stochastically.
    """

    by_dtype: dict[str, tuple[Any, Any, Any]]
    step: Any


def convert_gradient(grad: Any) -> Any:
    """Return a gradient as a tensor, or as `tf.IndexedSlices` with a shape; None stays None."""
    if getattr(grad, "dense_shape", None) is not None:
        # TensorFlow finds the shape only if a tensor holds it.
        return type(grad)(grad.values, grad.indices, ops.convert_to_tensor(grad.dense_shape))
    if hasattr(grad, "todense"):
        return grad.todense()
    return grad if grad is None or ops.is_tensor(grad) else ops.convert_to_tensor(grad)


def choose_state_dtype(variable: Any, state_dtype: str) -> str:
    """Return the dtype of a variable's state.

    Half precision, rounded to the nearest, holds neither b_g (it falls to 1e-8) nor its small changes.

    Args:
        variable: the variable; state of float64 and complex variables has their dtype.
        state_dtype: "float32" or "bfloat16".
    """
    # Of the value: JAX without x64 has float32 values in float64 variables.
    dtype: str = keras.backend.standardize_dtype(ops.convert_to_tensor(variable).dtype)
    return dtype if dtype in ("float64", "complex64", "complex128") else state_dtype


def choose_arithmetic_dtype(stored: str) -> str:
    """Return the dtype of the arithmetic for state of this dtype."""
    return "float32" if stored == "bfloat16" else stored


def choose_real_dtype(dtype: str) -> str:
    """Return the dtype of the coefficients for state of this dtype."""
    return {"bfloat16": "float32", "complex64": "float32", "complex128": "float64"}.get(dtype, dtype)


def split_complex(tensor: Any) -> tuple[Any, ...]:
    """Return the real tensors that an update takes: two for a complex tensor, else the tensor itself."""
    is_complex = keras.backend.standardize_dtype(tensor.dtype).startswith("complex")
    return (ops.real(tensor), ops.imag(tensor)) if is_complex else (tensor,)


def join_complex(parts: tuple[Any, ...]) -> Any:
    """Return the tensor of these parts, the inverse of `split_complex`."""
    if len(parts) == 1:
        return parts[0]
    dtype = {"float32": "complex64", "float64": "complex128"}[keras.backend.standardize_dtype(parts[0].dtype)]
    real, imaginary = (ops.cast(part, dtype) for part in parts)
    return real + imaginary * 1j


def measure_unit(grads: Sequence[Any], variables: Sequence[Any]) -> Any:
    """Return the root mean square of all elements of the variables' gradients, or 0 if they are all zero or not finite."""

    def densify(grad: Any, variable: Any) -> Any:
        if hasattr(grad, "dense_shape"):
            grad = ops.add(ops.zeros(variable.shape, grad.dtype), grad)
        return ops.reshape(ops.stop_gradient(grad), variable.shape)  # TensorFlow may know the shape only in part

    pairs = zip(grads, variables, strict=True)
    arrays = [part for grad, variable in pairs for part in split_complex(densify(grad, variable))]
    double = any(keras.backend.standardize_dtype(array.dtype) == "float64" for array in arrays)
    shards = prior.Shards(arrays, partial(ops.cast, dtype="float64" if double else "float32"))
    return prior.measure_unit(ops, [shards], sum(math.prod(array.shape) for array in arrays))


def compute_step(rule: core.Rule, values: list[Any], lr: Any, coefficients: Any, grad_scale: Any, decay: Any) -> list[Any]:
    """Return the new variable and its new state.

    Args:
        rule: the variant to run.
        values: the variable, its gradient and its state, all of one dtype.
        lr: the step size.
        coefficients: the rule's coefficients of this step.
        grad_scale: the factor of the gradient: see `Scalars`.
        decay: the factor of the variable's weight decay.
    """
    new = []
    for param, grad, *state in zip(*map(split_complex, values), strict=True):
        direction, new_state = _step_array(rule, grad, state, coefficients, None, grad_scale)
        new.append((_hold(grad_scale, core.descend(param, direction, lr, decay), param), *new_state))
    return [join_complex(parts) for parts in zip(*new, strict=True)]


def compute_rounded_step(
    rule: core.Rule,
    round_param: bool,
    values: list[Any],
    lr: Any,
    coefficients: Any,
    grad_scale: Any,
    decay: Any,
    base: Any,
    step: Any,
) -> list[Any]:
    """Return the new variable and its new state, computed in float32, with bfloat16 rounded stochastically.

    Args:
        rule: the variant to run.
        round_param: whether to round the variable; the state is rounded where it is stored in bfloat16.
        values: the variable, its gradient and its state.
        lr: the step size.
        coefficients: the rule's coefficients of this step.
        grad_scale: the factor of the gradient: see `Scalars`.
        decay: the factor of the variable's weight decay.
        base: the variable's `rounding.base_key`, an int32 tensor.
        step: the count of this step, an int32 tensor.
    """
    key = _compute_key(base, step)
    param, grad = (ops.cast(value, "float32") for value in values[:2])
    direction, state = _step_array(rule, grad, values[2:], coefficients, key, grad_scale)
    param = _hold(grad_scale, core.descend(param, direction, lr, decay), param)
    return [_round_arrays([param], key, len(state))[0] if round_param else param, *state]


def _hold(grad_scale: Any, new: Any, old: Any) -> Any:
    """Return the new value, or the old one where there is no step."""
    return new if grad_scale is None else ops.where(grad_scale == 0, old, new)


def _round_arrays(arrays: Sequence[Any], key: Any, first: int = 0) -> list[Any]:
    """Round arrays of one shape to bfloat16, with the random bits of the multipliers from the first one on."""
    word = _compute_word(rounding.compute_indices(arrays[0].shape, _iota), key)
    multipliers = rounding.MULTIPLIERS[first:]
    return [ops.cast(_to_bfloat16(array, word, each), "bfloat16") for array, each in zip(arrays, multipliers, strict=False)]


def _step_array(
    rule: core.Rule, grad: Any, state: Sequence[Any], coefficients: Any, key: Any, grad_scale: Any
) -> tuple[Any, Sequence[Any]]:
    """Return the direction of a gradient, and the new state."""
    if keras.backend.backend() == "jax":
        return step_leaves(rule, [Leaf(grad, state, key)], lambda dtype: coefficients, grad_scale)[0]
    rounds = keras.backend.standardize_dtype(state[0].dtype) == "bfloat16"
    wide = tuple(ops.cast(array, "float32") for array in state) if rounds else tuple(state)
    direction, new = rule.make_update(ops)(grad if grad_scale is None else grad * grad_scale, wide, coefficients)
    stored = _round_arrays(new, key) if rounds else new
    return direction, [_hold(grad_scale, *pair) for pair in zip(stored, state, strict=True)]


@functools.cache
def compile_step(shape: tuple[int, ...], compute: Callable[..., list[Any]], *fixed: Any) -> Callable[..., list[Any]]:
    """Return `compute` with its first arguments fixed, compiled by XLA for variables of this shape."""
    # One function per shape, because TensorFlow warns of functions that it traces again and again.
    import tensorflow as tf

    function: Callable[..., list[Any]] = tf.function(partial(compute, *fixed), autograph=False, jit_compile=True)
    return function
