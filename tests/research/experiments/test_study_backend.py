"""Run the study's tests, which need Keras' JAX backend, whatever this process's backend is."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from drivers.processes import run_python
from research.scripts import need

need("jax", "keras", "mnist1d", "optax", "scipy", "sklearn")


def test_the_studys_tests_pass_on_jax() -> None:
    if os.environ["KERAS_BACKEND"] == "jax":
        pytest.skip("this process runs them")
    done = run_python("jax", "-m", "pytest", "-q", "-p", "no:cacheprovider", str(Path(__file__).with_name("test_study.py")))
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout
