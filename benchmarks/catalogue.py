"""Load suites by name; a suite imports its framework."""

from __future__ import annotations

import importlib
import os

from benchmarks.suite import Suite

_KERAS_BACKENDS = ("tensorflow", "jax", "torch")

#: The names of all suites.
SUITES = (
    "torch",
    "optax",
    "optax-inside",
    *(f"keras-{task}-{backend}" for task in ("apply", "train") for backend in _KERAS_BACKENDS),
)


def load_suite(name: str) -> Suite:
    """Import a suite's module and framework.

    Args:
        name: one of `SUITES`; the name of a Keras suite also selects the process's Keras backend.

    Returns:
        The suite.
    """
    framework, *rest = name.split("-")
    if framework != "keras":
        return importlib.import_module(f"benchmarks.{framework}_suite").SUITES[name]
    task, backend = rest
    os.environ["KERAS_BACKEND"] = backend
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    return importlib.import_module("benchmarks.keras_suite").SUITES[task]
