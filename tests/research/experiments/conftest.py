"""One thread and one Keras backend for the tests of the experiments."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest


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
