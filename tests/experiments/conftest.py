"""The experiments are no installed package: they are found beside the tests, after all that is installed."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2]))


@pytest.fixture(autouse=True)
def same_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line names a backend to the whole process."""
    if "KERAS_BACKEND" in os.environ:
        monkeypatch.setenv("KERAS_BACKEND", os.environ["KERAS_BACKEND"])


@pytest.fixture(autouse=True, scope="package")
def one_thread() -> Iterator[None]:
    """Models as small as these are slower on several, in PyTorch."""
    if os.environ.get("KERAS_BACKEND") != "torch":
        yield
        return
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
