"""Test that state dicts and checkpoints restore the state bit by bit, in full precision, also from other implementations."""

from __future__ import annotations

import copy
import io
import json
from typing import Any

import pytest
import torch
from adapters.torch.torch_optimizers import classes, engines, problem, train
from drivers.processes import TESTS
from drivers.torch_driver import TorchDriver
from drivers.trajectories import CASES, assert_follows, golden, stack
from torch import nn
from torch.testing import assert_close

from vsgd.torch import VSGD


def saved_and_loaded(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Return a state dict after saving and loading it as an untrusted file, which runs no code."""
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@classes
def test_load_state_dict_changes_nothing_in_its_argument_and_hooks_see_plain_state(cls: type) -> None:
    params, _ = problem(torch.bfloat16)
    optimizer = cls(params)
    train(optimizer, params, range(2))
    state_dict = optimizer.state_dict()
    before = copy.deepcopy(state_dict)
    seen: list[torch.dtype] = []
    optimizer.register_load_state_dict_pre_hook(lambda _, state_dict: seen.append(state_dict["state"][0]["mu_g"].dtype))
    optimizer.register_load_state_dict_post_hook(lambda opt: seen.append(opt.state[params[0]]["mu_g"].dtype))
    optimizer.load_state_dict(state_dict=state_dict)
    assert seen == [torch.float32, torch.float32]
    assert_close(state_dict["state"], before["state"], rtol=0, atol=0)
    assert state_dict["param_groups"] == before["param_groups"]


@pytest.mark.parametrize(
    "move",
    [
        {"memory_format": torch.channels_last},
        {"device": "meta"},
        pytest.param({"device": "cuda"}, marks=pytest.mark.gpu),
    ],
    ids=str,
)
def test_state_follows_the_parameter_to_another_device_and_layout(move: dict[str, Any]) -> None:
    params = [nn.Parameter(torch.linspace(-1, 1, 96).view(2, 3, 4, 4))]
    optimizer = VSGD(params)
    train(optimizer, params, range(2))
    moved = [nn.Parameter(params[0].detach().to(**move))]
    other = VSGD(moved)
    other.load_state_dict(saved_and_loaded(optimizer.state_dict()))
    state = other.state[moved[0]]
    assert (state["b_g"].stride(), state["b_g"].device) == (moved[0].stride(), moved[0].device)
    assert state["step"].device.type == "cpu"
    if move.get("device") != "meta":
        train(optimizer, params, range(2, 4))
        train(other, moved, range(2, 4))
        assert_close([param.cpu() for param in moved], params)


def test_state_that_was_looked_at_before_the_first_gradient_loads() -> None:
    params, _ = problem()
    optimizer = VSGD(params)
    train(optimizer, params[:1], range(2))
    assert optimizer.state[params[1]] == {}  # indexing makes an entry, as in every defaultdict
    optimizer.load_state_dict(saved_and_loaded(optimizer.state_dict()))
    train(optimizer, params, range(2, 4))
    assert [optimizer.state[param]["step"].item() for param in params] == [4, 2]


def authors_state_dict(case: str, step: int) -> dict[str, Any]:
    """Return what the authors' code would have saved: their recorded arrays, in the form of their `VSGD.state_dict()`."""
    known = golden(case)
    defaults = {"ghattg": 30.0, "ps": 1e-8, "tau1": 0.81, "tau2": 0.9, "weight_decay": 0.0, "eps": 1e-8}
    hyper = json.loads((TESTS / "golden" / "cases.json").read_text())[case]["hyper"]
    arrays = [
        {
            "mug": torch.from_numpy(after["mu_g"][step - 1]),
            "bg": torch.from_numpy(2 * after["b_g"][step - 1]),
            "bhg": torch.from_numpy(2 * after["b_ghat"][step - 1]),
            **dict.fromkeys(("pa2", "pbg2", "pbhg2"), torch.tensor(0.5)),  # constants, which are not read
            "step": torch.tensor(float(step)),
        }
        for after in known.after
    ]
    return {"state": dict(enumerate(arrays)), "param_groups": [{**defaults, **hyper, "params": list(range(len(arrays)))}]}


@engines
@pytest.mark.parametrize("case", CASES)
def test_a_checkpoint_of_the_authors_code_continues_their_trajectory(case: str, engine: dict[str, Any]) -> None:
    known, start = golden(case), 15
    params = [after["param"][start - 1] for after in known.after]
    driver = TorchDriver("VSGD", params, rates=known.lr[start:], **engine)
    driver.optimizer.load_state_dict(saved_and_loaded(authors_state_dict(case, start)))
    steps = []
    for t in range(start, len(known.lr)):
        driver.step([grad[t] for grad in known.grads])
        steps.append(driver.read())
    expected = [{name: values[start:] for name, values in after.items()} for after in known.after]
    assert_follows(stack(steps), expected, 1e-10)


def test_a_checkpoint_of_pytorch_optimizer_continues_its_trajectory() -> None:
    pytorch_optimizer = pytest.importorskip("pytorch_optimizer")
    hyper = {"lr": 0.02, "weight_decay": 0.1}
    params, _ = problem(torch.float64)
    theirs = pytorch_optimizer.VSGD(params, ghattg=10.0, ps=1e-5, tau1=0.7, tau2=0.8, foreach=False, **hyper)
    train(theirs, params, range(5))
    ours_params = [nn.Parameter(param.detach().clone()) for param in params]
    ours = VSGD(ours_params)
    ours.load_state_dict(saved_and_loaded(theirs.state_dict()))
    (group,) = ours.param_groups
    expected = {"variance_ratio": 10.0, "prior_strength": 1e-5, "kappa1": 0.7, "kappa2": 0.8, "eps": 1e-8, **hyper}
    assert {name: group[name] for name in expected} == pytest.approx(expected)
    train(theirs, params, range(5, 12))
    train(ours, ours_params, range(5, 12))
    assert_close(ours_params, params, rtol=1e-10, atol=1e-12)


def test_a_checkpoint_with_decay_through_the_gradient_is_refused() -> None:
    pytorch_optimizer = pytest.importorskip("pytorch_optimizer")
    params, _ = problem()
    theirs = pytorch_optimizer.VSGD(params, weight_decay=0.1, weight_decouple=False, foreach=False)
    train(theirs, params, range(2))
    with pytest.raises(ValueError, match="weight_decouple=False"):
        VSGD(params).load_state_dict(theirs.state_dict())


@pytest.mark.parametrize("tensor_lr", [False, True])
@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_a_dry_run_makes_state_on_any_device(device: str, tensor_lr: bool) -> None:
    # torch.distributed.checkpoint takes such a step, for a model without memory ("meta") or a GPU's optimizer on the CPU.
    param = nn.Parameter(torch.zeros(3, device=device))
    param.grad = torch.zeros_like(param)
    optimizer = VSGD([param], lr=torch.tensor(0.0) if tensor_lr else 0.0, capturable=device == "cpu")
    optimizer.step()
    assert optimizer.state[param]["b_g"].device == param.device
    assert device == "meta" or optimizer.state[param]["step"] == 0


@pytest.mark.parametrize("case", ["lr is not 0", "a gradient is not 0", "there is state"])
def test_any_other_step_at_zero_is_counted(case: str) -> None:
    # A warm-up may begin at lr 0, and gradients may vanish: only both, in the very first step, mean a dry run.
    param = nn.Parameter(torch.ones(3))
    optimizer = VSGD([param], lr=0.1 if case != "a gradient is not 0" else 0.0)
    param.grad = torch.tensor([0.0, float(case == "a gradient is not 0"), 0.0])
    if case == "there is state":
        optimizer.step()
        optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()
    assert optimizer.state[param]["step"] == (2 if case == "there is state" else 1)
