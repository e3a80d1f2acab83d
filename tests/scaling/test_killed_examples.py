"""The examples of sharded training: a run that is killed costs no bit of the result."""

from __future__ import annotations

import math
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from research.scripts import run
from scaling import ranks

pytest.importorskip("sklearn")
pytestmark = pytest.mark.slow

#: By example: where it runs, and what its checkpoints' names begin with.
EXAMPLES = {"torch_distributed": ("torchrun, 2 processes", "step-"), "jax_sharded": ("JAX, 4 x 2 CPU devices", "")}
CPU = {"CUDA_VISIBLE_DEVICES": "", "JAX_PLATFORMS": "cpu"}
# The flags: else each run times kernels, and may choose others than the last.
GPUS = {
    "JAX_PLATFORMS": "cuda",
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    "XLA_FLAGS": "--xla_gpu_deterministic_ops=true --xla_gpu_autotune_level=0",
}


def said(name: str, folder: Path, *options: str, killed: bool = False, gpus: bool = False) -> list[str]:
    """What an example says, killed between two checkpoints and started again, or not; torchrun restarts by itself."""
    command = [f"examples/{name}.py", "--steps", "40", "--every", "10", "--checkpoints", str(folder), *options]
    environment = {"OMP_NUM_THREADS": "1", **(GPUS if gpus else CPU)}
    if name == "torch_distributed":
        processes = ranks.count_gpus("torch") if gpus else 2
        # Three, for a restart may itself fail, of a connection.
        restarted = ["torch.distributed.run", "--standalone", "--max-restarts=3", f"--nproc-per-node={processes}"]
        return run("-m", *restarted, *command, *(["--die-at=25"] if killed else []), **environment).splitlines()
    before = run(*command, "--die-at=25", code=-signal.SIGKILL, **environment).splitlines() if killed else []
    return before + run(*command, **environment).splitlines()


def losses(lines: list[str]) -> list[float]:
    return [float(line.split()[3].rstrip(",")) for line in lines if line.startswith("step")]


@pytest.mark.parametrize("gpus", [False, pytest.param(True, marks=pytest.mark.gpu)], ids=["cpu", "gpus"])
@pytest.mark.parametrize("name", EXAMPLES)
def test_a_killed_run_ends_bit_for_bit(
    name: str, gpus: bool, on: Callable[..., Any], agreed: Callable[..., None], tmp_path: Path
) -> None:
    where, prefix = EXAMPLES[name]
    if name == "torch_distributed":
        problem = pytest.importorskip("scaling.torch_problem")
        if not (gpus or problem.FSDP2_ON_CPU):
            pytest.skip(problem.fsdp2.kwargs["reason"])
    else:
        pytest.importorskip("orbax.checkpoint")
        on("jax gpus" if gpus else "jax", "ranks.count_gpus", "jax")
    options = ["--columns", "1"] if gpus and name == "jax_sharded" else []

    whole = said(name, tmp_path, *options, gpus=gpus)
    assert len(whole) == 5
    assert losses(whole)[0] < 2.3  # the logarithm of ten classes
    assert losses(whole)[-1] < 0.5
    assert whole[-1].startswith("ended at step 40: ")

    # Five steps are lost and taken again; and a checkpoint that is not whole is passed over.
    forget_the_last(tmp_path, prefix)
    if name == "torch_distributed":
        (tmp_path / "step-20" / ".metadata").unlink()  # what is written last
    else:
        (tmp_path / "20").rename(tmp_path / "20.orbax-checkpoint-tmp")  # until all is written
    lines = said(name, tmp_path, *options, killed=True, gpus=gpus)
    assert [line.split(":")[0] for line in lines[:4]] == ["resumed at step 10", "step 20", "resumed at step 20", "step 30"]
    assert lines[1] == whole[1]
    agreed("killed and resumed", "GPUs" if gpus else where, 0.0 if lines[3:] == whole[2:] else math.inf)

    if name == "jax_sharded" and not gpus:
        forget_the_last(tmp_path, prefix)
        first, *lines = said(name, tmp_path, "--cpus", "4", "--columns", "4")
        assert first == "resumed at step 20"
        # Sums in another order differ in last bits: what is shown, in its last digit at most.
        assert losses(lines) == pytest.approx(losses(whole)[2:], abs=1.1e-4)


def forget_the_last(folder: Path, prefix: str) -> None:
    for step in (30, 40):
        shutil.rmtree(folder / f"{prefix}{step}")
