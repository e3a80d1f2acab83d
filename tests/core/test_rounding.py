"""Test stochastic rounding: the neighbours, the mean and the noise."""

from __future__ import annotations

import math

import numpy as np
import pytest
from drivers.emulation import ROUND, WORD

from vsgd import rounding

COUNT = 2**16


def words(step: int = 1, seed: int = 0, number: int = 0, count: int = COUNT) -> np.ndarray:
    return WORD(np.arange(count, dtype=np.int32), np.int32(rounding.host_key(rounding.base_key(seed, number), step)))


def noise(slot: int, **where: int) -> np.ndarray:
    """Return, by bisection, the fraction of the way to its neighbour below which a value is rounded down."""
    drawn, lowest = words(**where), np.zeros(COUNT, np.int32)
    for bit in reversed(range(16)):
        rest = lowest + (1 << bit)
        rounded_up = ROUND((0x3F800000 + rest).astype(np.int32).view(np.float32), drawn, rounding.MULTIPLIERS[slot]) > 1
        lowest = np.where(rounded_up, lowest, rest)
    return lowest / 2**16


def neighbours(value: float) -> tuple[float, float]:
    """Return the bfloat16 numbers at and above a positive float32, by their definition: 8 significant binary digits."""
    fraction, exponent = math.frexp(value)
    below = math.floor(fraction * 256)
    return math.ldexp(below / 256, exponent), math.ldexp((below + 1) / 256, exponent)


@pytest.mark.parametrize("slot", range(len(rounding.MULTIPLIERS)))
@pytest.mark.parametrize("value", [1.001, -1.001, 3.14159, 1e-8, 2.7e-5, -6.6e20, 1.99999])
def test_a_value_goes_to_a_neighbour_and_keeps_its_mean(slot: int, value: float) -> None:
    given = np.full(COUNT, value, np.float32)
    rounded = ROUND(given, words(), rounding.MULTIPLIERS[slot])
    below, above = neighbours(abs(float(given[0])))
    assert set(np.abs(rounded).astype(float)) == {below, above}
    share = (abs(float(given[0])) - below) / (above - below)
    # The tolerance is five standard deviations of the mean of COUNT draws.
    assert np.mean(np.abs(rounded) == above) == pytest.approx(share, abs=5 * math.sqrt(share * (1 - share) / COUNT))


def test_what_bfloat16_holds_stays_and_so_does_every_quiet_nan() -> None:
    for value in (0.0, 1.0, -1.5, 2.0**-120, 255.0, np.inf, -np.inf):
        given = np.full(COUNT, value, np.float32)
        assert np.array_equal(ROUND(given, words(), 1).view(np.int32), given.view(np.int32)), value
    for bits in (0x7FC00000, 0x7FFFFFFF, -0x400000, -1):
        assert np.isnan(ROUND(np.full(COUNT, bits, np.int32).view(np.float32), words(), 1)).all(), bits


@pytest.mark.parametrize("slot", range(len(rounding.MULTIPLIERS)))
@pytest.mark.parametrize("where", [{"step": 1}, {"step": 2}, {"step": 100_000}, {"seed": 7}, {"seed": -1, "number": 300}])
def test_noise_is_uniform(slot: int, where: dict[str, int]) -> None:
    counts = np.bincount((noise(slot, **where) * 256).astype(int), minlength=256)
    expected = COUNT / 256
    chi2 = ((counts - expected) ** 2 / expected).sum()
    # 255 degrees of freedom: mean 255, standard deviation 22.6. The noise is neither lumpy nor, like a permutation, too even.
    assert 255 - 6 * 22.6 < chi2 < 255 + 6 * 22.6


def test_noise_of_other_arrays_steps_seeds_and_parameters_is_unrelated() -> None:
    others = [{"step": 2}, {"step": 1 + 2**15}, {"seed": 1}, {"number": 1}]
    every = [*map(noise, range(len(rounding.MULTIPLIERS))), *(noise(0, **other) for other in others)]
    assert np.abs(np.corrcoef(every) - np.eye(len(every))).max() < 5 / math.sqrt(COUNT)


@pytest.mark.parametrize("lag", [1, 2, 3, 8, 64, 256, 1024])
def test_neighbouring_elements_have_unrelated_noise(lag: int) -> None:
    values = noise(0)
    assert abs(np.corrcoef(values[:-lag], values[lag:])[0, 1]) < 5 / math.sqrt(COUNT - lag)


def test_an_element_s_noise_over_steps_is_uniform_and_unrelated() -> None:
    key = [np.int32(rounding.host_key(rounding.base_key(0, 0), step)) for step in range(1, COUNT + 1)]
    values = ((WORD(np.int32(5), np.array(key)) >> 16) & 0xFFFF) / 2**16
    assert values.mean() == pytest.approx(0.5, abs=5 / math.sqrt(12 * COUNT))
    assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 5 / math.sqrt(COUNT)


def test_a_change_of_one_bit_changes_half_of_the_bits() -> None:
    index = np.arange(4096, dtype=np.int32)
    for bit in range(16):
        changed = WORD(index, np.int32(0)) ^ WORD(index ^ np.int32(1 << bit), np.int32(0))
        flips = np.unpackbits(changed.view(np.uint8)).mean()
        # A good hash has a bias below 1% here; five standard deviations of the mean of 131072 bits are 0.7%.
        assert flips == pytest.approx(0.5, abs=0.017)
