"""Test that orbax checkpoints of sharded training load on another mesh and continue bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("jax")
pytest.importorskip("optax")
pytest.importorskip("orbax.checkpoint")

from scaling.jax_problem import BOUND, Case
from scaling.ranks import Agreed, On

Loads = list[tuple[str, tuple[int, ...]]]
pytestmark = pytest.mark.slow

ONE, PROCESSES, GPUS = "jax uncontracted", "jax processes", "jax gpus"
FLOAT32, COMPACT = Case(), Case("constant_vsgd", "bfloat16", compact=True)
#: Which pool saves which case, and which pools load it on which meshes; () uses all devices.
SAVED: list[tuple[str, Case, Loads]] = [
    (ONE, COMPACT, [(ONE, (2, 4)), (ONE, (8, 1)), (ONE, (1, 1))]),
    (ONE, FLOAT32, [(ONE, (2, 4))]),
    (PROCESSES, FLOAT32, [(PROCESSES, ()), (ONE, ())]),
    (PROCESSES, COMPACT, [(PROCESSES, ())]),
    *((GPUS, Case(dtype=dtype, gradients="summed"), [(GPUS, ()), (GPUS, (1, 1))]) for dtype in BOUND["summed"]),
]
ROWS = [pytest.param(*row, marks=[pytest.mark.gpu] if row[0] == GPUS else [], id=f"{row[0]} {row[1].dtype}") for row in SAVED]


@pytest.mark.parametrize(("saver", "case", "loads"), ROWS)
def test_saved_on_one_mesh_and_continued_on_another(
    saver: str, case: Case, loads: Loads, on: On, agreed: Agreed, tmp_path: Path
) -> None:
    folder, bound = str(tmp_path / "saved"), BOUND["summed"][case.dtype] if saver == GPUS else 0.0
    strayed = max(on(saver, "jax_checkpoints.save", case, folder))
    agreed("orbax: saved while donated arrays train on", saver, strayed, bound)
    for loader, shape in loads:
        strayed = max(on(loader, "jax_checkpoints.load", case, folder, *shape))
        where = f"{loader}, {' x '.join(map(str, shape)) or 'all devices'}"
        agreed(f"orbax: saved on all devices of {saver}, continued, {case.dtype}", where, strayed, bound)


def test_without_a_target_or_with_arrays_for_one_it_says_what_is_wrong(on: On, agreed: Agreed, tmp_path: Path) -> None:
    folder = str(tmp_path / "saved")
    on(ONE, "jax_checkpoints.save", FLOAT32, folder)
    (strayed,) = on(ONE, "jax_checkpoints.load_otherwise", FLOAT32, folder)
    agreed("orbax: loaded without a target, its type given back", "JAX, CPU devices", strayed)
