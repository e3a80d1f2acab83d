"""The example of sharded training on a mesh: a run that is killed costs no bit of the result."""

from __future__ import annotations

import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

for package in ("jax", "optax", "orbax.checkpoint", "sklearn"):
    pytest.importorskip(package)

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
SHORT = ("--steps", "40", "--every", "10")


def example(*options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "examples" / "jax_sharded.py"), *options],
        env={**os.environ, **environment},
        cwd=ROOT,
        capture_output=True,
        encoding="utf-8",
        timeout=240,
        check=False,
    )


def said(folder: Path, *options: str, killed: bool = False, **environment: str) -> list[str]:
    """What it says, ended or killed; on the CPU, where not told otherwise."""
    ended = example(*SHORT, "--checkpoints", str(folder), *options, **{"JAX_PLATFORMS": "cpu", **environment})
    assert ended.returncode == (-signal.SIGKILL if killed else 0), ended.stderr
    return ended.stdout.splitlines()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return said(tmp_path_factory.mktemp("uninterrupted"))


@pytest.fixture(scope="module")
def left_behind(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoints of a run that was killed between two: five steps are lost."""
    folder = tmp_path_factory.mktemp("killed")
    lines = said(folder, "--die-at", "25", killed=True)
    assert [line.split(":")[0] for line in lines] == ["step 10", "step 20"]
    return folder


@pytest.fixture
def checkpoints(left_behind: Path, tmp_path: Path) -> Path:
    return shutil.copytree(left_behind, tmp_path / "checkpoints")


def test_it_learns_and_says_so(uninterrupted: list[str]) -> None:
    losses = [float(line.split()[3].rstrip(",")) for line in uninterrupted[:4]]
    assert losses[0] < 2.3  # the logarithm of ten classes
    assert losses[-1] < 0.5
    assert uninterrupted[4].startswith("ended at step 40: ")
    assert len(uninterrupted) == 5


def test_a_killed_run_resumes_and_ends_bit_for_bit(
    uninterrupted: list[str], checkpoints: Path, agreed: Callable[..., None]
) -> None:
    first, *lines = said(checkpoints)
    assert first == "resumed at step 20"
    agreed("a run killed and resumed", "JAX, 4 x 2 CPU devices", 0.0 if lines == uninterrupted[2:] else math.inf)


def test_a_checkpoint_that_is_not_whole_is_passed_over(uninterrupted: list[str], checkpoints: Path) -> None:
    (checkpoints / "20").rename(checkpoints / "20.orbax-checkpoint-tmp")  # until all is written
    first, *lines = said(checkpoints)
    assert first == "resumed at step 10"
    assert lines == uninterrupted[1:]


def test_it_resumes_on_another_mesh(uninterrupted: list[str], checkpoints: Path) -> None:
    first, *lines, last = said(checkpoints, "--cpus", "4", "--columns", "4")
    assert first == "resumed at step 20"
    # Sums in another order differ in last bits: what is shown, in its last digit at most.
    losses, expected = ([float(line.split()[3].rstrip(",")) for line in each] for each in (lines, uninterrupted[2:4]))
    assert losses == pytest.approx(expected, abs=1.1e-4)
    assert last.startswith("ended at step 40: ")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--every", "0"), "--every is 0, but must be at least 1"),
        (("--columns", "3"), "--columns is 3, but must divide 8, the number of devices"),
    ],
)
def test_a_bad_option_is_named(options: tuple[str, ...], message: str) -> None:
    refused = example(*options, JAX_PLATFORMS="cpu")
    assert refused.returncode == 2
    assert message in refused.stderr


@pytest.mark.gpu
@pytest.mark.usefixtures("jax_gpus")
def test_on_gpus_too_a_killed_run_ends_bit_for_bit(tmp_path: Path) -> None:
    # Else each run times kernels, and may choose others than the last.
    gpus = {"JAX_PLATFORMS": "cuda", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    gpus["XLA_FLAGS"] = "--xla_gpu_deterministic_ops=true --xla_gpu_autotune_level=0"
    lines = said(tmp_path / "uninterrupted", "--columns", "1", **gpus)
    said(tmp_path / "killed", "--columns", "1", "--die-at", "25", killed=True, **gpus)
    first, *others = said(tmp_path / "killed", "--columns", "1", **gpus)
    assert first == "resumed at step 20"
    assert others == lines[2:]
