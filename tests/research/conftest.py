"""Use one thread and one Keras backend for the tests of research code."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.util import find_spec

import pytest


@pytest.fixture(autouse=True)
def same_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Restore the Keras backend, which the command line sets for the whole process."""
    if "KERAS_BACKEND" in os.environ:
        monkeypatch.setenv("KERAS_BACKEND", os.environ["KERAS_BACKEND"])


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Train on one thread, like the scripts; PyTorch is slower with several threads on such small models."""
    if find_spec("torch") is None:
        yield
        return
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
