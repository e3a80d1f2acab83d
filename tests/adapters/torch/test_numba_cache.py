"""Test that the kernel's disk cache is used, never out of date, and not required."""

from __future__ import annotations

import compileall
import shutil
from pathlib import Path

import pytest

pytest.importorskip("numba")

from adapters.torch.torch_optimizers import run_script

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


# Makes numba find no location for its cache.
NOWHERE = """
    import numba.core.caching as caching
    caching.CacheImpl._locator_classes = []
"""


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """Copy the package."""
    shutil.copytree(Path(vsgd.__file__).parent, tmp_path / "vsgd", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path / "vsgd"


def run(folder: Path, script: str = STEP) -> list[int]:
    """Return cache hits and misses of a fused step, checked against the loop, in a new process with this folder's package."""
    # Write no bytecode files: numba's key distinguishes a function loaded from one from the same function of its source. Where
    # pip installed the package, every run has the files.
    environment = {"NUMBA_CACHE_DIR": str(folder / "cache"), "PYTHONDONTWRITEBYTECODE": "1"}
    return list(map(int, run_script(script, folder=folder, **environment)))


def test_an_edited_core_is_compiled_anew(package: Path) -> None:
    core = package / "core.py"
    assert run(package.parent) == [0, 1]
    assert run(package.parent) == [1, 0]
    # The loop runs the code in the file, so the two disagree if the cache returns the old code.
    for old, new in [("decay - lr * direction", "decay + lr * direction"), ("drift = gain * innovation", "drift = innovation")]:
        core.write_text(core.read_text().replace(old, new))
        assert run(package.parent) == [0, 1]


def test_the_kernel_runs_where_nothing_can_be_written(tmp_path: Path) -> None:
    assert run(tmp_path, NOWHERE + STEP) == [0, 1]
    assert not (tmp_path / "cache").exists()


def test_without_source_files_another_engine_steps(package: Path) -> None:
    compileall.compile_dir(package, quiet=1, legacy=True)
    for source in package.rglob("*.py"):
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
    said = run_script(script, folder=package.parent)
    assert "vsgd's compiled kernels need the package's source files" in " ".join(said)
