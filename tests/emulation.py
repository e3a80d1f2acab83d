"""What a step rounds its state to, by NumPy in float32 and the definition: the noise is of seed, array, step and element."""

from __future__ import annotations

import numpy as np
from test_rounding import ROUND, WORD

from vsgd import core, rounding

#: What is refused, and the message.
BAD_STORAGE = [
    ({"state_dtype": "float16"}, "Invalid state_dtype value: 'float16' (state_dtype must be 'float32' or 'bfloat16')"),
    ({"seed": 0.5}, "Invalid seed value: 0.5 (seed must be an integer)"),
    ({"seed": None}, "Invalid seed value: None (seed must be an integer)"),
]


def words(seed: int, number: int, step: int, shape: tuple[int, ...]) -> np.ndarray:
    # Flat, for a number of no dimension does not stay int32 in NumPy 1, and warns where it wraps around.
    places = np.arange(np.prod(shape), dtype=np.int32)
    return WORD(places, np.int32(rounding.host_key(rounding.base_key(seed, number), step))).reshape(shape)


def round_all(values: list[np.ndarray], word: np.ndarray, first: int = 0) -> list[np.ndarray]:
    """The values rounded with the noise of an element's arrays, from the `first` on."""
    pairs = zip(values, rounding.MULTIPLIERS[first:], strict=False)
    return [ROUND(np.ravel(each), np.ravel(word), by).reshape(word.shape) for each, by in pairs]


def emulate_step(
    rule: core.Rule, step: int, grad: np.ndarray, state: list[np.ndarray], word: np.ndarray
) -> tuple[np.ndarray, list[np.ndarray]]:
    """One step's direction and new state, rounded."""
    coefficients = rule.coefficients(float(step), rule.hyperparameters())
    direction, new = rule.make_update(np)(grad, tuple(state), type(coefficients)(*map(np.float32, coefficients)))
    return direction, round_all(new, word)


def steps_apart(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """How many bfloat16 numbers apart two arrays of positive ones, or of equal signs, are."""
    # Adjacent bfloat16 numbers are adjacent as integers.
    return np.abs(one.view(np.int32) // 2**16 - other.view(np.int32) // 2**16)
