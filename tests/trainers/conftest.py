"""What the tests of trainers need: one thread, and the runs of two processes, all started once."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

import pytest

collect_ignore_glob: list[str] = []
if find_spec("torch") is None:
    collect_ignore_glob += ["torch_*.py"]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """So small a model gains nothing by more, and a busy machine takes from it."""
    torch = pytest.importorskip("torch")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
