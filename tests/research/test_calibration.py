"""Test by simulation how often the posterior's intervals contain the true gradient: closed forms of `docs/uncertainty.md`."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
import pytest
from research.scripts import run

import vsgd.numpy
from vsgd import core

pytest.importorskip("matplotlib")

from experiments.uncertainty import calibration


class Found(NamedTuple):
    """Averages over elements, and, except for the noise scale, over the last steps."""

    coverage: np.ndarray
    error_ratio: float  # the mean's squared error divided by the posterior's variance
    noise_variance: float
    trace: float  # the noise scale's estimate of the noise's variance
    squared_norm: float


@pytest.fixture
def follow(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Found]:
    """Return a function that feeds an optimizer a random walk of gradients with noise, where both variances are given."""

    def follow(make: Callable[..., Any], drift: float, noise: float, steps: int, last: int) -> Found:
        made: list[Any] = []
        monkeypatch.setitem(calibration.OPTIMIZERS, "made", lambda params, lr: made.append(make(params, lr=lr)) or made[0])
        regime = calibration.Regime(lr=0.0, drift=math.sqrt(drift), noise=lambda step: math.sqrt(noise))
        track = calibration.follow("made", regime, steps, elements=5000)
        coverage, noise_ratio, error_ratio, _ = (column[..., -last:].mean(axis=-1) for column in track)
        scale = made[0].noise_scale(batch_size=1).overall
        return Found(coverage, error_ratio, noise_ratio * noise, scale.trace / 5000, scale.squared_norm / 5000)

    return follow


def covered(ratio: float) -> list[float]:
    """Return the coverage if the error's variance is `ratio` times the posterior's."""
    normal = NormalDist()
    return [2 * normal.cdf(normal.inv_cdf((1 + level) / 2) / math.sqrt(ratio)) - 1 for level in calibration.LEVELS]


def make_frozen(gain: float, innovation_variance: float) -> Callable[..., vsgd.numpy.VSGD]:
    """Return a maker of VSGD that has learned for so long that it no longer learns."""

    def make(params: list[np.ndarray], lr: float) -> vsgd.numpy.VSGD:
        optimizer = vsgd.numpy.VSGD(params, lr=lr)
        rate = innovation_variance * core.compute_shape(optimizer.hyper)
        optimizer.state[0].update(step=10**12)
        optimizer.state[0]["b_g"][...] = gain * rate
        optimizer.state[0]["b_ghat"][...] = (1 - gain) * rate
        return optimizer

    return make


@pytest.mark.parametrize("gain", [1 / 4, 1 / 10])
# The last drift is Kalman's, w^2 / (1 - w) of the noise at a gain of w = 1 / 4, where the interval is honest.
@pytest.mark.parametrize("drift", [0.0, 0.003, 1.0, 1 / 6])
def test_a_constant_gain_covers_what_the_closed_form_says(follow: Callable[..., Found], gain: float, drift: float) -> None:
    noise = 2.0
    make = functools.partial(vsgd.numpy.ConstantVSGD, variance_ratio=1 / gain - 1)
    found = follow(make, drift, noise, steps=3000, last=300)
    error = ((1 - gain) ** 2 * drift + gain**2 * noise) / (gain * (2 - gain))
    innovation = (drift + 2 * gain * noise) / (gain * (2 - gain))
    ratio = error / (gain * (1 - gain) * innovation)
    assert found.error_ratio == pytest.approx(ratio, rel=0.02)
    assert found.noise_variance == pytest.approx((1 - gain) * innovation, rel=0.02)
    assert found.trace == pytest.approx(noise + drift / (2 * gain), rel=0.02)
    np.testing.assert_allclose(found.coverage, covered(ratio), atol=0.01)
    if gain == 1 / 4 and drift == 1 / 6:
        assert ratio == pytest.approx(1)


@pytest.mark.parametrize("gain", [0.5, 0.1])
def test_a_vsgd_that_learned_a_gradient_that_stands_still_covers_too_much(follow: Callable[..., Found], gain: float) -> None:
    noise = 0.7
    found = follow(make_frozen(gain, 2 * noise / (2 - gain)), 0.0, noise, steps=300, last=200)
    assert found.trace == pytest.approx(noise, rel=0.001)
    np.testing.assert_allclose(found.coverage, covered(1 / (2 * (1 - gain))), atol=0.01)


def test_where_the_model_holds_the_mean_field_covers_too_little(follow: Callable[..., Found]) -> None:
    # The gradient drifts by exactly the state's variance, but the posterior treats the previous mean as exact.
    gain = 1 / 31
    found = follow(make_frozen(gain, 1.0), gain, 1 - gain, steps=600, last=300)
    assert found.noise_variance == pytest.approx(1 - gain)
    assert found.error_ratio == pytest.approx(1 / (gain * (2 - gain)), rel=0.03)
    np.testing.assert_allclose(found.coverage, covered(1 / (gain * (2 - gain))), atol=0.01)
    assert found.coverage[1] < 0.35


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


def test_the_command_writes_its_table_and_figure(tmp_path: Path) -> None:
    given = ("--steps", "50", "--elements", "20", "--output", str(tmp_path))
    printed = run("-m", "experiments.uncertainty.calibration", *given)
    assert (tmp_path / "calibration.txt").read_text(encoding="utf-8") == printed
    assert len(printed.splitlines()) == 2 + 10
    assert (tmp_path / "calibration.svg").stat().st_size > 10_000
