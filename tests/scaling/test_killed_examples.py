"""Test that killing an example of sharded training changes no bit of its result."""

from __future__ import annotations

import math
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from research.scripts import run
from scaling import ranks

pytest.importorskip("sklearn")
pytestmark = pytest.mark.slow

#: Where each example runs.
EXAMPLES = {"torch_distributed": "torchrun, 2 processes", "jax_sharded": "JAX, 4 x 2 CPU devices"}
CPU = {"CUDA_VISIBLE_DEVICES": "", "JAX_PLATFORMS": "cpu"}
# Without the flags, each run times kernels and may choose others than the previous run.
GPUS = {
    "JAX_PLATFORMS": "cuda",
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    "XLA_FLAGS": "--xla_gpu_deterministic_ops=true --xla_gpu_autotune_level=0",
}
#: Prints all bits of an orbax checkpoint, in a process with as many devices as the saving one.
PRINT_ARRAYS = """
import sys, jax, numpy as np, orbax.checkpoint as ocp
jax.config.update("jax_num_cpu_devices", 8)
for path, array in jax.tree.leaves_with_path(ocp.StandardCheckpointer().restore(sys.argv[1])):
    print(jax.tree_util.keystr(path), np.asarray(array).tobytes().hex())
"""


def said(name: str, folder: Path, *options: str, killed: bool = False, gpus: bool = False) -> list[str]:
    """Run an example, optionally killed between two checkpoints and restarted (by torchrun itself), and return its lines."""
    command = [f"examples/{name}.py", "--checkpoints", str(folder), *options]
    # Do not buffer: a killed process loses unflushed lines.
    environment = {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **(GPUS if gpus else CPU)}
    if name == "torch_distributed":
        processes = ranks.count_gpus("torch") if gpus else 2
        # Allow three, because a restart may itself fail to connect.
        restarted = ["torch.distributed.run", "--standalone", "--max-restarts=3", f"--nproc-per-node={processes}"]
        return run("-m", *restarted, *command, *(["--die-at=90"] if killed else []), **environment).splitlines()
    before = run(*command, "--die-at=90", code=-signal.SIGKILL, **environment).splitlines() if killed else []
    return before + run(*command, **environment).splitlines()


def read_bits(name: str, checkpoint: Path, *, gpus: bool = False) -> str:
    """Return all bits of the parameters and of the optimizer's state."""
    if name == "jax_sharded":
        return run("-c", PRINT_ARRAYS, str(checkpoint / "default"), **(GPUS if gpus else CPU))
    import torch
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    whole = checkpoint.with_suffix(".pt")
    dcp_to_torch_save(checkpoint, whole)
    return "\n".join(print_bits(torch.load(whole)))


def print_bits(tree: Any, path: str = "") -> Iterator[str]:
    if isinstance(tree, dict):
        for name, each in tree.items():
            yield from print_bits(each, f"{path}/{name}")
    else:
        yield f"{path} {tree.numpy().tobytes().hex() if hasattr(tree, 'numpy') else tree}"


def losses(lines: list[str]) -> list[float]:
    return [float(line.split()[3].rstrip(",")) for line in lines]


@pytest.mark.parametrize("gpus", [False, pytest.param(True, marks=pytest.mark.gpu)], ids=["cpu", "gpus"])
@pytest.mark.parametrize("name", EXAMPLES)
def test_a_killed_run_ends_bit_for_bit(
    name: str, gpus: bool, on: Callable[..., Any], agreed: Callable[..., None], tmp_path: Path
) -> None:
    if name == "torch_distributed":
        problem = pytest.importorskip("scaling.torch_problem")
        if not (gpus or problem.FSDP2_ON_CPU):
            pytest.skip(problem.fsdp2.kwargs["reason"])
    else:
        pytest.importorskip("orbax.checkpoint")
        on("jax gpus" if gpus else "jax", "ranks.count_gpus", "jax")

    whole = said(name, tmp_path, gpus=gpus)
    assert [line.split(":")[0] for line in whole] == [f"step {step}" for step in (40, 80, 120, 160, 200)]
    assert losses(whole)[0] < 2.3  # the logarithm of ten classes
    assert losses(whole)[-1] < 0.5
    bits = read_bits(name, tmp_path / "200", gpus=gpus)

    # Ten steps are lost and repeated, and an incomplete checkpoint is skipped.
    forget(tmp_path, 120, 160, 200)
    if name == "torch_distributed":
        (tmp_path / "80" / ".metadata").unlink()  # the file that is written last
    else:
        (tmp_path / "80").rename(tmp_path / "80.orbax-checkpoint-tmp")  # the name until all is written
    lines = said(name, tmp_path, killed=True, gpus=gpus)
    assert lines == whole[1:]
    agreed(
        "killed and resumed",
        "GPUs" if gpus else EXAMPLES[name],
        0.0 if read_bits(name, tmp_path / "200", gpus=gpus) == bits else math.inf,
    )

    if name == "jax_sharded" and not gpus:
        forget(tmp_path, 120, 160, 200)
        lines = said(name, tmp_path, "--cpus", "4")
        # Sums in another order differ in their last bits, so the printed losses differ in at most their last digit.
        assert losses(lines) == pytest.approx(losses(whole)[2:], abs=1.1e-4)


def forget(folder: Path, *steps: int) -> None:
    for step in steps:
        shutil.rmtree(folder / str(step))
