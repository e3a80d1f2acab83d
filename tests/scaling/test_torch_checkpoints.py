"""Checkpoints of sharded training: saved on two processes, loaded on any number, and continued, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

if not torch.distributed.is_available():
    pytest.skip("this build of torch has no torch.distributed", allow_module_level=True)

from scaling import torch_checkpoints  # noqa: E402
from scaling.ranks import Ranks  # noqa: E402
from scaling.torch_problem import Case  # noqa: E402

Pools = Callable[[int], Ranks]
pytestmark = pytest.mark.slow

CASES = {
    "VSGD": Case({}),
    "ConstantVSGD": Case({}, "ConstantVSGD"),
    "compact": Case({"state_dtype": "bfloat16", "stochastic_rounding": True}, dtype=torch.bfloat16),
    "bfloat16": Case({}, dtype=torch.bfloat16),
}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
FORMS = {
    "plain": {},
    "flatten_optimizer_state_dict": {"flat": True},
    "asynchronous": {"asynchronous": True},
}


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # one process needs no group
@cases
@pytest.mark.parametrize("form", FORMS)
def test_saved_on_two_and_loaded_on_any(form: str, case: Case, ranks: Pools, agreed, tmp_path: Path) -> None:
    ranks(2).run(torch_checkpoints.save, case, str(tmp_path), **FORMS[form])
    flat = form == "flatten_optimizer_state_dict"
    loads = {size: ranks(size).run(torch_checkpoints.load, case, str(tmp_path), flat) for size in (2, 4)}
    loads[1] = [torch_checkpoints.load(case, str(tmp_path), flat)]
    for size, strayed in loads.items():
        agreed("DCP: saved on 2, loaded and continued", f"torch, {size} process{'es' * (size > 1)}", max(map(max, strayed)))


@cases
def test_a_full_state_dict_is_gathered_and_given_back(case: Case, ranks: Pools, agreed) -> None:
    (gathered, names, strayed), (_, others_names, _) = ranks(2).run(torch_checkpoints.whole_state, case)
    assert (names, others_names) == (6, 0)
    agreed("full state dict, gathered on rank 0 and broadcast", "torch, 2 processes", max(gathered, strayed))


def test_state_that_is_not_sharded_like_the_parameters_is_refused(ranks: Pools) -> None:
    for said in ranks(2).run(torch_checkpoints.refused, CASES["VSGD"]):
        assert said == {
            "local shards": ("mu_g of parameter 0 has shape torch.Size([2, 6]), but the parameter has (4, 6)", 0.0),
            "whole": (
                "state of a parameter of shape (4, 6) is a plain tensor, but the parameter is placed as (Shard(dim=0),) on "
                "2 processes: load it with torch.distributed.checkpoint.state_dict.set_optimizer_state_dict",
                0.0,
            ),
            "sharded": (
                "state of a parameter of shape (4, 6) is placed as (Shard(dim=0),) on 2 processes, but the parameter is a "
                "plain tensor: load it with torch.distributed.checkpoint.state_dict.set_optimizer_state_dict",
                0.0,
            ),
        }
