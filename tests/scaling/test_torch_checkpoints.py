"""Test that checkpoints saved on two processes load on any number of processes and continue bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

if not torch.distributed.is_available():
    pytest.skip("this build of torch has no torch.distributed", allow_module_level=True)

from scaling import torch_checkpoints  # noqa: E402
from scaling.ranks import Agreed, On  # noqa: E402
from scaling.torch_problem import Case, fsdp2  # noqa: E402

pytestmark = [pytest.mark.slow, fsdp2]

CASES = {
    "VSGD": Case({}),
    "ConstantVSGD": Case({}, "ConstantVSGD"),
    "compact": Case({"state_dtype": "bfloat16", "stochastic_rounding": True}, dtype=torch.bfloat16),
    "bfloat16": Case({}, dtype=torch.bfloat16),
}
#: Each form with two kinds of state, and each kind of state at least once.
SAVED = [
    ("plain", "VSGD"),
    ("plain", "compact"),
    ("flat", "ConstantVSGD"),
    ("flat", "compact"),
    ("asynchronous", "bfloat16"),
    ("asynchronous", "compact"),
]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # one process needs no group
@pytest.mark.parametrize(("form", "name"), SAVED)
def test_saved_on_two_and_loaded_on_any(form: str, name: str, on: On, agreed: Agreed, tmp_path: Path) -> None:
    how = CASES[name], str(tmp_path), form
    on("torch 2", "torch_checkpoints.save", *how)
    loads = {f"{size} processes": on(f"torch {size}", "torch_checkpoints.load", *how) for size in (2, 4)}
    loads["1 process"] = [torch_checkpoints.load(*how)]
    for where, strayed in loads.items():
        agreed("DCP: saved on 2, loaded and continued", f"torch, {where}", max(strayed))


@pytest.mark.parametrize("name", ["ConstantVSGD", "compact", "bfloat16"])
def test_a_full_state_dict_is_gathered_and_given_back(name: str, on: On, agreed: Agreed) -> None:
    strayed = on("torch 2", "torch_checkpoints.gathered", CASES[name])
    agreed("full state dict, gathered on rank 0 and broadcast", "torch, 2 processes", max(strayed))


def test_state_that_is_not_sharded_like_the_parameters_is_refused(on: On) -> None:
    placed, advice = "is placed as (Shard(dim=0),) on 2 processes", "load it with torch.distributed.checkpoint.state_dict"
    for said, strayed in on("torch 2", "torch_checkpoints.refused", CASES["VSGD"]):
        assert strayed == 0
        assert said == {
            "local shards": "mu_g of parameter 0 has shape torch.Size([2, 6]), but the parameter has (4, 6)",
            "whole": "state of a parameter of shape (4, 6) is a plain tensor, but the parameter "
            f"{placed}: {advice}.set_optimizer_state_dict",
            "sharded": f"state of a parameter of shape (4, 6) {placed}, but the parameter is a plain tensor: "
            f"{advice}.set_optimizer_state_dict",
        }
