"""What the tests of trainers need: one thread, and what two processes saw, started once for all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
#: Those that two processes run, where they are installed.
PACKAGES = [name for name in ("accelerate", "transformers", "lightning", "deepspeed") if find_spec(name) is not None]

collect_ignore_glob: list[str] = []
if find_spec("torch") is None:
    collect_ignore_glob += ["torch_*.py"]

Seen = Callable[[str], list[dict[str, Any]]]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """So small a model gains nothing by more, and a busy machine takes from it."""
    torch = pytest.importorskip("torch")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    """What each of two processes saw of a training, by the training's name."""
    dist = pytest.importorskip("torch.distributed")
    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("this build of torch has no gloo")
    folder = tmp_path_factory.mktemp("two-processes")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    ended = subprocess.run(
        [*launcher, str(HERE / "torch_two_processes.py"), str(folder), *PACKAGES],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, (str(HERE.parent), os.environ.get("PYTHONPATH")))),
            "CUDA_VISIBLE_DEVICES": "",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
        },
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        timeout=240,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout
    seen = [json.loads((folder / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(2)]
    return lambda name: [each[name] for each in seen]
