"""Training by two processes of `jax.distributed` ends where one device ends."""

from __future__ import annotations

from collections.abc import Callable

import pytest

pytest.importorskip("jax")
pytest.importorskip("optax")

from scaling import jax_sharded
from scaling.jax_problem import BOUND, Case
from scaling.ranks import Ranks

Pool = Callable[[str], Ranks]
Agreed = Callable[..., None]
pytestmark = pytest.mark.slow

PROCESSES = "JAX, 2 processes of 2 CPU devices"
cases = pytest.mark.parametrize("case", [Case(), Case("constant_vsgd", "bfloat16", compact=True)], ids=["float32", "bfloat16"])


@cases
def test_parameters_sharded_among_processes(case: Case, jax_pool: Pool, agreed: Agreed) -> None:
    strayed = max(jax_pool("processes").run(jax_sharded.trained, case))
    agreed(f"jax.distributed, sharded by 2 x 2, {case.dtype}", PROCESSES, strayed)


@cases
def test_data_parallel_with_the_state_spread(case: Case, jax_pool: Pool, agreed: Agreed) -> None:
    strayed = max(seen.strayed for seen in jax_pool("processes").run(jax_sharded.zero, case))
    agreed(f"jax.distributed, ZeRO-1, {case.dtype}", PROCESSES, strayed)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", BOUND["summed"])
def test_a_process_for_each_of_two_gpus(dtype: str, jax_pool: Pool, jax_gpus: tuple[Ranks, int], agreed: Agreed) -> None:
    if jax_gpus[1] < 2:
        pytest.skip("one GPU alone")
    strayed = max(jax_pool("gpu processes").run(jax_sharded.trained, Case(dtype=dtype, gradients="summed")))
    agreed(f"jax.distributed, {dtype}", "JAX, 2 processes of 1 GPU", strayed, BOUND["summed"][dtype])
