"""Test that training by several processes of torch.distributed equals one process with the mean of their gradients."""

from __future__ import annotations

from itertools import cycle, product
from typing import Any

import pytest

torch = pytest.importorskip("torch")

if not torch.distributed.is_available():
    pytest.skip("this build of torch has no torch.distributed", allow_module_level=True)

from scaling import torch_problem as problem  # noqa: E402
from scaling.ranks import Agreed, On  # noqa: E402
from scaling.torch_problem import Case, fsdp2  # noqa: E402

from vsgd.torch.noise_scale import NoiseScaleMeter  # noqa: E402

TWO, FOUR = "torch, 2 processes", "torch, 4 processes"
# The default engine is numba's, if it is installed.
ENGINES = {"loop": {"foreach": False}, "foreach": {"foreach": True}, "default": {}}
COMPACT = {"state_dtype": "bfloat16"}
STORAGES = {
    "float32": Case({}),
    "float64": Case({}, dtype=torch.float64),
    "bfloat16 parameters": Case({}, dtype=torch.bfloat16),
    "mixed precision": Case({}, computed_in=torch.bfloat16),
    "state rounded at random to bfloat16": Case(COMPACT),
    "state and parameters rounded at random to bfloat16": Case({**COMPACT, "stochastic_rounding": True}, dtype=torch.bfloat16),
}
#: Each storage with each engine; the rules alternate, so that each meets every storage and every engine.
CELLS = [(*cell, kind) for cell, kind in zip(product(STORAGES, ENGINES), cycle(["VSGD", "ConstantVSGD"]), strict=False)]

# How many elements of weights and biases two ranks hold: shared evenly, unevenly, and held by one rank alone.
SHARDS = [[12, 2, 8, 2, 3, 1], [12, 2, 4, 1, 0, 0]]


@pytest.mark.parametrize("engine", ENGINES)
def test_ddp_keeps_replicas_bitwise_equal(engine: str, on: On, agreed: Agreed) -> None:
    (strayed, one), (_, other) = on("torch 2", "torch_sharded.ddp", Case(ENGINES[engine]))
    assert one == other
    agreed("DDP", TWO, strayed)


@fsdp2
@pytest.mark.parametrize(("storage", "engine", "kind"), CELLS)
def test_fsdp2_and_its_steps_communicate_nothing(storage: str, engine: str, kind: str, on: On, agreed: Agreed) -> None:
    case = STORAGES[storage]._replace(kind=kind)
    (strayed, one), (_, other) = on("torch 2", "torch_sharded.fsdp", case.with_options(ENGINES[engine]))
    assert [one, other] == SHARDS
    agreed(f"FSDP2, even, uneven and empty shards, {storage}", TWO, strayed)


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"foreach": False}, {"fused": True}], ids=str)
@pytest.mark.parametrize("storage", list(STORAGES)[:4])
def test_fsdp2_on_gpus(storage: str, options: dict[str, Any], on: On, agreed: Agreed) -> None:
    if options.get("fused"):
        pytest.importorskip("triton")
    seen = on("torch gpus", "torch_sharded.fsdp", STORAGES[storage]._replace(device="cuda", options=options))
    agreed(f"FSDP2, {storage}", f"torch, {len(seen)} GPUs", max(strayed for strayed, _ in seen))


@fsdp2
@pytest.mark.parametrize("options", [{}, COMPACT], ids=["float32 state", "bfloat16 state"])
def test_hsdp_and_fsdp2_on_tensor_parallelism(options: dict[str, Any], on: On, agreed: Agreed) -> None:
    seen = on("torch 4", "torch_sharded.fsdp", Case(options), 2, 2)
    assert [here for _, here in seen] == SHARDS * 2
    agreed("HSDP, 2 x 2", FOUR, max(strayed for strayed, _ in seen))
    # Use one engine on both sides, because numba does not step bfloat16 state of shards that are not contiguous.
    strayed = max(on("torch 4", "torch_sharded.tensor_parallel", Case({**options, "foreach": False}), 2, 2))
    agreed("FSDP2 on tensor parallelism, 2 x 2, equal gradients", FOUR, strayed)


@fsdp2
@pytest.mark.parametrize(("pool", "shape", "reductions"), [("torch 2", (), 2), ("torch 4", (2, 2), 4)], ids=["FSDP2", "HSDP"])
def test_the_first_gradient_calibrates_all_shards_alike(
    pool: str, shape: tuple[int, ...], reductions: int, on: On, agreed: Agreed
) -> None:
    for strayed, unit, counts in on(pool, "torch_sharded.calibrated", Case({"prior_strength": "auto"}), *shape):
        agreed("FSDP2, calibrated by the first gradient", TWO if pool == "torch 2" else FOUR, strayed, 1e-6)
        assert abs(unit) < 1e-7
        assert counts == [reductions, 0]


@pytest.mark.parametrize("engine", ENGINES)
def test_tensor_parallel(engine: str, on: On, agreed: Agreed) -> None:
    case = Case(ENGINES[engine], dtype=torch.float64)
    # The halves of an output are summed in another order.
    agreed("tensor parallelism, float64", TWO, max(on("torch 2", "torch_sharded.tensor_parallel", case, 2)), 1e-10)


@pytest.mark.parametrize(
    ("pool", "placements", "engine", "bound"),
    [
        ("torch 4", "00", "loop", 0.0),
        ("torch 4", "01", "foreach", 0.0),
        ("torch 4", "10", "loop", 0.0),
        ("torch 4", "11", "foreach", 0.0),
        ("torch 4", "0w", "foreach", 0.0),
        ("torch 4", "w1", "loop", 0.0),
        # numba leaves this case to the loop, whose last bits differ; different noise would cause a deviation of thousandths.
        ("torch 2", "1", "default", 1e-6),
    ],
)
def test_noise_is_that_of_the_place_in_the_whole_tensor(
    pool: str, placements: str, engine: str, bound: float, on: On, agreed: Agreed
) -> None:
    strayed = on(pool, "torch_sharded.placed", Case({**ENGINES[engine], **COMPACT}), placements)
    agreed("rounding at random, sharded in any dimension", FOUR if pool == "torch 4" else TWO, max(strayed), bound)


@pytest.mark.compiler
def test_a_compiled_step_of_uneven_shards(on: On, agreed: Agreed) -> None:
    strayed = on("torch 2", "torch_sharded.placed", Case({"foreach": False}), "0", True)
    agreed("torch.compile of the step, uneven shards", TWO, max(strayed), 1e-6)


def test_zero_redundancy_optimizer(on: On, agreed: Agreed) -> None:
    (strayed, here), (_, there) = on("torch 2", "torch_sharded.zero", Case({}))
    assert here + there == 6
    assert 0 < here < 6
    agreed("ZeroRedundancyOptimizer with DDP", TWO, strayed)


def test_a_gradient_may_be_placed_otherwise(on: On) -> None:
    assert on("torch 2", "torch_sharded.gradients_placed_otherwise") == [[0.0, 0.0]] * 2


def test_at_lr_0_a_gradient_that_is_zero_on_one_rank_only_is_a_step_on_both(on: On) -> None:
    assert on("torch 2", "torch_sharded.steps_counted_at_lr_0") == [[1.0, 0.0]] * 2


@fsdp2
@pytest.mark.parametrize("kind", ["VSGD", "ConstantVSGD"])
def test_what_is_said_of_the_gradients_is_of_all_shards(kind: str, on: On, agreed: Agreed) -> None:
    one, other = on("torch 2", "torch_sharded.seen", Case({}, kind))
    assert one == other
    for what, strayed in one.items():
        # The sums over shards are in another order.
        agreed(f"{what} on FSDP2, relatively", TWO, strayed, 1e-6)


def test_a_prior_strength_is_that_of_the_whole_gradients(on: On, agreed: Agreed) -> None:
    one, other = on("torch 2", "torch_sharded.strengths")
    assert one == other
    for name in ("rows", "columns", "replicated"):
        # The sums of 24 numbers are in another order.
        agreed("prior_strength_from, sharded gradients", TWO, abs(one[name] / one["whole"] - 1), 5e-7)
    # 3 and -1 times a gradient add up to twice the gradient: parts of a sum must be summed before they are squared.
    agreed("prior_strength_from, partial gradients", TWO, abs(one["partial"] / one["doubled"] - 1), 5e-7)


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_the_noise_scale_of_ranks_is_that_of_micro_batches(micro_batches: int, on: On) -> None:
    case = Case({}, dtype=torch.float64)
    model = problem.network(case)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with NoiseScaleMeter(optimizer, micro_batch_size=8) as meter:
        for step in range(problem.STEPS):
            optimizer.zero_grad()
            for part in range(2 * micro_batches):
                (problem.loss_of(model, step, part, case) / 2).backward()
            optimizer.step()
    for measured, collectives in on("torch 2", "torch_sharded.noise_scale", micro_batches):
        assert measured == pytest.approx(meter.read(), rel=1e-9)
        assert collectives == 1


@fsdp2
def test_the_noise_scale_of_sharded_parameters_is_refused(on: On) -> None:
    with pytest.raises(TypeError, match="DTensor, but must be a plain tensor: FSDP is not supported"):
        on("torch 2", "torch_sharded.sharded_noise_scale")


def test_an_observer_watches_shards_and_sums_when_asked(on: On) -> None:
    for apart, surprise, counts in on("torch 2", "torch_sharded.observed"):
        assert apart == 0
        assert surprise < 1e-12
        assert counts == [0, 1]
