"""Emulate stochastic rounding in NumPy float32, by its definition: the noise depends on seed, array, step and element."""

from __future__ import annotations

from typing import Any

import numpy as np

from vsgd import core, rounding
from vsgd.ops import BitOps


class Integers(BitOps):
    """NumPy's integer operations."""

    def where(self, condition: np.ndarray, x: Any, y: Any) -> np.ndarray:
        return np.where(condition, x, y)

    def view_as_int32(self, x: np.ndarray) -> np.ndarray:
        return x.view(np.int32)

    def view_as_float32(self, i: np.ndarray) -> np.ndarray:
        return i.view(np.float32)


OPS = Integers()
WORD, ROUND = rounding.make_word(OPS), rounding.make_round(OPS)


#: Rejected options, and the expected message.
BAD_STORAGE = [
    ({"state_dtype": "float16"}, "Invalid state_dtype value: 'float16' (state_dtype must be 'float32' or 'bfloat16')"),
    ({"seed": 0.5}, "Invalid seed value: 0.5 (seed must be an integer)"),
    ({"seed": None}, "Invalid seed value: None (seed must be an integer)"),
]


def words(seed: int, number: int, step: int, shape: tuple[int, ...]) -> np.ndarray:
    # Flat, because in NumPy 1 a zero-dimensional number does not stay int32 and warns when it wraps around.
    places = np.arange(np.prod(shape), dtype=np.int32)
    return WORD(places, np.int32(rounding.host_key(rounding.base_key(seed, number), step))).reshape(shape)


def round_all(values: list[np.ndarray], word: np.ndarray, first: int = 0) -> list[np.ndarray]:
    """Round values with the noise of an element's arrays, starting from array number `first`."""
    pairs = zip(values, rounding.MULTIPLIERS[first:], strict=False)
    return [ROUND(np.ravel(each), np.ravel(word), by).reshape(word.shape) for each, by in pairs]


def emulate_step(
    rule: core.Rule, step: int, grad: np.ndarray, state: list[np.ndarray], word: np.ndarray
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Return one step's direction and the new, rounded state."""
    coefficients = rule.coefficients(float(step), rule.hyperparameters())
    direction, new = rule.make_update(np)(grad, tuple(state), type(coefficients)(*map(np.float32, coefficients)))
    return direction, round_all(new, word)


def steps_apart(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Return how many bfloat16 numbers apart two arrays of positive numbers, or of equal signs, are."""
    # Adjacent bfloat16 numbers are adjacent as integers.
    return np.abs(one.view(np.int32) // 2**16 - other.view(np.int32) // 2**16)


def round_to_nearest(array: np.ndarray) -> np.ndarray:
    """Round float32 to the nearest bfloat16, half to even, and return it as float32."""
    bits = np.ascontiguousarray(array, np.float32).view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return rounded.astype(np.uint32).view(np.float32).reshape(np.shape(array))
