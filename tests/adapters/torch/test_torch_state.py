"""State dicts and checkpoints: what is saved comes back bit by bit, in full precision, also from other implementations."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
from drivers.trajectories import CASES, assert_follows, golden, stack

torch = pytest.importorskip("torch")

from adapters.torch.torch_optimizers import ENGINES, STATE_NAMES, assert_same_state, problem, randn_like, train  # noqa: E402
from torch import nn  # noqa: E402
from torch.testing import assert_close  # noqa: E402

from vsgd.torch import VSGD, ConstantVSGD  # noqa: E402

classes = pytest.mark.parametrize("cls", [VSGD, ConstantVSGD])
engines = pytest.mark.parametrize("engine", ENGINES, ids=str)


def saved_and_loaded(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Through a file, as an attacker's file is read: no code runs."""
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@classes
def test_state_dict_is_deterministic(cls: type) -> None:
    params, _ = problem()
    optimizer = cls([{"params": [params[0]]}, {"params": [params[1]], "lr": 0.1}])
    train(optimizer, params, range(2))
    one, two = optimizer.state_dict(), optimizer.state_dict()
    assert list(one["state"]) == list(two["state"]) == [0, 1]
    assert [list(state) for state in one["state"].values()] == 2 * [["step", *STATE_NAMES[cls]]]
    assert one["param_groups"] == two["param_groups"]


@classes
def test_load_state_dict_takes_its_argument_by_name_and_changes_nothing_in_it(cls: type) -> None:
    params, _ = problem(dtype=torch.bfloat16)
    optimizer = cls(params)
    train(optimizer, params, range(2))
    state_dict = optimizer.state_dict()
    before = copy.deepcopy(state_dict)
    cls(problem(dtype=torch.bfloat16)[0]).load_state_dict(state_dict=state_dict)
    assert_close(state_dict["state"], before["state"], rtol=0, atol=0)
    assert state_dict["param_groups"] == before["param_groups"]


def test_a_users_hooks_see_plain_state() -> None:
    params, _ = problem(dtype=torch.bfloat16)
    optimizer = VSGD(params)
    train(optimizer, params, range(1))
    seen: list[torch.dtype] = []
    optimizer.register_load_state_dict_pre_hook(lambda _, state_dict: seen.append(state_dict["state"][0]["b_g"].dtype))
    optimizer.register_load_state_dict_post_hook(lambda opt: seen.append(opt.state[params[0]]["b_g"].dtype))
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == [torch.float32, torch.float32]


@classes
def test_a_state_dict_of_older_flags_loads(cls: type) -> None:
    params, _ = problem()
    optimizer = cls(params, lr=0.1)
    train(optimizer, params, range(2))
    old = copy.deepcopy(optimizer.state_dict())
    for flag in ("foreach", "fused", "maximize", "capturable", "differentiable"):
        del old["param_groups"][0][flag]
    for state in old["state"].values():
        state["step"] = 2  # a number once, as in torch's own optimizers
    params_again = [nn.Parameter(param.detach().clone()) for param in params]
    loaded = cls(params_again)
    loaded.load_state_dict(old)
    assert loaded.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]
    train(optimizer, params, range(2, 4))
    train(loaded, params_again, range(2, 4))
    assert_close(params, params_again, rtol=0, atol=0)
    assert_same_state(loaded, optimizer)


def test_state_follows_the_parameter_to_another_device_and_layout() -> None:
    weight = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    params = [nn.Parameter(weight.clone())]
    optimizer = VSGD(params)
    train(optimizer, params, range(2))
    moved = [nn.Parameter(params[0].detach().to(memory_format=torch.channels_last))]
    other = VSGD(moved)
    other.load_state_dict(saved_and_loaded(optimizer.state_dict()))
    assert other.state[moved[0]]["b_g"].stride() == moved[0].stride()
    train(optimizer, params, range(2, 4))
    train(other, moved, range(2, 4))
    assert_close(moved, params)
    meta = [nn.Parameter(weight.to("meta"))]
    on_meta = VSGD(meta)
    on_meta.load_state_dict(saved_and_loaded(optimizer.state_dict()))
    assert on_meta.state[meta[0]]["b_g"].device.type == "meta"
    assert on_meta.state[meta[0]]["step"].device.type == "cpu"


@pytest.mark.gpu
def test_state_follows_the_parameter_to_the_gpu() -> None:
    params, _ = problem()
    optimizer = VSGD(params)
    train(optimizer, params, range(2))
    moved = [nn.Parameter(param.detach().cuda()) for param in params]
    other = VSGD(moved)
    other.load_state_dict(saved_and_loaded(optimizer.state_dict()))
    train(optimizer, params, range(2, 4))
    for seed in range(2, 4):
        for param, grad in zip(moved, randn_like(params, seed), strict=True):
            param.grad = grad.cuda()
        other.step()
    assert_close([param.cpu() for param in moved], params)
    assert other.state[moved[0]]["step"].device.type == "cpu"


def test_state_that_was_looked_at_before_the_first_gradient_loads() -> None:
    params, _ = problem()
    optimizer = VSGD(params)
    train(optimizer, params[:1], range(2))
    assert optimizer.state[params[1]] == {}  # which makes an entry, as in every defaultdict
    optimizer.load_state_dict(saved_and_loaded(optimizer.state_dict()))
    train(optimizer, params, range(2, 4))
    assert [optimizer.state[param]["step"].item() for param in params] == [4, 2]


def authors_state_dict(case: str, step: int) -> dict[str, Any]:
    """What the authors' code would have saved: from their recorded arrays, in the form of their `VSGD.state_dict()`."""
    known = golden(case)
    theirs = {"variance_ratio": "ghattg", "prior_strength": "ps", "kappa1": "tau1", "kappa2": "tau2"}
    defaults = {"variance_ratio": 30.0, "prior_strength": 1e-8, "kappa1": 0.81, "kappa2": 0.9, "weight_decay": 0.0, "eps": 1e-8}
    hyper = {**defaults, **known.hyper}
    arrays = [
        {
            "mug": torch.from_numpy(after["mu_g"][step - 1]),
            "bg": torch.from_numpy(2 * after["b_g"][step - 1]),
            "bhg": torch.from_numpy(2 * after["b_ghat"][step - 1]),
            "pa2": torch.tensor(2 * hyper["prior_strength"] + 1 + 1e-4),
            "pbg2": torch.tensor(2 * hyper["prior_strength"]),
            "pbhg2": torch.tensor(2 * hyper["variance_ratio"] * hyper["prior_strength"]),
            "step": torch.tensor(float(step)),
        }
        for after in known.after
    ]
    group = {theirs.get(name, name): value for name, value in hyper.items()}
    return {
        "state": dict(enumerate(arrays)),
        "param_groups": [{**group, "lr": float(known.lr[step]), "params": list(range(len(arrays)))}],
    }


@engines
@pytest.mark.parametrize("case", CASES)
def test_a_checkpoint_of_the_authors_code_continues_their_trajectory(case: str, engine: dict[str, Any]) -> None:
    known, start = golden(case), 15
    params = [nn.Parameter(torch.from_numpy(after["param"][start - 1].copy())) for after in known.after]
    optimizer = VSGD(params, **engine)
    optimizer.load_state_dict(saved_and_loaded(authors_state_dict(case, start)))
    steps = []
    for t in range(start, len(known.lr)):
        optimizer.param_groups[0]["lr"] = float(known.lr[t])
        for param, grad in zip(params, known.grads, strict=True):
            param.grad = torch.from_numpy(grad[t])
        optimizer.step()
        named = [{"param": param.detach(), **optimizer.state[param]} for param in params]
        steps.append([{name: each[name].numpy().copy() for name in ("param", "mu_g", "b_g", "b_ghat")} for each in named])
    expected = [{name: values[start:] for name, values in after.items()} for after in known.after]
    assert_follows(stack(steps), expected, 1e-10)


def test_a_checkpoint_of_pytorch_optimizer_continues_its_trajectory() -> None:
    pytorch_optimizer = pytest.importorskip("pytorch_optimizer")
    hyper = {"lr": 0.02, "weight_decay": 0.1}
    params, _ = problem(dtype=torch.float64)
    theirs = pytorch_optimizer.VSGD(params, ghattg=10.0, ps=1e-5, tau1=0.7, tau2=0.8, foreach=False, **hyper)
    train(theirs, params, range(5))
    assert theirs.state_dict()["param_groups"][0]["step"] == 5  # one for all, where ours is one for each
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
