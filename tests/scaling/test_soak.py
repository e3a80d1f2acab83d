"""Test 20,000 steps of each engine: memory is constant, nothing recompiles, and no engine drifts from NumPy in float64."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from importlib.util import find_spec

import numpy as np
import pytest
from drivers import AVAILABLE, HAS_OPTAX, HAS_TORCH, make_driver
from drivers.base import Read
from drivers.trajectories import deviation

STEPS, SETTLED = 20_000, 2_000
SIZE, LR = 8, 0.01
HAS_KERAS = find_spec("keras") is not None and "KERAS_BACKEND" in os.environ
# Eager optax runs the same function as jitted optax, and takes a millisecond a step.
SOAKED = [name for name in AVAILABLE if name != "optax-eager"] + (["keras"] if HAS_KERAS else [])
#: Slow, except for torch-fused, which no environment with a single framework has.
ENGINES = [pytest.param(name, marks=[] if name == "torch-fused" else pytest.mark.slow) for name in SOAKED]

_rng = np.random.default_rng(0)
START, CURVATURE = _rng.standard_normal(SIZE), np.geomspace(0.1, 10, SIZE)
NOISE = _rng.standard_normal((997, SIZE))


def held() -> dict[str, int]:
    """Return the objects in memory, except Python's own, and the number of functions compiled so far."""
    gc.collect()
    counts = {}
    if HAS_TORCH:
        import torch
        from torch._dynamo.utils import counters

        counts["torch tensors"] = sum(issubclass(type(each), torch.Tensor) for each in gc.get_objects())
        counts["dynamo"] = sum(counters["stats"].values())
    if HAS_OPTAX:
        import jax
        from drivers.optax_driver import make_solver

        counts["jax arrays"] = len(jax.live_arrays())
        counts["optax"] = make_solver("VSGD", True, lr=LR)[1]._cache_size()
    if "torch-fused" in AVAILABLE:
        from vsgd import core
        from vsgd.backends import numba as numba_cpu

        kernels = [numba_cpu._compile(core.VSGD, False, parallel=parallel) for parallel in (False, True)]
        counts["numba"] = sum(len(each.signatures) for each in (*kernels, numba_cpu._compile_counter()))
    return counts


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def soak(name: str, dtype: str) -> Read:
    """Step on a quadratic with noise drawn beforehand, and return the driver's final values.

    The gradients belong to a parameter that plain descent moves, so that every engine gets the same gradients.
    """
    driver, target = make_driver(name, "VSGD", [START.astype(dtype)], lr=LR), START.copy()
    for t in range(1, STEPS + 1):
        grad = CURVATURE * target + NOISE[t % len(NOISE)]
        target -= 1e-3 * grad
        driver.step([grad.astype(dtype)])
        if t == SETTLED:
            before = held(), resident()
    # The count includes the fused kernels.
    assert name != "torch-fused" or before[0]["numba"] > 0
    assert held() == before[0]
    # A float64 leaked at each step would be 0.14 MB; the allocators of Python and the libraries keep less than 8 MB.
    assert resident() - before[1] < 8e6
    return driver.read()


@pytest.fixture(scope="module")
def reference() -> Read:
    return soak("numpy", "float64")


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads the memory of a process from Linux's /proc")
@pytest.mark.parametrize("name", ENGINES)
def test_20000_steps_neither_leak_nor_compile_nor_drift(name: str, reference: Read, agreed: Callable[..., None]) -> None:
    where = f"keras-{os.environ['KERAS_BACKEND']}" if name == "keras" else name
    # The bound is ten times the final difference of two NumPy runs, in one of which each gradient is the next larger number.
    agreed("20,000 steps, float32", where, deviation(soak(name, "float32"), reference, axis=None).error, 4e-5)
