"""The kernel's disk cache: it is used, never out of date, and not needed."""

from __future__ import annotations

import compileall
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

pytest.importorskip("numba")
pytest.importorskip("torch")

import vsgd

STEP = """
    import torch
    from vsgd.backends import numba as numba_cpu
    from vsgd.torch import VSGD
    from vsgd import core
    params = {}
    for fused in (False, True):
        params[fused] = torch.nn.Parameter(torch.ones(5))
        params[fused].grad = torch.linspace(-1, 1, 5)
        VSGD([params[fused]], fused=fused, foreach=False).step()
    torch.testing.assert_close(params[True], params[False])
    kernel = numba_cpu._compile(core.VSGD, False, parallel=False)
    print(sum(kernel.stats.cache_hits.values()), sum(kernel.stats.cache_misses.values()))
"""


def run(package: Path, before: str = "") -> tuple[int, int]:
    """Cache hits and misses of a fused step, checked against the loop, in a new process with the package of this folder."""
    # No bytecode files: numba's key tells a function of one from the same function of its source. Where pip installed the
    # package, every run has the files.
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(package / "cache"), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", before + textwrap.dedent(STEP)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=package)
    assert done.returncode == 0, done.stderr
    hits, misses = map(int, done.stdout.split())
    return hits, misses


def test_an_edited_core_is_compiled_anew(tmp_path: Path) -> None:
    shutil.copytree(Path(vsgd.__file__).parent, tmp_path / "vsgd", ignore=shutil.ignore_patterns("__pycache__"))
    core = tmp_path / "vsgd" / "core.py"
    assert run(tmp_path) == (0, 1)
    assert run(tmp_path) == (1, 0)
    # The loop runs what stands in the file: the two disagree where the cache serves what stood there before.
    for old, new in [("decay - lr * direction", "decay + lr * direction"), ("drift = gain * innovation", "drift = innovation")]:
        core.write_text(core.read_text().replace(old, new))
        assert run(tmp_path) == (0, 1)


def test_the_kernel_runs_where_nothing_can_be_written(tmp_path: Path) -> None:
    # Numba finds no place in any of those that it knows.
    nowhere = "import numba.core.caching as caching\ncaching.CacheImpl._locator_classes = []\n"
    assert run(tmp_path, nowhere) == (0, 1)
    assert not (tmp_path / "cache").exists()


def test_without_source_files_another_engine_steps(tmp_path: Path) -> None:
    shutil.copytree(Path(vsgd.__file__).parent, tmp_path / "vsgd", ignore=shutil.ignore_patterns("__pycache__"))
    compileall.compile_dir(tmp_path / "vsgd", quiet=1, legacy=True)
    for source in (tmp_path / "vsgd").rglob("*.py"):
        source.unlink()
    script = """
        import torch
        from vsgd.torch import VSGD
        param = torch.nn.Parameter(torch.ones(5))
        param.grad = torch.ones(5)
        VSGD([param]).step()
        assert (param != 1).all()
        try:
            VSGD([param], fused=True).step()
        except ImportError as error:
            print(error)
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "vsgd's compiled kernels need the package's source files" in done.stdout
