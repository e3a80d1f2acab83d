"""Run one of optax' own test modules with our optimizers in place of its own: `python optax_suites.py MODULE CLASS`.

The script prints how many tests ran, and exits with 1 if one failed or was skipped. Run it in a separate process, because it
adds our names to optax.
"""

from __future__ import annotations

import importlib
import sys
import unittest
from typing import Any
from unittest import mock

import optax
import optax.contrib
from absl.testing import parameterized
from optax._src import alias

import vsgd.optax

OURS = ("vsgd", "constant_vsgd")
LEARNING_RATE = {"learning_rate": 1e-2}
UNWRAPPED = {"wrapper_name": None, "wrapper_kwargs": None}

#: For each module, the parameters of its tests.
CASES: dict[str, Any] = {
    "optax.contrib._common_test": [{"opt_name": name, "opt_kwargs": LEARNING_RATE, **UNWRAPPED} for name in OURS],
    "optax._src.alias_test": [{"opt_name": name, "opt_kwargs": LEARNING_RATE} for name in OURS],
    "optax._src.float64_test": [
        *((name, getattr(vsgd.optax, name), LEARNING_RATE) for name in OURS),
        *((f"scale_by_{name}", getattr(vsgd.optax, f"scale_by_{name}"), {}) for name in OURS),
    ],
}


def load(name: str) -> Any:
    """Import the module so that tests of each of its optimizers run for each of ours, and other parameterized tests do not."""
    product, named_parameters = parameterized.product, parameterized.named_parameters
    cases = CASES[name]

    def our_product(*sequences: Any, **grid: Any) -> Any:
        return product(cases, **grid) if sequences else lambda test: None

    def our_named_parameters(*parameters: Any) -> Any:
        return named_parameters(*cases) if len(parameters) == 1 else lambda test: None

    with (
        mock.patch.object(parameterized, "product", our_product),
        mock.patch.object(parameterized, "named_parameters", our_named_parameters),
    ):
        return importlib.import_module(name)


def main() -> None:
    """Run the tests."""
    _, module_name, class_name = sys.argv
    for name in OURS:
        setattr(optax.contrib, name, getattr(vsgd.optax, name))
        setattr(alias, name, getattr(vsgd.optax, name))
    tests = unittest.defaultTestLoader.loadTestsFromTestCase(getattr(load(module_name), class_name))
    result = unittest.TextTestRunner(stream=sys.stderr).run(tests)
    # Older versions also ran each test with `pmap`.
    skipped = [(test, reason) for test, reason in result.skipped if not reason.startswith("Only 1 device")]
    for test, reason in skipped:
        print(f"skipped: {test}: {reason}", file=sys.stderr)
    print(result.testsRun)
    sys.exit(not result.wasSuccessful() or bool(skipped))


if __name__ == "__main__":
    main()
