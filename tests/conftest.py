"""What the tests need of the machine."""

from __future__ import annotations

import shutil
from importlib.util import find_spec

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--require", default="", help="packages, by commas, without which the run fails instead of skipping tests")


def pytest_configure(config: pytest.Config) -> None:
    missing = [name for name in config.getoption("--require").split(",") if name and find_spec(name) is None]
    if missing:
        raise pytest.UsageError(f"--require: not installed: {', '.join(missing)}")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("compiler") and not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("no C++ compiler, which torch.compile needs on the CPU")
    if item.get_closest_marker("gpu"):
        torch = pytest.importorskip("torch")
        if not torch.cuda.is_available():
            pytest.skip("no GPU")
