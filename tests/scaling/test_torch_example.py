"""The example of sharded training, run by torchrun: a process that is killed costs no bit of the result."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("sklearn")

import torch.distributed as dist  # noqa: E402

if not (dist.is_available() and dist.is_gloo_available()):
    pytest.skip("this build of torch has no gloo", allow_module_level=True)

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
OPTIONS = ("--steps", "40", "--every", "10")


def run(folder: Path, *options: str, torchrun: tuple[str, ...] = (), processes: int = 2, devices: str | None = "") -> list[str]:
    """What the example says; on the CPU where there are no devices, on all GPUs where they are not told."""
    visible = {} if devices is None else {"CUDA_VISIBLE_DEVICES": devices}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), *torchrun]
    ended = subprocess.run(
        [*launcher, str(ROOT / "examples" / "torch_distributed.py"), "--checkpoints", str(folder), *options],
        env={**os.environ, **visible, "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        capture_output=True,
        encoding="utf-8",
        timeout=240,
        check=False,
    )
    lines = ended.stdout.splitlines()
    assert lines, ended.stderr
    return lines


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def uninterrupted(checkpoints: Path) -> list[str]:
    return run(checkpoints, *OPTIONS)


def test_it_learns_and_says_so(uninterrupted: list[str]) -> None:
    losses = [float(line.split()[3]) for line in uninterrupted[:4]]
    assert losses == sorted(losses, reverse=True)
    assert losses[0] < 2.3  # the logarithm of ten classes
    assert losses[-1] < 0.5
    assert uninterrupted[4].startswith("ended at step 40: ")
    assert len(uninterrupted) == 5


def test_a_killed_run_resumes_and_ends_bit_for_bit(
    uninterrupted: list[str], agreed: Callable[..., None], tmp_path: Path
) -> None:
    # Between two checkpoints: five steps are lost and taken again.
    said = run(tmp_path, *OPTIONS, "--die-at", "25", torchrun=("--max-restarts", "1"))
    assert [line.split(":")[0] for line in said[:4]] == ["step 10", "step 20", "resumed at step 20", "step 30"]
    agreed("a rank killed, the run resumed", "torchrun, 2 processes", 0.0 if said[3:] == uninterrupted[2:] else math.inf)


def test_a_checkpoint_that_is_not_whole_is_passed_over(uninterrupted: list[str], checkpoints: Path, tmp_path: Path) -> None:
    for name in ("step-10", "step-20"):
        shutil.copytree(checkpoints / name, tmp_path / name)
    (tmp_path / "step-20" / ".metadata").unlink()  # what is written last
    said = run(tmp_path, *OPTIONS)
    assert said[0] == "resumed at step 10"
    assert said[1:] == uninterrupted[1:]


@pytest.mark.gpu
def test_on_gpus_too_a_killed_run_ends_bit_for_bit(tmp_path: Path) -> None:
    gpus = {"processes": torch.cuda.device_count(), "devices": os.environ.get("CUDA_VISIBLE_DEVICES")}
    said = run(tmp_path / "uninterrupted", *OPTIONS, **gpus)
    again = run(tmp_path / "killed", *OPTIONS, "--die-at", "25", torchrun=("--max-restarts", "1"), **gpus)
    assert again[2] == "resumed at step 20"
    assert again[3:] == said[2:]
