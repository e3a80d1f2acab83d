"""A fused step that repeats the last one: whatever changes in between, it is the step that the loop would take."""

from __future__ import annotations

import importlib.util
import weakref
from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("numba")

from adapters.torch.torch_optimizers import randn_like  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.testing import assert_close  # noqa: E402

from vsgd.backends.torch import dispatch  # noqa: E402
from vsgd.torch import VSGD  # noqa: E402

SHAPES = ((4, 4), (5,), (3, 2))


def start(**engine: Any) -> tuple[list[nn.Parameter], VSGD]:
    params = [nn.Parameter(tensor) for tensor in randn_like([torch.empty(shape) for shape in SHAPES], seed=99)]
    return params, VSGD([{"params": params[:2]}, {"params": params[2:], "lr": 0.1}], **engine)


def step(params: list[nn.Parameter], optimizer: VSGD, seed: int) -> None:
    for param, grad in zip(params, randn_like(params, seed), strict=True):
        param.grad = grad
    optimizer.step()


def assert_same(params: list[nn.Parameter], optimizer: VSGD, others: list[nn.Parameter], other: VSGD) -> None:
    assert_close(params, others)
    assert_close([dict(optimizer.state[param]) for param in params], [dict(other.state[param]) for param in others])


def replace_state(params: list[nn.Parameter], optimizer: VSGD) -> None:
    optimizer.state[params[0]]["b_g"] = optimizer.state[params[0]]["b_g"] * 100


def replace_all_state_of_a_parameter(params: list[nn.Parameter], optimizer: VSGD) -> None:
    optimizer.state[params[1]] = {name: value + 1 for name, value in optimizer.state[params[1]].items()}


def forget_a_parameter(params: list[nn.Parameter], optimizer: VSGD) -> None:
    del optimizer.state[params[1]]


def exchange_data_of_state(params: list[nn.Parameter], optimizer: VSGD) -> None:
    state = optimizer.state[params[0]]["b_ghat"]
    state.data = state.data * 100


def turn_state_where_it_lies(params: list[nn.Parameter], optimizer: VSGD) -> None:
    optimizer.state[params[0]]["mu_g"].t_()


def replace_count(params: list[nn.Parameter], optimizer: VSGD) -> None:
    optimizer.state[params[1]]["step"] = torch.tensor(50.0)


def write_count(params: list[nn.Parameter], optimizer: VSGD) -> None:
    optimizer.state[params[1]]["step"].fill_(50)


def exchange_data(params: list[nn.Parameter], optimizer: VSGD) -> None:
    params[0].data = params[0].data + 1


def turn_data_where_it_lies(params: list[nn.Parameter], optimizer: VSGD) -> None:
    address = params[0].data_ptr()
    params[0].data = params[0].data.t()
    assert params[0].data_ptr() == address


def widen_data(params: list[nn.Parameter], optimizer: VSGD) -> None:
    for param in params:
        param.grad, param.data = None, param.data.double()


def narrow_data(params: list[nn.Parameter], optimizer: VSGD) -> None:
    for param in params:
        param.grad, param.data = None, param.data.bfloat16()


def load(params: list[nn.Parameter], optimizer: VSGD) -> None:
    state_dict = optimizer.state_dict()
    for index, state in state_dict["state"].items():
        state_dict["state"][index] = {name: value * 2 for name, value in state.items()}
    optimizer.load_state_dict(state_dict)


def exchange_parameters(params: list[nn.Parameter], optimizer: VSGD) -> None:
    params[0] = nn.Parameter(params[0].detach() + 1)
    optimizer.param_groups[0]["params"][0] = params[0]


def add_a_parameter(params: list[nn.Parameter], optimizer: VSGD) -> None:
    params.append(nn.Parameter(torch.ones(6)))
    optimizer.param_groups[0]["params"].append(params[-1])


def add_a_group(params: list[nn.Parameter], optimizer: VSGD) -> None:
    params.append(nn.Parameter(torch.ones(6)))
    optimizer.add_param_group({"params": params[-1:], "weight_decay": 0.5})


def swap_groups(params: list[nn.Parameter], optimizer: VSGD) -> None:
    optimizer.param_groups.reverse()


def change_options(params: list[nn.Parameter], optimizer: VSGD) -> None:
    optimizer.param_groups[0].update(lr=torch.tensor(0.5), weight_decay=0.1, variance_ratio=3.0, maximize=True)


CHANGES: list[Callable[[list[nn.Parameter], VSGD], None]] = [
    replace_state,
    replace_all_state_of_a_parameter,
    forget_a_parameter,
    exchange_data_of_state,
    turn_state_where_it_lies,
    replace_count,
    write_count,
    exchange_data,
    turn_data_where_it_lies,
    widen_data,
    narrow_data,
    load,
    exchange_parameters,
    add_a_parameter,
    add_a_group,
    swap_groups,
    change_options,
]


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_between_steps_counts(change: Callable[[list[nn.Parameter], VSGD], None]) -> None:
    (params, fused), (others, loop) = start(fused=True), start(foreach=False)
    for seed in range(8):
        if seed in (3, 5):  # where the last step was the first of its kind, and where it repeated one
            change(params, fused)
            change(others, loop)
        step(params, fused, seed)
        step(others, loop, seed)
        assert_same(params, fused, others, loop)


def transposed(grad: Tensor) -> Tensor:
    return grad.t().contiguous().t()


GRADIENTS: dict[str, Callable[[Tensor], Tensor | None]] = {
    "in another order of memory": transposed,
    "with gaps": lambda grad: torch.stack([grad, grad], -1)[..., 0],
    "a lazy negative": lambda grad: torch._neg_view(-grad),
    "none": lambda grad: None,
    "zero": torch.zeros_like,
}


@pytest.mark.parametrize("kind", GRADIENTS)
def test_a_gradient_of_another_kind_counts_as_what_it_is(kind: str) -> None:
    (params, fused), (others, loop) = start(fused=True), start(foreach=False)
    for seed in range(8):
        for each, optimizer in ((params, fused), (others, loop)):
            for index, (param, grad) in enumerate(zip(each, randn_like(each, seed), strict=True)):
                param.grad = GRADIENTS[kind](grad) if index == 0 and seed in (3, 5, 6) else grad
            optimizer.step()
        assert_same(params, fused, others, loop)


def test_a_gradient_of_another_dtype_counts_as_what_it_is() -> None:
    # Where its memory was exchanged behind autograd's back.
    (params, fused), (others, loop) = start(fused=True), start(foreach=False)
    for seed in range(5):
        for each, optimizer in ((params, fused), (others, loop)):
            for param, grad in zip(each, randn_like(each, seed), strict=True):
                param.grad = grad
            if seed == 3:
                each[0].grad.data = each[0].grad.data.double()
            optimizer.step()
        assert_same(params, fused, others, loop)


def test_parameters_that_come_and_go_are_stepped_once_each() -> None:
    (params, fused), (others, loop) = start(fused=True), start(foreach=False)
    present = [(0,), (0,), (0, 1), (0, 1), (0, 1, 2), (0, 1, 2), (1, 2), (0, 2), (0, 1, 2), (0, 1, 2)]
    for seed, chosen in enumerate(present):
        for each, optimizer in ((params, fused), (others, loop)):
            for index, (param, grad) in enumerate(zip(each, randn_like(each, seed), strict=True)):
                param.grad = grad if index in chosen else None
            optimizer.step()
    assert_same(params, fused, others, loop)
    assert [fused.state[param]["step"].item() for param in params] == [9, 7, 6]


def test_parameters_of_all_kinds_share_a_group() -> None:
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(3, 2, generator=generator)
    tensors = [shared, shared.double(), shared.bfloat16(), torch.complex(shared, shared), shared.double() + 1, shared[:, 0]]
    (params, others) = ([nn.Parameter(tensor.clone()) for tensor in tensors] for _ in range(2))
    fused, loop = VSGD(params, fused=True), VSGD(others, foreach=False)
    for seed in range(5):
        step(params, fused, seed)
        step(others, loop, seed)
    assert_same(params, fused, others, loop)


def test_a_count_in_double_precision_is_one() -> None:
    (params, fused), (others, loop) = start(fused=True), start(foreach=False)
    for optimizer, each in ((fused, params), (loop, others)):
        step(each, optimizer, 0)
        optimizer.state[each[0]]["step"] = optimizer.state[each[0]]["step"].double()
        optimizer.state[each[1]]["step"] = optimizer.state[each[1]]["step"].long()
        step(each, optimizer, 1)
        step(each, optimizer, 2)
    assert_same(params, fused, others, loop)


def test_a_refused_gradient_stops_the_step_before_it_begins() -> None:
    params, optimizer = start(fused=True)
    for seed in range(2):
        params[1].grad = None
        params[0].grad = randn_like(params, seed)[0]
        optimizer.step()
    before = params[0].detach().clone()
    params[1].grad = torch.ones(5).to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()
    assert_close(params[0].detach(), before, rtol=0, atol=0)
    assert optimizer.state[params[0]]["step"] == 2


def test_nothing_holds_the_gradients_after_the_step() -> None:
    params, optimizer = start(fused=True)
    grads = []
    for seed in range(3):
        step(params, optimizer, seed)
        grads += [weakref.ref(param.grad) for param in params]
    optimizer.zero_grad()
    assert [grad() for grad in grads] == [None] * 9


def test_another_way_to_step_is_taken_at_once() -> None:
    params, optimizer = start(fused=True)
    for seed in range(2):
        step(params, optimizer, seed)
    optimizer.param_groups[0]["capturable"] = True
    with pytest.raises(AssertionError, match="capturable"):
        step(params, optimizer, 2)
    assert optimizer.state[params[0]]["step"] == 2


def test_state_that_a_load_replaced_is_freed() -> None:
    params, optimizer = start(fused=True)
    for seed in range(3):
        step(params, optimizer, seed)
    old = weakref.ref(optimizer.state[params[0]]["b_g"])
    saved = {name: value.clone() for name, value in optimizer.state_dict()["state"][0].items()}
    state_dict = optimizer.state_dict()
    optimizer.load_state_dict({**state_dict, "state": {**state_dict["state"], 0: saved}})
    del state_dict
    assert old() is None


@pytest.mark.parametrize("option", [{"seed": 1}, {"stochastic_rounding": True}], ids=str)
def test_the_plan_of_earlier_options_is_freed(option: dict[str, Any]) -> None:
    params, optimizer = start(fused=True)
    step(params, optimizer, 0)
    optimizer.param_groups[0].update(option)
    step(params, optimizer, 1)
    old = weakref.ref(optimizer.state[params[0]]["b_g"])
    optimizer.state[params[0]]["b_g"] = optimizer.state[params[0]]["b_g"].clone()
    step(params, optimizer, 2)
    assert old() is None


def test_without_the_check_of_the_compiler_each_step_is_one_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("torch._C._dynamo.guards.TensorGuards")
    spec = importlib.util.find_spec("vsgd.backends.torch.fused_cpu")
    engine = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(engine)
    batches = []
    monkeypatch.setattr(engine, "Batch", lambda *made_of, batch=engine.Batch: batches.append(made_of) or batch(*made_of))
    monkeypatch.setattr(dispatch, "_import_fused", lambda device: engine.FusedCpu())
    (params, fused), (others, loop) = start(fused=True), start(foreach=False)
    for seed in range(4):
        step(params, fused, seed)
        step(others, loop, seed)
    assert len(batches) == 2 * 4  # for each group at each step
    assert_same(params, fused, others, loop)
