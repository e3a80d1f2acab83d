"""Shared by the tests of trainers: one thread, their recipes, and the results of two processes, started once for all tests."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from drivers.processes import run_python
from research.conftest import one_thread
from research.scripts import loaded

HERE = Path(__file__).parent
RECIPES = HERE.parents[1] / "docs" / "recipes"

collect_ignore_glob: list[str] = []
if find_spec("torch") is None:
    collect_ignore_glob += ["torch_*.py"]

__all__ = ["one_thread"]

Seen = Callable[[str], list[dict[str, Any]]]


@pytest.fixture
def recipe(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """Load the documentation's program for the trainer that the test's module names."""
    monkeypatch.chdir(tmp_path)  # a recipe may write its checkpoint here
    with loaded(RECIPES / f"with_{request.module.TRAINER}.py") as module:
        yield module


@pytest.fixture(scope="session")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    """Return the results of each of two processes, by the training's name."""
    dist = pytest.importorskip("torch.distributed")
    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("this build of torch has no gloo")
    folder = tmp_path_factory.mktemp("two-processes")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    ended = run_python("torch", *launcher, str(HERE / "torch_two_processes.py"), str(folder), **environment)
    assert ended.returncode == 0, ended.stdout
    seen = [json.loads((folder / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(2)]
    return lambda name: [each[name] for each in seen]
