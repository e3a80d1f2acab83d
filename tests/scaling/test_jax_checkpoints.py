"""Checkpoints of sharded training by orbax: saved on one mesh, loaded on another, and continued, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("jax")
pytest.importorskip("optax")
pytest.importorskip("orbax.checkpoint")

from scaling import jax_checkpoints
from scaling.jax_problem import BOUND, Case
from scaling.ranks import Ranks

Pool = Callable[[str], Ranks]
Agreed = Callable[..., None]
pytestmark = pytest.mark.slow

CASES = {
    "float32": Case(),
    "bfloat16": Case("constant_vsgd", "bfloat16", compact=True),
}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@cases
def test_saved_on_one_mesh_and_loaded_on_another(case: Case, jax_pool: Pool, agreed: Agreed, tmp_path: Path) -> None:
    pool, folder = jax_pool("uncontracted"), str(tmp_path / "saved")
    (strayed,) = pool.run(jax_checkpoints.save, case, folder)
    agreed("orbax: saved while donated arrays train on", "JAX, 4 x 2 CPU devices", strayed)
    for shape in ((2, 4), (8, 1), (1, 1)):
        (strayed,) = pool.run(jax_checkpoints.load, case, folder, *shape)
        agreed(f"orbax: saved on 4 x 2, continued on {shape[0]} x {shape[1]}, {case.dtype}", "JAX, CPU devices", max(strayed))


@cases
def test_saved_by_two_processes_and_loaded_by_any(case: Case, jax_pool: Pool, agreed: Agreed, tmp_path: Path) -> None:
    folder = str(tmp_path / "saved")
    strayed = jax_pool("processes").run(jax_checkpoints.save, case, folder)
    agreed("orbax: saved while donated arrays train on", "JAX, 2 processes of 2 CPU devices", max(strayed))
    for name, where in {"processes": "by 2 processes", "uncontracted": "on 4 x 2 in one process"}.items():
        strayed = max(map(max, jax_pool(name).run(jax_checkpoints.load, case, folder)))
        agreed(f"orbax: saved by 2 processes, continued {where}, {case.dtype}", "JAX, CPU devices", strayed)


def test_without_a_target_the_state_has_lost_its_type(jax_pool: Pool, agreed: Agreed, tmp_path: Path) -> None:
    pool, folder = jax_pool("uncontracted"), str(tmp_path / "saved")
    pool.run(jax_checkpoints.save, CASES["float32"], folder)
    ((said, *strayed),) = pool.run(jax_checkpoints.load_without_a_target, CASES["float32"], folder)
    assert said == "'dict' object has no attribute 'count'"
    agreed("orbax: loaded without a target, its type given back", "JAX, CPU devices", max(strayed))


def test_with_arrays_for_a_target_the_count_stays_on_one_device(jax_pool: Pool, tmp_path: Path) -> None:
    pool, folder = jax_pool("uncontracted"), str(tmp_path / "saved")
    pool.run(jax_checkpoints.save, CASES["float32"], folder)
    (said,) = pool.run(jax_checkpoints.load_by_arrays, CASES["float32"], folder)
    assert said.startswith("Received incompatible devices for jitted computation.")
    assert "count" in said


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", BOUND["summed"])
def test_saved_on_gpus_and_loaded_on_one(dtype: str, jax_gpus: tuple[Ranks, int], agreed: Agreed, tmp_path: Path) -> None:
    pool, case, folder = jax_gpus[0], Case(dtype=dtype, gradients="summed"), str(tmp_path / "saved")
    pool.run(jax_checkpoints.save, case, folder)
    for shape in ((), (1, 1)):
        (strayed,) = pool.run(jax_checkpoints.load, case, folder, *shape)
        agreed(f"orbax: saved on all, continued on all and on one, {dtype}", "JAX, GPUs", max(strayed), BOUND["summed"][dtype])
