"""What a step rounds its state to, by NumPy in float32 and the definition: the noise is of seed, array, step and element."""

from __future__ import annotations

import numpy as np
from test_rounding import ROUND, WORD

from vsgd import core, rounding


def words(seed: int, number: int, step: int, shape: tuple[int, ...]) -> np.ndarray:
    places = np.arange(np.prod(shape), dtype=np.int32).reshape(shape)
    with np.errstate(over="ignore"):  # of NumPy's scalars
        return WORD(places, np.int32(rounding.host_key(rounding.base_key(seed, number), step)))


def round_all(values: list[np.ndarray], word: np.ndarray, first: int = 0) -> list[np.ndarray]:
    """The values rounded with the noise of an element's arrays, from the `first` on."""
    with np.errstate(over="ignore"):
        multipliers = rounding.MULTIPLIERS[first:]
        return [ROUND(np.asarray(each), word, by) for each, by in zip(values, multipliers, strict=False)]


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
