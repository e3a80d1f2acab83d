"""What torch.distributed asks of an optimizer, in one process: its checkpoints' way to make state, and sharded tensors."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import torch.distributed as dist  # noqa: E402
from adapters.torch.torch_optimizers import ENGINES, STATE_NAMES, assert_same_state, train  # noqa: E402
from torch import nn  # noqa: E402
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict  # noqa: E402
from torch.testing import assert_close  # noqa: E402

from vsgd.torch import VSGD, ConstantVSGD  # noqa: E402

if not dist.is_available():
    pytest.skip("this build of torch has no torch.distributed", allow_module_level=True)

classes = pytest.mark.parametrize("cls", [VSGD, ConstantVSGD])


def network(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(4, 3).to(dtype)


@classes
@pytest.mark.parametrize("tensor_lr", [False, True])
def test_a_distributed_checkpoint_makes_state_without_counting_a_step(cls: type, tensor_lr: bool) -> None:
    model = network()
    before = copy.deepcopy(list(model.parameters()))
    optimizer = cls(model.parameters(), lr=torch.tensor(0.01) if tensor_lr else 0.01, weight_decay=0.1)
    state_dict = get_optimizer_state_dict(model, optimizer)
    assert sorted(state_dict["state"]) == ["bias", "weight"]
    for state in optimizer.state.values():
        assert list(state) == ["step", *STATE_NAMES[cls]]
        assert state["step"] == 0
    assert_close(list(model.parameters()), before, rtol=0, atol=0)
    assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(0.01)
    twin = network()
    other = cls(twin.parameters(), weight_decay=0.1)
    train(optimizer, list(model.parameters()), range(3))
    train(other, list(twin.parameters()), range(3))
    assert_close(list(model.parameters()), list(twin.parameters()))
    assert_same_state(optimizer, other)


@classes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_distributed_checkpoint_resumes_bit_by_bit(cls: type, dtype: torch.dtype) -> None:
    model = network(dtype)
    optimizer = cls(model.parameters())
    train(optimizer, list(model.parameters()), range(3))
    saved = copy.deepcopy((model.state_dict(), get_optimizer_state_dict(model, optimizer)))
    resumed = network(dtype)
    resumed_optimizer = cls(resumed.parameters())
    resumed.load_state_dict(saved[0])
    set_optimizer_state_dict(resumed, resumed_optimizer, saved[1])
    assert_same_state(resumed_optimizer, optimizer)
    train(optimizer, list(model.parameters()), range(3, 6))
    train(resumed_optimizer, list(resumed.parameters()), range(3, 6))
    assert_close(list(resumed.parameters()), list(model.parameters()), rtol=0, atol=0)


@pytest.mark.parametrize("case", ["lr is not 0", "a gradient is not 0", "there is state"])
def test_any_other_step_at_zero_is_counted(case: str) -> None:
    # A warm-up may begin at lr 0, and gradients may vanish: only both, at the very first step, is no step of training.
    param = nn.Parameter(torch.ones(3))
    optimizer = VSGD([param], lr=0.1 if case != "a gradient is not 0" else 0.0)
    param.grad = torch.zeros(3)
    if case == "a gradient is not 0":
        param.grad[1] = 1.0
    if case == "there is state":
        optimizer.step()
        optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()
    assert optimizer.state[param]["step"] == (2 if case == "there is state" else 1)


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    if not dist.is_gloo_available():
        pytest.skip("this build of torch has no gloo")
    store = dist.FileStore(str(tmp_path_factory.mktemp("store") / "file"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield dist.device_mesh.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@classes
@pytest.mark.parametrize("engine", [{}, *ENGINES], ids=str)
def test_a_sharded_parameter_has_sharded_state_and_the_same_steps(cls: type, engine: dict[str, Any], mesh: Any) -> None:
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    model = network()
    plain = [nn.Parameter(param.detach().clone()) for param in model.parameters()]
    sharded = [nn.Parameter(distribute_tensor(param.detach().clone(), mesh, [Shard(0)])) for param in model.parameters()]
    # A parameter that is not sharded beside those that are: one foreach call cannot have both.
    sharded[1] = nn.Parameter(plain[1].detach().clone())
    optimizer, other = cls(sharded, **engine), cls(plain, **engine)
    for seed in range(4):
        train(other, plain, range(seed, seed + 1))
        sharded[0].grad = distribute_tensor(plain[0].grad.clone(), mesh, [Shard(0)])
        sharded[1].grad = plain[1].grad.clone()
        optimizer.step()
    assert_close(sharded[0].full_tensor(), plain[0], rtol=0, atol=0)
    assert_close(sharded[1], plain[1], rtol=0, atol=0)
    for name in STATE_NAMES[cls]:
        state = optimizer.state[sharded[0]][name]
        assert isinstance(state, DTensor)
        assert state.placements == sharded[0].placements
        assert_close(state.full_tensor(), other.state[plain[0]][name], rtol=0, atol=0)
