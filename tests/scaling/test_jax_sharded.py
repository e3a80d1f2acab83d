"""Test that training on a mesh of devices equals training on one device, and that the state is sharded like the parameters."""

from __future__ import annotations

from typing import Any

import pytest

jax = pytest.importorskip("jax")
pytest.importorskip("optax")

from scaling.jax_problem import BOUND, Case  # noqa: E402
from scaling.ranks import Agreed, On  # noqa: E402

# EXACT: sums of few digits are exact, so the gradients are equal in any order of summation.
EXACT, PROCESSES, CONTRACTED = "jax uncontracted", "jax processes", "jax"
WHERE = {
    EXACT: "JAX, 4 x 2 CPU devices",
    PROCESSES: "JAX, 2 processes of 2 CPU devices",
    CONTRACTED: "JAX, 4 x 2 CPU devices",
    "jax gpus": "JAX, GPUs",
    "jax gpu-processes": "JAX, 2 processes of 1 GPU",
}
typed = pytest.mark.skipif(not hasattr(jax, "set_mesh"), reason="this JAX has no sharding in types")
mapped = pytest.mark.skipif(not hasattr(jax, "shard_map"), reason="this JAX has no jax.shard_map")
gpu, slow = pytest.mark.gpu, pytest.mark.slow
FLOAT32, DOUBLE = Case(), Case("constant_vsgd", "float64")
COMPACT = Case(dtype="bfloat16", compact=True)
CONSTANT = COMPACT._replace(kind="constant_vsgd")

#: What ran, where, the function, the case, and marks. Each rule is combined with each dtype, and each kind of axes with both.
TRAININGS: list[tuple[str, str, str, Case, list[Any]]] = [
    ("auto axes", EXACT, "trained", FLOAT32, []),
    ("auto axes", EXACT, "trained", DOUBLE, []),
    ("auto axes, rounded at random", EXACT, "trained", COMPACT, []),
    ("explicit axes", EXACT, "trained", Case("constant_vsgd", types="Explicit"), [typed]),
    ("explicit axes", EXACT, "trained", Case(dtype="float64", types="Explicit"), [typed]),
    ("explicit axes, rounded at random", EXACT, "trained", CONSTANT._replace(types="Explicit"), [typed]),
    ("auto axes, equal gradients", EXACT, "trained", Case(dtype="complex64", gradients="given"), []),
    ("ZeRO-1 by out_shardings", EXACT, "zero", FLOAT32, []),
    ("ZeRO-1 by out_shardings, rounded at random", EXACT, "zero", CONSTANT, []),
    ("shard_map of the whole step", EXACT, "inside", FLOAT32._replace(gradients="given"), [mapped]),
    ("shard_map of the whole step", EXACT, "inside", DOUBLE._replace(gradients="given"), [mapped]),
    ("shard_map of the gradient, rounded at random", EXACT, "outside", COMPACT._replace(gradients="given"), [mapped]),
    ("jax.distributed, sharded by 2 x 2", PROCESSES, "trained", FLOAT32, [slow]),
    ("jax.distributed, ZeRO-1, rounded at random", PROCESSES, "zero", CONSTANT, [slow]),
]
for _case in (FLOAT32, DOUBLE):
    TRAININGS += [
        # The compiler unrolls a loop by the shard's length, and so decides which of two products it fuses with their sum.
        ("equal gradients, XLA's contraction", CONTRACTED, "trained", _case._replace(gradients="given"), []),
        ("gradients summed in another order", CONTRACTED, "trained", _case._replace(gradients="summed"), []),
        ("calibrated by the first gradient", CONTRACTED, "trained", _case._replace(gradients="summed", auto=True), []),
        ("calibrated in shard_map", CONTRACTED, "inside", _case._replace(gradients="given", auto=True), [mapped]),
        ("gradients summed in another order", "jax gpus", "trained", _case._replace(gradients="summed"), [gpu]),
        ("ZeRO-1 by out_shardings", "jax gpus", "zero", _case._replace(gradients="summed"), [gpu]),
        ("shard_map of the whole step", "jax gpus", "inside", _case._replace(gradients="given"), [gpu, mapped]),
        ("jax.distributed", "jax gpu-processes", "trained", _case._replace(gradients="summed"), [gpu]),
    ]
ROWS = [pytest.param(*row, marks=marks, id=f"{row[1]}-{row[0]}-{row[3].dtype}") for *row, marks in TRAININGS]


@pytest.mark.parametrize(("what", "pool", "how", "case"), ROWS)
def test_training_ends_where_one_device_ends_and_lies_as_the_parameters(
    what: str, pool: str, how: str, case: Case, on: On, agreed: Agreed
) -> None:
    bound = 0.0 if pool in (EXACT, PROCESSES) else BOUND[case.gradients][case.dtype]
    agreed(f"{what}, {case.dtype}", WHERE[pool], max(on(pool, f"jax_sharded.{how}", case)), bound)


@pytest.mark.parametrize("case", [FLOAT32, CONSTANT], ids=["vsgd", "compact"])
def test_a_step_communicates_nothing(case: Case, on: On) -> None:
    (found,) = on("jax", "jax_sharded.communication", case._replace(gradients="summed"))
    assert found["step"] == found["step, injected"] == []
    assert found["training"] == found["gradients"]
    assert "all-reduce" in found["gradients"]  # shows that the search finds collectives


def test_a_prior_strength_is_that_of_the_whole_gradients(on: On) -> None:
    # The tolerance allows for sums of about 500 float32 numbers in another order.
    assert on("jax", "jax_sharded.strength", FLOAT32) == pytest.approx([0], abs=1e-6)


@mapped
def test_a_shard_in_shard_map_is_rounded_as_an_array_of_its_own_by_the_seed_that_it_is_given(on: On) -> None:
    ((one_seed, one_for_each),) = on("jax", "jax_sharded.equally_rounded")
    assert one_seed == 1
    # Two roundings that go up with the same probability p, uniform on average, agree in p^2 + (1 - p)^2: 2/3, +-0.02 for 512.
    assert one_for_each == pytest.approx(2 / 3, abs=0.08)


@pytest.mark.parametrize("inside", [False, pytest.param(True, marks=mapped)])
def test_an_observer_watches_each_shard(inside: bool, on: On, agreed: Agreed) -> None:
    (strayed,) = on("jax", "jax_sharded.observed", inside)
    # XLA fuses products and sums differently for shards.
    agreed("observer's posterior, relatively" + ", in shard_map" * inside, WHERE["jax"], strayed, 3e-5)
