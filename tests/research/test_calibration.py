"""How often the true gradient lies within the posterior's intervals: closed forms of `docs/uncertainty.md`, by simulation."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
import pytest

import vsgd.numpy
from vsgd import core

LEVELS = (0.5, 0.9, 0.99)
ROOT = Path(__file__).parents[2]


class Found(NamedTuple):
    """Averages over elements and the last steps."""

    coverage: list[float]
    error: float  # of the mean, squared
    variance: float
    noise: float  # what the noise scale takes for the noise's variance
    squared_norm: float


def follow(optimizer: Any, drift: float, noise: float, steps: int, last: int) -> Found:
    """Show the optimizer gradients that walk at random, seen with noise, both variances given."""
    rng = np.random.default_rng(0)
    grad = np.zeros(optimizer.params[0].shape)
    rows = []
    for step in range(steps):
        grad = grad + math.sqrt(drift) * rng.standard_normal(grad.shape)
        optimizer.step([grad + math.sqrt(noise) * rng.standard_normal(grad.shape)])
        if step >= steps - last:
            known = optimizer.posterior(0)
            scale = optimizer.noise_scale(batch_size=1).overall
            error = known.mean - grad
            inside = [np.abs(error) <= NormalDist().inv_cdf((1 + level) / 2) * np.sqrt(known.variance) for level in LEVELS]
            means = (error**2).mean(), known.variance.mean(), scale.trace / grad.size, scale.squared_norm / grad.size
            rows.append([*(each.mean() for each in inside), *means])
    *coverage, error_squared, variance, trace, squared_norm = np.mean(rows, axis=0)
    return Found(coverage, error_squared, variance, trace, squared_norm)


def covered(ratio: float) -> list[float]:
    """The coverage where the error's variance is `ratio` times the posterior's."""
    normal = NormalDist()
    return [2 * normal.cdf(normal.inv_cdf((1 + level) / 2) / math.sqrt(ratio)) - 1 for level in LEVELS]


def frozen_vsgd(gain: float, innovation_variance: float, elements: int) -> vsgd.numpy.VSGD:
    """VSGD that has learned for so long that it learns no more."""
    optimizer = vsgd.numpy.VSGD([np.zeros(elements)], lr=0.0)
    rate = innovation_variance * core.compute_shape(optimizer.hyper)
    optimizer.state[0].update(step=10**12)
    optimizer.state[0]["b_g"][...] = gain * rate
    optimizer.state[0]["b_ghat"][...] = (1 - gain) * rate
    return optimizer


@pytest.mark.parametrize("gain", [1 / 4, 1 / 10])
@pytest.mark.parametrize("drift", [0.0, 0.003, 1.0])
def test_a_constant_gain_covers_what_the_closed_form_says(gain: float, drift: float) -> None:
    noise = 2.0
    optimizer = vsgd.numpy.ConstantVSGD([np.zeros(2000)], lr=0.0, variance_ratio=1 / gain - 1)
    found = follow(optimizer, drift, noise, steps=3000, last=300)
    error = ((1 - gain) ** 2 * drift + gain**2 * noise) / (gain * (2 - gain))
    innovation = (drift + 2 * gain * noise) / (gain * (2 - gain))
    assert found.error == pytest.approx(error, rel=0.02)
    assert found.variance == pytest.approx(gain * (1 - gain) * innovation, rel=0.02)
    assert found.noise == pytest.approx(noise + drift / (2 * gain), rel=0.02)
    np.testing.assert_allclose(found.coverage, covered(error / (gain * (1 - gain) * innovation)), atol=0.01)


def test_the_interval_is_honest_where_the_gain_is_the_kalman_filters() -> None:
    # Q / R = w^2 / (1 - w): with more drift it is too narrow, with less too wide.
    gain = 1 / 4
    narrowing = []
    for factor in (0.1, 1.0, 10.0):
        optimizer = vsgd.numpy.ConstantVSGD([np.zeros(2000)], lr=0.0, variance_ratio=1 / gain - 1)
        drift = factor * gain**2 / (1 - gain)
        narrowing.append(follow(optimizer, drift, 1.0, steps=3000, last=300).coverage)
    np.testing.assert_allclose(narrowing[1], LEVELS, atol=0.01)
    assert narrowing[0][1] > 0.94
    assert narrowing[2][1] < 0.75


@pytest.mark.parametrize("gain", [0.5, 0.1])
def test_a_vsgd_that_learned_a_gradient_that_stands_still_covers_too_much(gain: float) -> None:
    noise = 0.7
    optimizer = frozen_vsgd(gain, 2 * noise / (2 - gain), elements=5000)
    found = follow(optimizer, 0.0, noise, steps=300, last=200)
    assert found.noise == pytest.approx(noise, rel=0.001)
    np.testing.assert_allclose(found.coverage, covered(1 / (2 * (1 - gain))), atol=0.01)
    # Nothing but noise: of the mean's square nothing is left.
    assert abs(found.squared_norm) < 0.05 * found.error


@pytest.mark.parametrize("ratio", [3.0, 30.0])
def test_the_surprise_of_noise_alone_is_below_one_by_what_the_mean_adds(ratio: float) -> None:
    rng, gain = np.random.default_rng(5), 1 / (1 + ratio)
    optimizer = vsgd.numpy.ConstantVSGD([np.zeros(5000)], lr=0.0, variance_ratio=ratio)
    surprises = []
    for _ in range(1500):
        grad = rng.standard_normal(5000)
        surprises.append(optimizer.surprise([grad])[0])
        optimizer.step([grad])
    assert np.mean(surprises[-500:]) == pytest.approx(1 / (1 + gain * (1 - gain)), rel=0.01)


def test_where_the_model_holds_the_mean_field_covers_too_little() -> None:
    # The gradient drifts by just the variance that the state says: the posterior takes the mean before for exact.
    gain = 1 / 31
    optimizer = frozen_vsgd(gain, 1.0, elements=5000)
    found = follow(optimizer, gain, 1 - gain, steps=600, last=300)
    assert found.variance == pytest.approx(gain * (1 - gain))
    assert found.error == pytest.approx((1 - gain) / (2 - gain), rel=0.03)
    np.testing.assert_allclose(found.coverage, covered(1 / (gain * (2 - gain))), atol=0.01)
    assert found.coverage[1] < 0.35


def test_the_command_writes_its_table_and_figure(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    given = ("--steps", "50", "--elements", "20", "--output", str(tmp_path))
    command = [sys.executable, "-m", "experiments.uncertainty.calibration", *given]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "calibration.txt").read_text(encoding="utf-8") == result.stdout
    assert len(result.stdout.splitlines()) == 2 + 10
    assert (tmp_path / "calibration.png").stat().st_size > 10_000


def test_the_script_measures_coverage() -> None:
    pytest.importorskip("matplotlib")
    from experiments.uncertainty import calibration

    track = calibration.follow("Constant VSGD", calibration.REGIMES["fast drift"], steps=300, elements=2000)
    gain = 1 / 4
    ratio = ((1 - gain) ** 2 + gain**2) / (gain * (1 - gain) * (1 + 2 * gain))
    np.testing.assert_allclose(track.coverage[:, -100:].mean(axis=1), covered(ratio), atol=0.03)
