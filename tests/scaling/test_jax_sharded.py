"""Training on a mesh of devices ends where one device ends, and its state lies as the parameters do."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

jax = pytest.importorskip("jax")
pytest.importorskip("optax")

from scaling import jax_manual, jax_sharded  # noqa: E402
from scaling.jax_problem import BOUND, Case  # noqa: E402
from scaling.ranks import Ranks  # noqa: E402

Pool = Callable[[str], Ranks]
Gpus = tuple[Ranks, int]
Agreed = Callable[..., None]
MESH = "JAX, 4 x 2 CPU devices"
STORAGES: dict[str, dict[str, Any]] = {
    "float32": {},
    "float64": {"dtype": "float64"},
    "bfloat16 parameters and state, rounded at random": {"dtype": "bfloat16", "compact": True},
}
COMPACT = Case(**STORAGES["bfloat16 parameters and state, rounded at random"])
kinds = pytest.mark.parametrize("kind", ["vsgd", "constant_vsgd"])
cases = pytest.mark.parametrize("case", [Case(), Case("constant_vsgd"), COMPACT], ids=["vsgd", "constant_vsgd", "compact"])
storages = pytest.mark.parametrize("storage", STORAGES)
typed = pytest.mark.skipif(not hasattr(jax, "set_mesh"), reason="this JAX has no sharding in types")
mapped = pytest.mark.skipif(not hasattr(jax, "shard_map"), reason="this JAX has no jax.shard_map")
axes = pytest.mark.parametrize("types", ["Auto", pytest.param("Explicit", marks=typed)])


@axes
@storages
@kinds
def test_training_ends_where_one_device_ends(kind: str, storage: str, types: str, jax_pool: Pool, agreed: Agreed) -> None:
    # Sums of few digits are exact, so the gradients are equal in whatever order they are summed.
    (strayed,) = jax_pool("uncontracted").run(jax_sharded.trained, Case(kind, **STORAGES[storage]), types)
    agreed(f"{types.lower()} axes, {storage}", MESH, strayed)


def test_complex_parameters_end_where_one_device_ends(jax_pool: Pool, agreed: Agreed) -> None:
    (strayed,) = jax_pool("uncontracted").run(jax_sharded.trained, Case(dtype="complex64", gradients="given"))
    agreed("auto axes, complex64, equal gradients", MESH, strayed)


@pytest.mark.parametrize("dtype", BOUND["given"])
@kinds
def test_contraction_differs_in_last_bits(kind: str, dtype: str, jax_pool: Pool, agreed: Agreed) -> None:
    # Which of two products is fused with their sum depends on how the compiler unrolls a loop of a shard's length.
    (strayed,) = jax_pool("devices").run(jax_sharded.trained, Case(kind, dtype, gradients="given"))
    agreed(f"{dtype}, equal gradients, XLA's contraction", MESH, strayed, BOUND["given"][dtype])


@pytest.mark.parametrize("dtype", BOUND["summed"])
@kinds
def test_sums_in_another_order_differ_in_last_bits(kind: str, dtype: str, jax_pool: Pool, agreed: Agreed) -> None:
    (strayed,) = jax_pool("devices").run(jax_sharded.trained, Case(kind, dtype, gradients="summed"))
    agreed(f"{dtype}, gradients summed in another order", MESH, strayed, BOUND["summed"][dtype])


@axes
@pytest.mark.parametrize("dtype", ["bfloat16", "complex64"])
@kinds
def test_state_and_updates_lie_as_the_parameters(kind: str, dtype: str, types: str, jax_pool: Pool) -> None:
    (lying,) = jax_pool("devices").run(jax_sharded.lying, kind, dtype, types)
    # Plain and injected: the state thrice, the updates twice.
    assert lying == [True] * 2 * (3 * {"vsgd": 3, "constant_vsgd": 2}[kind] + 2)


@cases
def test_a_step_communicates_nothing(case: Case, jax_pool: Pool) -> None:
    (found,) = jax_pool("devices").run(jax_sharded.communication, case._replace(gradients="summed"))
    assert found["step"] == found["step, injected"] == []
    assert found["training"] == found["gradients"]
    assert "all-reduce" in found["gradients"]  # so they would be seen


@typed
def test_where_init_puts_the_state(jax_pool: Pool) -> None:
    (found,) = jax_pool("devices").run(jax_sharded.placed_by_init)
    assert found == {
        "init(params)": "as the parameters",
        "jit(init)(params)": "on the first device",
        "jit(init)(params), in jax.set_mesh": "whole on all devices",
        "jit(init)(params), explicit axes": "as the parameters",
        "jit(init, out_shardings=...)(params)": "as the parameters",
    }


def test_a_dimension_that_devices_cannot_share_is_refused_by_jax(jax_pool: Pool) -> None:
    (said,) = jax_pool("devices").run(jax_sharded.uneven)
    assert re.search("divi(de|sible)", said)


@cases
def test_zero_1(case: Case, jax_pool: Pool, agreed: Agreed) -> None:
    (seen,) = jax_pool("uncontracted").run(jax_sharded.zero, case)
    # Of each parameter what one of 8, 2, 8, 4 and 1 devices has; and the count and two scales.
    elements = 96 // 8 + 12 // 2 + 288 // 8 + 48 // 4 + 6
    arrays = {"vsgd": 3, "constant_vsgd": 2}[case.kind]
    size = {"float32": 4, "bfloat16": 2}[case.dtype]
    assert seen.here == [arrays * elements * size + 4 + 2 * 4] * 8
    assert set(seen.update) == {"all-gather"}
    agreed(f"ZeRO-1 by out_shardings, {case.dtype}", MESH, seen.strayed)


# --- shard_map. ---


@mapped
@pytest.mark.parametrize("case", [Case(), Case("constant_vsgd", "float64")], ids=["vsgd", "constant_vsgd"])
def test_the_whole_step_in_shard_map(case: Case, jax_pool: Pool, agreed: Agreed) -> None:
    (strayed,) = jax_pool("uncontracted").run(jax_manual.inside, case)
    agreed(f"shard_map of the whole step, {case.dtype}", MESH, strayed)


@mapped
def test_the_gradient_alone_in_shard_map(jax_pool: Pool, agreed: Agreed) -> None:
    (strayed,) = jax_pool("uncontracted").run(jax_manual.outside, COMPACT)
    agreed("shard_map of the gradient, bfloat16 parameters and state, rounded at random", MESH, strayed)


@mapped
def test_a_shard_in_shard_map_is_rounded_as_an_array_of_its_own(jax_pool: Pool, agreed: Agreed) -> None:
    (strayed,) = jax_pool("uncontracted").run(jax_manual.rounded_inside, COMPACT._replace(gradients="given"))
    agreed("shard_map of the whole step, rounded at random, from each shard alone", MESH, strayed)


@mapped
def test_a_seed_for_each_shard_rounds_it_differently(jax_pool: Pool) -> None:
    assert jax_pool("devices").run(jax_manual.equally_rounded, False) == [1.0]
    # Two that go up with the same probability p, uniform on average, agree in p^2 + (1 - p)^2: 2/3, +-0.02 for 512.
    assert jax_pool("devices").run(jax_manual.equally_rounded, True) == [pytest.approx(2 / 3, abs=0.08)]


@mapped
def test_jax_refuses_replicas_that_have_seeds_of_their_own(jax_pool: Pool) -> None:
    (said,) = jax_pool("devices").run(jax_manual.replicas_with_seeds_of_their_own)
    assert "out_specs" in said
    assert "model" in said


# --- GPUs: one or more, in pairs where they can be. ---


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", BOUND["summed"])
@pytest.mark.parametrize("run", [jax_sharded.trained, jax_manual.inside], ids=["jit", "shard_map"])
def test_training_on_gpus(run: Callable[..., float], dtype: str, jax_gpus: Gpus, agreed: Agreed) -> None:
    (strayed,) = jax_gpus[0].run(run, Case(dtype=dtype, gradients="summed"))
    agreed(f"{dtype}, gradients summed in another order", "JAX, GPUs", strayed, BOUND["summed"][dtype])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", BOUND["summed"])
def test_zero_1_on_gpus(dtype: str, jax_gpus: Gpus, agreed: Agreed) -> None:
    (seen,) = jax_gpus[0].run(jax_sharded.zero, Case(dtype=dtype, gradients="summed"))
    agreed(f"ZeRO-1 by out_shardings, {dtype}", "JAX, GPUs", seen.strayed, BOUND["summed"][dtype])
