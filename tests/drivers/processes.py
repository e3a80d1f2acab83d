"""Run Python in a new process, which each Keras backend needs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]


def run_python(backend: str, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `python COMMAND...` from the repository's root, with the tests' modules importable.

    Args:
        backend: Keras' backend.
        *command: Python's arguments.
        **environment: further variables.

    Returns:
        The finished process, with errors in its output.
    """
    return subprocess.run(
        [sys.executable, *command],
        cwd=TESTS.parent,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, (str(TESTS), os.environ.get("PYTHONPATH")))),
            "KERAS_BACKEND": backend,
            "TF_CPP_MIN_LOG_LEVEL": "3",
            **environment,
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        timeout=900,
        check=False,
    )
