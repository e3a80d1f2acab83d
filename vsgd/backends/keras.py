"""The update on the tensors of Keras' backend, whichever it is: in which dtype, of which parts, and how they are rounded."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import keras
from keras import ops

from vsgd import core, rounding

if keras.backend.backend() == "torch":
    import torch


class _Integers(rounding.Wrapping):
    """The integer namespace of Keras' backend, as `vsgd.rounding` wants one."""

    where = staticmethod(ops.where)

    @staticmethod
    def shift(i: Any, places: int) -> Any:
        return ops.right_shift(i, places) & (0xFFFFFFFF >> places)

    @staticmethod
    def bits(x: Any) -> Any:
        return _bitcast(x, "int32")

    @staticmethod
    def floats(i: Any) -> Any:
        return _bitcast(i, "float32")


def _bitcast(x: Any, dtype: str) -> Any:
    """The bits of an array as another dtype of the same size."""
    # Not `ops.view`, which Keras 3.10 lacks.
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        return tf.bitcast(x, dtype)
    return x.view(getattr(torch, dtype) if keras.backend.backend() == "torch" else dtype)


_make_key = rounding.make_key(_Integers)
_make_word = rounding.make_word(_Integers)
_to_bfloat16 = rounding.make_round(_Integers)


def _iota(shape: Sequence[int], dimension: int) -> Any:
    """The places along a dimension, in a shape that broadcasts."""
    return ops.reshape(ops.arange(shape[dimension], dtype="int32"), (shape[dimension], *[1] * (len(shape) - dimension - 1)))


def state_dtype(variable: Any, wanted: str) -> str:
    """The dtype of a variable's state.

    Half precision to the nearest holds neither b_g (it falls to 1e-8) nor its small changes, so no state follows it.

    Args:
        variable: the variable; float64 and complex ones have state of their own dtype.
        wanted: "float32" or "bfloat16".
    """
    # Of the value: JAX without x64 has float32 values in float64 variables.
    dtype: str = keras.backend.standardize_dtype(ops.convert_to_tensor(variable).dtype)
    return dtype if dtype in ("float64", "complex64", "complex128") else wanted


def arithmetic_dtype(stored: str) -> str:
    """The dtype to compute in, by that of the state."""
    return "float32" if stored == "bfloat16" else stored


def real_dtype(dtype: str) -> str:
    """The dtype of a number's parts."""
    return {"bfloat16": "float32", "complex64": "float32", "complex128": "float64"}.get(dtype, dtype)


def parts(tensor: Any) -> tuple[Any, ...]:
    """The real tensors that are updated: a complex one is two."""
    is_complex = keras.backend.standardize_dtype(tensor.dtype).startswith("complex")
    return (ops.real(tensor), ops.imag(tensor)) if is_complex else (tensor,)


def whole(tensors: tuple[Any, ...]) -> Any:
    """The tensor of these parts."""
    if len(tensors) == 1:
        return tensors[0]
    dtype = {"float32": "complex64", "float64": "complex128"}[keras.backend.standardize_dtype(tensors[0].dtype)]
    real, imaginary = (ops.cast(part, dtype) for part in tensors)
    return real + imaginary * 1j


def new_values(rule: core.Rule, values: list[Any], lr: Any, coefficients: Any, decay: Any = 1.0) -> list[Any]:
    """The new variable and its new state.

    Args:
        rule: the variant to run.
        values: the variable, its gradient and its state, all of one dtype.
        lr: step size.
        coefficients: the rule's, of this step.
        decay: by what the variable is multiplied before its step.
    """
    update = rule.make_update(ops)
    new = []
    for param, grad, *state in zip(*map(parts, values), strict=True):
        direction, new_state = update(grad, tuple(state), coefficients)
        new.append((core.descend(param, direction, lr, decay), *new_state))
    return [whole(tensors) for tensors in zip(*new, strict=True)]


def new_rounded_values(
    rule: core.Rule, of_param: bool, values: list[Any], lr: Any, coefficients: Any, decay: Any, base: Any, step: Any
) -> list[Any]:
    """The same, computed in float32, with bfloat16 rounded stochastically.

    Args:
        rule: the variant to run.
        of_param: whether the variable is rounded so; state is, where it is stored in bfloat16.
        values: the variable, its gradient and its state.
        lr: step size.
        coefficients: the rule's, of this step.
        decay: by what the variable is multiplied before its step.
        base: the variable's `rounding.base_key`, an int32 tensor.
        step: the count of this step, an int32 tensor.
    """
    stored = keras.backend.standardize_dtype(values[-1].dtype)
    param, *state = new_values(rule, [ops.cast(value, "float32") for value in values], lr, coefficients, decay)
    word = _make_word(rounding.places(param.shape, _iota), _make_key(base, step))

    def rounded(value: Any, place: int) -> Any:
        return ops.cast(_to_bfloat16(value, word, rounding.MULTIPLIERS[place]), "bfloat16")

    if stored == "bfloat16":
        state = [rounded(array, place) for place, array in enumerate(state)]
    return [rounded(param, len(state)) if of_param else param, *state]


def is_better_compiled(variable: Any) -> bool:
    """Whether each operation would otherwise make an array in memory: on the CPU Keras has TensorFlow compile nothing."""
    return keras.backend.backend() == "tensorflow" and "CPU" in variable.device


@functools.cache
def compiled(shape: tuple[int, ...], update: Callable[..., list[Any]], *fixed: Any) -> Callable[..., list[Any]]:
    """`update` with its first arguments, compiled by XLA for variables of this shape."""
    # One for each shape, for TensorFlow warns of functions that it traces again and again.
    import tensorflow as tf

    function: Callable[..., list[Any]] = tf.function(partial(update, *fixed), autograph=False, jit_compile=True)
    return function
