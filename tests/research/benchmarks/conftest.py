"""Import the benchmarks late, for a suite needs its framework."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest


@pytest.fixture(scope="module")
def module() -> Callable[[str], Any]:
    """Import a module of the benchmarks by its name."""
    return lambda name: importlib.import_module(f"benchmarks.{name}")
