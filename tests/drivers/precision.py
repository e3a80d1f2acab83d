"""Switch JAX's 64-bit numbers on or off."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import pytest


def x64(enable: bool = True) -> AbstractContextManager[Any]:
    """Return a context in which JAX has 64-bit numbers, or does not have them, which is its default."""
    jax = pytest.importorskip("jax")
    if hasattr(jax, "enable_x64"):
        return jax.enable_x64(enable)
    from jax.experimental import enable_x64  # in older versions

    return enable_x64(enable)
