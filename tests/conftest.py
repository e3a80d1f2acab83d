"""Check what tests need (packages, a C++ compiler, a GPU), and make the uninstalled research packages importable."""

from __future__ import annotations

import os
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from drivers import list_gaps
from packaging.requirements import Requirement

# Append, so that an installed vsgd takes precedence over the checkout's.
sys.path.append(str(Path(__file__).parents[1]))


def pytest_addoption(parser: pytest.Parser) -> None:
    packages = "packages, by commas, with markers, without which the run fails instead of skipping tests"
    parser.addoption("--require", default="", help=packages)
    parser.addoption("--site", type=Path, help="folder of the built documentation, whose pages a browser then measures")


def pytest_configure(config: pytest.Config) -> None:
    required = map(Requirement, filter(None, config.getoption("--require").split(",")))
    here = [each.name for each in required if each.marker is None or each.marker.evaluate()]
    missing = [name for name in here if find_spec(name) is None]
    if missing:
        raise pytest.UsageError(f"--require: not installed: {', '.join(missing)}")
    # Share XLA's compiled code between processes and runs; numba and inductor do so by themselves.
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ and config.pluginmanager.hasplugin("cacheprovider"):
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(config.cache.mkdir("xla"))
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("compiler") and not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("no C++ compiler, which torch.compile needs on the CPU")
    if item.get_closest_marker("gpu"):
        torch = pytest.importorskip("torch")
        if not torch.cuda.is_available():
            pytest.skip("no GPU")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """After a run of the contract, write what each driver lacks."""
    reports = (report for some in terminalreporter.stats.values() for report in some)
    if any(getattr(report, "nodeid", "").startswith("tests/contract") for report in reports):
        terminalreporter.section("drivers")
        for gap in list_gaps():
            terminalreporter.write_line(gap)


@pytest.fixture
def without_pyplot(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make importing pyplot fail, which shows that drawing leaves neither a backend nor a figure in the process."""
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
