"""Run Keras' own optimizer tests with VSGD in place of Adam, on each backend, in separate processes."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
from drivers.processes import run_python

pytest.importorskip("keras")


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "number"), [("jax", 24), ("tensorflow", 28), ("torch", 20)])
def test_keras_own_suites_pass(backend: str, number: int) -> None:
    if find_spec(backend) is None:
        pytest.skip(f"{backend} is not installed")
    ended = run_python(backend, str(Path(__file__).with_name("keras_suites.py")))
    assert ended.returncode == 0, ended.stdout
    # The number in Keras 3.15; older versions have fewer.
    assert f"Ran {number} tests" in ended.stdout
