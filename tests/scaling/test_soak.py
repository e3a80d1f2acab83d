"""20,000 steps of each engine: memory stays flat, nothing compiles anew, and no engine drifts from the others."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
from drivers import AVAILABLE, HAS_OPTAX, HAS_TORCH, start

STEPS, SETTLED = 20_000, 2_000
SIZE, LR = 8, 0.01
HAS_KERAS = find_spec("keras") is not None and "KERAS_BACKEND" in os.environ
# The eager transformation is the jitted one's function, and takes a millisecond a step.
SOAKED = [name for name in AVAILABLE if name != "optax-eager"] + (["keras"] if HAS_KERAS else [])

# What no environment with one framework alone has.
MIXED = ("torch-fused",)

_rng = np.random.default_rng(0)
START, CURVATURE = _rng.standard_normal(SIZE), np.geomspace(0.1, 10, SIZE)
NOISE = _rng.standard_normal((997, SIZE))


# Ten times how far two runs of NumPy's end apart when each gradient of one is the next larger number: 7e-15 and 4e-6.
BOUND = {"float64": 7e-14, "float32": 4e-5}


def floatx_of(name: str, precision: str) -> AbstractContextManager[None]:
    if name != "keras":
        return nullcontext()
    from adapters.keras.keras_problems import floatx

    return floatx(precision)


def live() -> dict[str, int]:
    """What is held in memory, but for what Python itself holds."""
    gc.collect()
    counts = {}
    if HAS_TORCH:
        import torch

        counts["torch tensors"] = sum(issubclass(type(each), torch.Tensor) for each in gc.get_objects())
    if HAS_OPTAX:
        import jax

        counts["jax arrays"] = len(jax.live_arrays())
    return counts


def compiled() -> dict[str, int]:
    """How many functions were compiled so far."""
    counts = {}
    if HAS_OPTAX:
        from drivers.optax_driver import make_solver

        counts["optax"] = make_solver("VSGD", True, lr=LR)[1]._cache_size()
    if "torch-fused" in AVAILABLE:
        from vsgd import core
        from vsgd.backends import numba as numba_cpu

        kernels = [numba_cpu._compile(core.VSGD, False, parallel=parallel) for parallel in (False, True)]
        counts["numba"] = sum(len(each.signatures) for each in (*kernels, numba_cpu._compile_counter()))
    if HAS_TORCH:
        from torch._dynamo.utils import counters

        counts["dynamo"] = sum(counters["stats"].values())
    return counts


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def trajectory(step: Any, read: Any, dtype: Any, begin: np.ndarray) -> Iterator[np.ndarray]:
    """The parameter after `SETTLED` steps and at the end, on a quadratic whose gradients have noise drawn before.

    The gradients are of a parameter that plain descent moves, so that every engine sees the same ones.
    """
    target = begin.copy()
    for t in range(1, STEPS + 1):
        grad = CURVATURE * target + NOISE[t % len(NOISE)]
        target -= 1e-3 * grad
        step([grad.astype(dtype)])
        if t in (SETTLED, STEPS):
            yield read()[0]


def soak(name: str, dtype: Any, param: np.ndarray) -> dict[str, np.ndarray]:
    step, read = start(name, "VSGD", [param.astype(dtype)], lr=LR)
    states = trajectory(step, read, dtype, START)
    next(states)
    before = live(), compiled(), resident()
    # The fused kernels are found where they are counted.
    assert name != "torch-fused" or before[1]["numba"] > 0
    end = next(states)
    assert (live(), compiled()) == before[:2]
    # A float64 leaked at each step would be 0.14 MB; what Python's and the libraries' allocators keep is less than 8 MB.
    assert resident() - before[2] < 8e6
    return end


def strayed(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> float:
    """The largest difference of the parameter and the state, relative to each array's largest value."""
    return max(
        float(np.abs(one[name].astype(np.float64) - other[name]).max() / np.abs(other[name]).max())
        for name in ("param", "mu_g", "b_g", "b_ghat")
    )


@pytest.fixture(scope="module")
def reference() -> dict[str, np.ndarray]:
    return soak("numpy", np.float64, START)


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads the memory of a process from Linux's /proc")
@pytest.mark.parametrize("dtype", [np.float64, np.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("name", [pytest.param(name, marks=[] if name in MIXED else pytest.mark.slow) for name in SOAKED])
def test_20000_steps_neither_leak_nor_compile_nor_drift(
    name: str, dtype: Any, reference: dict[str, np.ndarray], agreed: Callable[..., None]
) -> None:
    precision = np.dtype(dtype).name
    with floatx_of(name, precision):
        end = soak(name, dtype, START)
    where = f"keras-{os.environ['KERAS_BACKEND']}" if name == "keras" else name
    agreed(f"20,000 steps, {precision}", where, strayed(end, reference), BOUND[precision])
