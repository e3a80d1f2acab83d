"""Drivers: every adapter and engine behind one interface, for the tests that apply to all of them.

To add an adapter or engine to the contract, add an entry to `DRIVERS`.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np
import pytest

from drivers.base import Read


class Spec(NamedTuple):
    """One driver.

    Attributes:
        cls: its class, as "module:name".
        needs: the packages that it requires.
        options: the options that select the engine.
        lacks: the promises that the adapter does not make, and why.
    """

    cls: str
    needs: tuple[str, ...]
    options: dict[str, Any]
    lacks: dict[str, str]


_NO_BFLOAT16 = {"bfloat16": "the adapter has no bfloat16 state"}
_SLOW = {"many steps": "each operation is dispatched from Python"}
_ONE_COUNT = {"counts of their own": "the framework counts steps once for all parameters"}
_TORCH, _OPTAX, _KERAS = "torch_driver:TorchDriver", "optax_driver:OptaxDriver", "keras_driver:KerasDriver"
_MLX = {
    **_NO_BFLOAT16,
    **_ONE_COUNT,
    "complex64": "the adapter refuses complex numbers",
    "noise scale": "the adapter has posteriors only",
}
DRIVERS = {
    "numpy": Spec("numpy_driver:NumpyDriver", (), {}, {**_NO_BFLOAT16, "bfloat16 parameters": "NumPy has no bfloat16"}),
    "torch-loop": Spec(_TORCH, ("torch",), {"foreach": False, "fused": False}, {}),
    "torch-foreach": Spec(_TORCH, ("torch",), {"foreach": True}, {}),
    "torch-fused": Spec(_TORCH, ("torch", "numba"), {"fused": True}, {}),
    "optax-eager": Spec(_OPTAX, ("jax", "optax"), {"jit": False}, {**_SLOW, **_ONE_COUNT}),
    "optax-jit": Spec(_OPTAX, ("jax", "optax"), {"jit": True}, _ONE_COUNT),
    "optax-jit-numba": Spec(_OPTAX, ("jax", "optax", "numba"), {"jit": True, "numba": True}, _ONE_COUNT),
    "keras": Spec(_KERAS, ("keras",), {"jit": False}, {**_SLOW, **_ONE_COUNT}),
    "keras-jit": Spec(_KERAS, ("keras",), {"jit": True}, _ONE_COUNT),
    "mlx": Spec("mlx_driver:MlxDriver", ("mlx",), {}, _MLX),
}


def _list_missing(spec: Spec) -> list[str]:
    return [name for name in spec.needs if find_spec(name) is None or (name == "keras" and "KERAS_BACKEND" not in os.environ)]


#: The drivers that need no process-wide setting, such as Keras' default float type.
ENGINES = [name for name in DRIVERS if not name.startswith("keras")]
#: The engines that can run here.
AVAILABLE = [name for name in ENGINES if not _list_missing(DRIVERS[name])]
HAS_TORCH, HAS_OPTAX, HAS_MLX = (any(name.startswith(each) for name in AVAILABLE) for each in ("torch", "optax", "mlx"))
HAS_JAX = find_spec("jax") is not None
HAS_NUMBA = "torch-fused" in AVAILABLE
HAS_KERAS = not _list_missing(DRIVERS["keras"])
_HERE = {"numpy": True, "torch": HAS_TORCH, "optax": HAS_OPTAX, "keras": HAS_KERAS, "mlx": HAS_MLX}
#: The adapters that can run here, by the names of their modules.
ADAPTERS = [name for name, here in _HERE.items() if here]


def list_gaps() -> Iterator[str]:
    """Yield a line for each driver, with the packages that are not installed and the promises that the driver lacks."""
    for name, spec in DRIVERS.items():
        gaps = [f"{each} is not installed" for each in _list_missing(spec)]
        gaps += [f"no {each}, for {why}" for each, why in spec.lacks.items()]
        yield f"{name:<14} {'; '.join(gaps) or 'everything'}"


def make_driver(name: str, *arguments: Any, promise: str | None = None, **options: Any) -> Any:
    """Make a driver, or skip the test and name what is missing.

    Args:
        name: a key of `DRIVERS`.
        *arguments: the driver's arguments.
        promise: the promise that the test checks, if a driver may lack it.
        **options: the adapter's options.
    """
    spec = DRIVERS[name]
    missing = _list_missing(spec)
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")
    if promise in spec.lacks:
        pytest.skip(f"{name}: {spec.lacks[promise]}")
    module, _, cls = spec.cls.partition(":")
    return getattr(importlib.import_module(f"drivers.{module}"), cls)(*arguments, **spec.options, **options)


def run(name: str, kind: str, params: Sequence[np.ndarray], grads: Sequence[Sequence[Any]], **options: Any) -> Read:
    """Return the parameters and state of a driver after a step with each of the gradients."""
    driver = make_driver(name, kind, params, **options)
    for each in grads:
        driver.step(each)
    read: Read = driver.read()
    return read


def assert_equal(ours: Read, theirs: Read, rtol: float = 0.0) -> None:
    """Assert that two drivers hold the same values, up to `rtol` times the larger of 1 and the value."""
    for one, other in zip(ours, theirs, strict=True):
        assert one.keys() == other.keys()
        for name in other:
            # NumPy 1 has no common dtype of bfloat16 and its own dtypes.
            pair = (each.astype(np.float32) if each.dtype.name == "bfloat16" else each for each in (one[name], other[name]))
            np.testing.assert_allclose(*pair, rtol=rtol, atol=rtol, err_msg=name)


def start(name: str, *arguments: Any, **options: Any) -> tuple[Any, Any]:
    """Return `step` and `read` of a driver."""
    driver = make_driver(name, *arguments, **options)
    return driver.step, driver.read
