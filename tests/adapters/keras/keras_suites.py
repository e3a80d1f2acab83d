"""Run Keras' own optimizer tests with VSGD in place of Adam: `python keras_suites.py`.

The script prints how many tests ran on the backend of this process, and exits with 1 if one failed. Run it in a separate
process, because it replaces classes in Keras.
"""

from __future__ import annotations

import importlib
import sys
import unittest
from typing import Any
from unittest import mock

import keras
from absl.testing import parameterized
from keras.src import optimizers
from keras.src.optimizers import adam

from vsgd.keras import VSGD, ConstantVSGD

BACKEND = keras.backend.backend()
SPARSE = BACKEND != "torch"

#: For each module and class, the tests that apply to any optimizer, run Adam, and need nothing that the backend lacks.
SUITES: dict[tuple[str, str], list[str]] = {
    ("adam_test", "AdamTest"): [
        *("test_weight_decay", "test_clip_norm", "test_clip_value", "test_ema", "test_ema_overwrite_frequency"),
        *(["test_clipnorm_indexed_slices"] if BACKEND == "tensorflow" else []),
    ],
    ("optimizer_test", "OptimizerTest"): [
        *("test_iterations_counter", "test_set_weights", "test_setting_lr_to_callable_untracks_lr_var"),
        *("test_gradient_accumulation_with_weigth_decay", "test_pickleable_optimizers"),
        *(["test_tf_checkpointing"] if BACKEND == "tensorflow" else []),
    ],
    ("optimizer_sparse_test", "OptimizerSparseTest"): ["test_sparse_gradients", "test_sparse_correctness"] if SPARSE else [],
}


def load(name: str, cls: type[keras.optimizers.Optimizer]) -> Any:
    """Import a test module so that parameterized tests and Adam's tests run for this class."""
    module = f"keras.src.optimizers.{name}"
    sys.modules.pop(module, None)
    parameters, named_parameters = parameterized.parameters, parameterized.named_parameters
    case = {"testcase_name": "ours", "optimizer_class": cls}
    with (
        mock.patch.object(parameterized, "parameters", return_value=parameters((f"vsgd>{cls.__name__}",))),
        mock.patch.object(parameterized, "named_parameters", return_value=named_parameters(case)),
        mock.patch.object(adam, "Adam", cls),
    ):
        return importlib.import_module(module)


def main() -> None:
    """Run the tests."""
    suite = unittest.TestSuite()
    for cls in (VSGD, ConstantVSGD):
        with mock.patch.object(optimizers, "Adam", cls):
            for (name, case), prefixes in SUITES.items():
                tests = getattr(load(name, cls), case)
                found = unittest.defaultTestLoader.getTestCaseNames(tests)
                suite.addTests(tests(each) for each in found if any(each.startswith(prefix) for prefix in prefixes))
    result = unittest.TextTestRunner(stream=sys.stderr).run(suite)
    print(result.testsRun)
    sys.exit(not result.wasSuccessful())


if __name__ == "__main__":
    main()
