"""The JAX example, run for real."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

for package in ("jax", "optax", "sklearn"):
    pytest.importorskip(package)

EXAMPLE = Path(__file__).parents[2] / "examples" / "jax_training.py"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(EXAMPLE), *arguments]
    environment = {**os.environ, "PYTHONUTF8": "1"}
    return subprocess.run(command, capture_output=True, encoding="utf-8", env=environment, timeout=300, check=False)


def test_both_optimizers_learn_the_digits() -> None:
    done = run("--epochs", "5", "--seeds", "2")
    assert done.returncode == 0, done.stderr
    row = re.compile(r"(VSGD|AdamW), lr [\d.]+ +test accuracy ([\d.]+) ± ([\d.]+) %  train loss ([\d.e-]+)  [\d.]+ s")
    rows = [row.fullmatch(line) for line in done.stdout.splitlines()]
    assert [match and match[1] for match in rows] == ["VSGD", "AdamW"]
    for match in rows:
        # Of ten seeds, the worst reached 94.2 % and a train loss of 0.18.
        assert float(match[2]) > 90
        assert float(match[4]) < 0.3


def test_no_epochs_are_refused() -> None:
    done = run("--epochs", "0")
    assert done.returncode == 2
    assert "--epochs is 0 and --seeds is 5, but both must be at least 1" in done.stderr
