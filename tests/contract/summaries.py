"""Checks of the monitor's summary, shared by the tests of all adapters."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from vsgd.monitor import Summary


def check(found: Summary, posteriors: list[Any], scale: Any, surprise: float | None) -> None:
    """Assert that a summary agrees with the adapter's posterior, noise scale and surprise."""
    gains, snrs = (np.concatenate([np.ravel(getattr(each, field)) for each in posteriors]) for field in ("gain", "snr"))
    if np.iscomplexobj(gains):
        gains, snrs = (each.view(each.real.dtype) for each in (gains, snrs))
    assert found.gain == pytest.approx(np.median(gains), rel=1e-5)
    assert found.momentum == pytest.approx(1 - np.median(gains), rel=1e-5)
    np.testing.assert_allclose((found.snr_10, found.snr_50, found.snr_90), np.quantile(snrs, (0.1, 0.5, 0.9)), rtol=1e-5)
    assert found.noise_trace == pytest.approx(float(scale.trace), rel=1e-5)
    assert found.noise_squared_norm == pytest.approx(float(scale.squared_norm), rel=1e-4, abs=1e-5)
    assert found.surprise == (None if surprise is None else pytest.approx(float(surprise), rel=1e-5))
