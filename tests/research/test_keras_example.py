"""The Keras example, run for real on the backend of this process."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

keras = pytest.importorskip("keras")
pytest.importorskip("sklearn")

pytestmark = pytest.mark.slow

EXAMPLE = Path(__file__).parents[2] / "examples" / "keras_training.py"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "KERAS_BACKEND": keras.backend.backend(), "PYTHONUTF8": "1"}
    command = [sys.executable, str(EXAMPLE), *arguments]
    return subprocess.run(command, capture_output=True, encoding="utf-8", env=environment, timeout=300, check=False)


def test_it_trains_and_prints_both_accuracies() -> None:
    done = run("--epochs", "2")
    assert done.returncode == 0, done.stderr
    first, *rows = done.stdout.splitlines()
    assert first == f"Keras {keras.__version__} on {keras.backend.backend()}"
    assert [row.split()[0] for row in rows] == ["VSGD", "AdamW"]
    for row in rows:
        accuracy = re.search(r"test accuracy ([\d.]+) %", row)
        assert accuracy is not None
        # A tenth would be chance; seeds 0 to 2 reached 90 and more on each backend.
        assert 75 < float(accuracy[1]) <= 100


def test_it_refuses_no_epochs() -> None:
    done = run("--epochs", "0")
    assert done.returncode == 2
    assert "--epochs is 0, but must be at least 1" in done.stderr
