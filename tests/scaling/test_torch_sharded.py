"""Training by several processes of torch.distributed ends where one process ends that has the mean of their gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest

torch = pytest.importorskip("torch")

if not torch.distributed.is_available():
    pytest.skip("this build of torch has no torch.distributed", allow_module_level=True)

from drivers import HAS_NUMBA  # noqa: E402
from scaling import torch_sharded  # noqa: E402
from scaling.ranks import Ranks, torch_group  # noqa: E402
from scaling.torch_problem import Case  # noqa: E402

TWO, FOUR = "torch, 2 processes", "torch, 4 processes"
ENGINES = {
    "loop": {"foreach": False},
    "foreach": {"foreach": True},
    **({"numba": {"fused": True}} if HAS_NUMBA else {}),
    "default": {},
}
COMPACT = {"state_dtype": "bfloat16"}
DTYPES: dict[str, dict[str, Any]] = {
    "float32": {},
    "float64": {"dtype": torch.float64},
    "bfloat16 parameters": {"dtype": torch.bfloat16},
    "mixed precision": {"computed_in": torch.bfloat16},
}
engines = pytest.mark.parametrize("engine", ENGINES)
Pools = Callable[[int], Ranks]
Agreed = Callable[..., None]

# How many elements of weights and biases two ranks hold: shared evenly, unevenly, and by one alone.
SHARDS = [[12, 2, 8, 2, 3, 1], [12, 2, 4, 1, 0, 0]]


@pytest.fixture(scope="module")
def gpu_ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """One rank where there is one GPU, two where there are more: sums of two have but one order."""
    pool = Ranks(
        min(torch.cuda.device_count(), 2), tmp_path_factory.mktemp("ranks"), partial(torch_group, "cuda:nccl,cpu:gloo")
    )
    yield pool
    pool.stop()


@engines
def test_ddp_keeps_replicas_bitwise_equal(engine: str, ranks: Pools, agreed: Agreed) -> None:
    (strayed, one), (_, other) = ranks(2).run(torch_sharded.ddp, Case(ENGINES[engine]))
    assert one == other
    agreed("DDP", TWO, strayed)


@engines
@pytest.mark.parametrize("kind", ["VSGD", "ConstantVSGD"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_fsdp2(kind: str, engine: str, dtype: str, ranks: Pools, agreed: Agreed) -> None:
    case = Case(ENGINES[engine], kind, **DTYPES[dtype])
    (strayed, one), (_, other) = ranks(2).run(torch_sharded.fsdp, case, 2)
    assert [one, other] == SHARDS
    agreed(f"FSDP2, even, uneven and empty shards, {dtype}", TWO, strayed)


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"foreach": False}, {"fused": True}], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_fsdp2_on_gpus(dtype: str, options: dict[str, Any], gpu_ranks: Ranks, agreed: Agreed) -> None:
    if options.get("fused"):
        pytest.importorskip("triton")
    case = Case(options, **DTYPES[dtype], device="cuda")
    strayed = max(far for far, _ in gpu_ranks.run(torch_sharded.fsdp, case, gpu_ranks.size))
    agreed(f"FSDP2, {dtype}", f"torch, {gpu_ranks.size} GPUs", strayed)


@engines
@pytest.mark.parametrize("options", [{}, COMPACT], ids=["float32 state", "bfloat16 state"])
def test_a_step_communicates_nothing(options: dict[str, Any], engine: str, ranks: Pools) -> None:
    for counts in ranks(2).run(torch_sharded.communication, Case({**ENGINES[engine], **options})):
        assert counts["norm"] > 0
        assert counts["step"] == 0


@engines
@pytest.mark.parametrize("rounded", ["state", "state and parameters"])
def test_fsdp2_rounds_as_one_process_does(rounded: str, engine: str, ranks: Pools, agreed: Agreed) -> None:
    options = {**ENGINES[engine], **COMPACT, "stochastic_rounding": rounded != "state"}
    case = Case(options, dtype=torch.float32 if rounded == "state" else torch.bfloat16)
    ((strayed, _), _) = ranks(2).run(torch_sharded.fsdp, case, 2)
    agreed(f"FSDP2, {rounded} rounded at random to bfloat16", TWO, strayed)


@pytest.mark.parametrize("options", [{}, COMPACT], ids=["float32 state", "bfloat16 state"])
def test_hsdp(options: dict[str, Any], ranks: Pools, agreed: Agreed) -> None:
    (strayed, one), (_, other), *replicas = ranks(4).run(torch_sharded.fsdp, Case(options), 2, 2)
    assert [one, other] == SHARDS
    assert [here for _, here in replicas] == SHARDS
    agreed("HSDP, 2 x 2", FOUR, strayed)


@engines
def test_tensor_parallel(engine: str, ranks: Pools, agreed: Agreed) -> None:
    ((strayed, placements), _) = ranks(2).run(torch_sharded.tensor_parallel, Case(ENGINES[engine], dtype=torch.float64))
    rows, columns = "(Shard(dim=0),)", "(Shard(dim=1),)"
    assert placements == [rows, rows, columns, "(Replicate(),)", "whole", "whole"]
    # The halves of an output are summed in another order.
    agreed("tensor parallelism, float64", TWO, strayed, 1e-10)


@pytest.mark.parametrize("options", [{}, COMPACT], ids=["float32 state", "bfloat16 state"])
def test_fsdp2_on_tensor_parallel(options: dict[str, Any], ranks: Pools, agreed: Agreed) -> None:
    # One engine on both sides: where shards are no contiguous pieces, state in bfloat16 is not numba's.
    strayed = max(ranks(4).run(torch_sharded.two_dimensional, Case({**options, "foreach": False})))
    agreed("FSDP2 on tensor parallelism, 2 x 2, equal gradients", FOUR, strayed)


@pytest.mark.parametrize("engine", ["loop", "foreach"])
@pytest.mark.parametrize("placements", ["00", "01", "10", "11", "0w", "w1"])
def test_noise_is_that_of_the_place_in_the_whole_tensor(placements: str, engine: str, ranks: Pools, agreed: Agreed) -> None:
    for shape in ((7, 5), (3, 2, 5)):
        options = {**ENGINES[engine], **COMPACT}
        strayed = ranks(4).run(torch_sharded.placed, Case(options), placements, shape=shape, mesh=(2, 2))
        agreed("rounding at random, sharded in any dimension", FOUR, max(strayed))


def test_no_engine_takes_a_shard_for_a_contiguous_piece(ranks: Pools) -> None:
    # numba leaves it to the loop, which rounds by other last bits: by another noise it would stray by thousandths.
    strayed = ranks(2).run(torch_sharded.placed, Case(COMPACT), "1", shape=(7, 5), mesh=(2,))
    assert max(strayed) < 1e-6


def test_zero_redundancy_optimizer(ranks: Pools, agreed: Agreed) -> None:
    (strayed, here), (_, there) = ranks(2).run(torch_sharded.zero, Case({}))
    assert here + there == 6
    assert 0 < here < 6
    agreed("ZeroRedundancyOptimizer with DDP", TWO, strayed)


def test_a_gradient_may_be_placed_otherwise(ranks: Pools) -> None:
    assert ranks(2).run(torch_sharded.gradients_placed_otherwise) == [[0.0, 0.0]] * 2


def test_at_lr_0_a_gradient_that_is_zero_on_one_rank_only_is_a_step_on_both(ranks: Pools) -> None:
    assert ranks(2).run(torch_sharded.steps_counted_at_lr_0) == [[1.0, 0.0]] * 2


@pytest.mark.parametrize("kind", ["VSGD", "ConstantVSGD"])
def test_what_is_said_of_the_gradients_is_of_all_shards(kind: str, ranks: Pools, agreed: Agreed) -> None:
    one, other = ranks(2).run(torch_sharded.seen, Case({}, kind))
    assert one == other
    for what, strayed in one.items():
        # Sums of shards are summed in another order.
        agreed(f"{what} on FSDP2, relatively", TWO, strayed, 1e-6)


@pytest.mark.compiler
def test_a_compiled_step_of_an_uneven_shard(ranks: Pools, agreed: Agreed) -> None:
    agreed("torch.compile of the step, uneven shards", TWO, max(ranks(2).run(torch_sharded.compiled)), 1e-6)
