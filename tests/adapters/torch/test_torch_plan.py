"""Test that a fused step that repeats the previous one equals the loop's step, whatever changes in between."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("numba")

from adapters.torch.torch_optimizers import assert_same_state, randn_like, set_grads, train
from torch import Tensor, nn
from torch.testing import assert_close

from vsgd.backends.torch import fused_cpu
from vsgd.torch import VSGD

Params = list[nn.Parameter]
Change = Callable[[Params, VSGD], Any]
SHAPES = ((4, 4), (5,), (3, 2))


def start(**engine: Any) -> tuple[Params, VSGD]:
    params = [nn.Parameter(tensor) for tensor in randn_like([torch.empty(shape) for shape in SHAPES], seed=99)]
    return params, VSGD([{"params": params[:2]}, {"params": params[2:], "lr": 0.1}], **engine)


def assert_as_the_loop(steps: int, prepare: Callable[[int, Params, VSGD], Any]) -> tuple[Params, VSGD]:
    """Compare fused steps with the loop's; before each, `prepare` sets the gradients of its seed and makes changes."""
    (params, fused), (others, loop) = start(fused=True), start(foreach=False)
    for seed in range(steps):
        for each, optimizer in ((params, fused), (others, loop)):
            prepare(seed, each, optimizer)
            optimizer.step()
        assert_close(params, others)
        assert_close([dict(fused.state[param]) for param in params], [dict(loop.state[param]) for param in others])
    return params, fused


def replace_state(params: Params, optimizer: VSGD, **values: Callable[[Tensor], Tensor]) -> None:
    state = optimizer.state[params[1]]
    state.update({name: change(state[name]) for name, change in values.items()})


def exchange_data_of_state(params: Params, optimizer: VSGD) -> None:
    state = optimizer.state[params[0]]["b_ghat"]
    state.data = state.data * 100


def exchange_data(params: Params, optimizer: VSGD) -> None:
    params[0].data = params[0].data + 1


def turn_data_where_it_lies(params: Params, optimizer: VSGD) -> None:
    params[0].data = params[0].data.t()


def convert_data(params: Params, dtype: torch.dtype) -> None:
    for param in params:
        param.grad, param.data = None, param.data.to(dtype)


def load(params: Params, optimizer: VSGD) -> None:
    state_dict = optimizer.state_dict()
    for index, state in state_dict["state"].items():
        state_dict["state"][index] = {name: value * 2 for name, value in state.items()}
    optimizer.load_state_dict(state_dict)


def exchange_parameters(params: Params, optimizer: VSGD) -> None:
    params[0] = nn.Parameter(params[0].detach() + 1)
    optimizer.param_groups[0]["params"][0] = params[0]


def add_a_parameter(params: Params, optimizer: VSGD) -> None:
    params.append(nn.Parameter(torch.ones(6)))
    optimizer.param_groups[0]["params"].append(params[-1])


def add_a_group(params: Params, optimizer: VSGD) -> None:
    params.append(nn.Parameter(torch.ones(6)))
    optimizer.add_param_group({"params": params[-1:], "weight_decay": 0.5})


CHANGES: dict[str, Change] = {
    "one state array replaced": lambda params, optimizer: replace_state(params, optimizer, b_g=lambda array: array * 100),
    "all state of a parameter replaced": lambda params, optimizer: optimizer.state.update(
        {params[1]: {name: value + 1 for name, value in optimizer.state[params[1]].items()}}
    ),
    "a parameter forgotten": lambda params, optimizer: optimizer.state.pop(params[1]),
    "data of state exchanged": exchange_data_of_state,
    "state turned where it lies": lambda params, optimizer: optimizer.state[params[0]]["mu_g"].t_(),
    "a count replaced": lambda params, optimizer: replace_state(params, optimizer, step=lambda _: torch.tensor(50.0)),
    "a count of float64": lambda params, optimizer: replace_state(params, optimizer, step=Tensor.double),
    "a count of int64": lambda params, optimizer: replace_state(params, optimizer, step=Tensor.long),
    "a count written": lambda params, optimizer: optimizer.state[params[1]]["step"].fill_(50),
    "data exchanged": exchange_data,
    "data turned where it lies": turn_data_where_it_lies,
    "data of float64": lambda params, optimizer: convert_data(params, torch.float64),
    "data of bfloat16": lambda params, optimizer: convert_data(params, torch.bfloat16),
    "state loaded": load,
    "a parameter exchanged": exchange_parameters,
    "a parameter added": add_a_parameter,
    "a group added": add_a_group,
    "groups swapped": lambda params, optimizer: optimizer.param_groups.reverse(),
    "other options": lambda params, optimizer: optimizer.param_groups[0].update(
        lr=torch.tensor(0.5), weight_decay=0.1, variance_ratio=3.0, maximize=True
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_between_steps_counts(change: str) -> None:
    def prepare(seed: int, params: Params, optimizer: VSGD) -> None:
        if seed in (3, 5):  # after a step that was the first of its kind, and after one that repeated a step
            CHANGES[change](params, optimizer)
        set_grads(params, seed)

    assert_as_the_loop(8, prepare)


GRADIENTS: dict[str, Callable[[Tensor], Tensor | None]] = {
    "in another order of memory": lambda grad: grad.t().contiguous().t(),
    "with gaps": lambda grad: torch.stack([grad, grad], -1)[..., 0],
    "a lazy negative": lambda grad: torch._neg_view(-grad),
    "none": lambda grad: None,
    "zero": torch.zeros_like,
    "of another dtype": Tensor.double,
}


@pytest.mark.parametrize("kind", GRADIENTS)
def test_a_gradient_of_another_kind_counts_as_what_it_is(kind: str) -> None:
    def prepare(seed: int, params: Params, optimizer: VSGD) -> None:
        set_grads(params, seed)
        if seed in (3, 5, 6):
            grad = GRADIENTS[kind](params[0].grad)
            if kind == "of another dtype":  # its memory was exchanged without autograd's notice
                params[0].grad.data = grad
            else:
                params[0].grad = grad

    assert_as_the_loop(8, prepare)


def test_parameters_that_come_and_go_are_stepped_once_each() -> None:
    present = [(0,), (0,), (0, 1), (0, 1), (0, 1, 2), (0, 1, 2), (1, 2), (0, 2), (0, 1, 2), (0, 1, 2)]

    def prepare(seed: int, params: Params, optimizer: VSGD) -> None:
        set_grads(params, seed)
        for index in {0, 1, 2}.difference(present[seed]):
            params[index].grad = None

    params, fused = assert_as_the_loop(len(present), prepare)
    assert [fused.state[param]["step"].item() for param in params] == [9, 7, 6]


def test_nothing_holds_the_gradients_after_the_step() -> None:
    params, optimizer = start(fused=True)
    grads = []
    for seed in range(3):
        train(optimizer, params, range(seed, seed + 1))
        grads += [weakref.ref(param.grad) for param in params]
    optimizer.zero_grad()
    assert [grad() for grad in grads] == [None] * 9


def test_state_that_a_load_replaced_is_freed() -> None:
    params, optimizer = start(fused=True)
    train(optimizer, params, range(3))
    old = weakref.ref(optimizer.state[params[0]]["b_g"])
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert old() is None


@pytest.mark.parametrize("option", [{"seed": 1}, {"stochastic_rounding": True}], ids=str)
def test_other_noise_counts_at_once_and_the_plan_of_earlier_noise_is_freed(option: dict[str, Any]) -> None:
    params, optimizer = start(fused=True, state_dtype="bfloat16")
    convert_data(params, torch.bfloat16)
    train(optimizer, params, range(3))
    others, unplanned = copy.deepcopy((params, optimizer))
    for each, of in ((optimizer, params), (unplanned, others)):
        each.param_groups[0].update(option)
        train(each, of, range(1))
    assert_close(params, others, rtol=0, atol=0)
    assert_same_state(optimizer, unplanned)
    old = weakref.ref(optimizer.state[params[0]]["b_g"])
    optimizer.state[params[0]]["b_g"] = optimizer.state[params[0]]["b_g"].clone()
    train(optimizer, params, range(1))
    assert old() is None


def test_without_the_check_of_the_compiler_each_step_is_one_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_cpu, "TensorGuards", None)
    batches = []
    batch = fused_cpu.Batch
    monkeypatch.setattr(fused_cpu, "Batch", lambda *made_of: batches.append(made_of) or batch(*made_of))
    assert_as_the_loop(4, lambda seed, params, optimizer: set_grads(params, seed))
    assert len(batches) == 2 * 4  # for each group at each step
