"""What torch's own tests ask of Adam, asked of VSGD; the cases come from torch's `OptimizerInfo`."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from adapters.torch.torch_optimizers import ENGINES, INFOS, all_inputs, assert_same_state, problem, randn_like, train  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.optim import lr_scheduler  # noqa: E402
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook  # noqa: E402
from torch.testing import assert_close  # noqa: E402
from torch.testing._internal.common_optimizers import OptimizerInfo  # noqa: E402

from vsgd.torch import VSGD, ConstantVSGD  # noqa: E402

CONFIGS = [(info.optim_cls, kwargs) for info in INFOS for kwargs in all_inputs(info)]
infos = pytest.mark.parametrize("info", INFOS, ids=lambda info: info.name)
configs = pytest.mark.parametrize(("cls", "kwargs"), CONFIGS, ids=[f"{cls.__name__}-{kwargs}" for cls, kwargs in CONFIGS])
classes = pytest.mark.parametrize("cls", [VSGD, ConstantVSGD])
engines = pytest.mark.parametrize("engine", ENGINES, ids=str)


@infos
def test_error_inputs(info: OptimizerInfo) -> None:
    for case in info.optim_error_inputs_func(device="cpu", dtype=torch.float32):
        given = case.optimizer_error_input
        params = [nn.Parameter(torch.randn(2, 3))] if given.params is None else given.params
        expects = pytest.warns if issubclass(case.error_type, Warning) else pytest.raises
        with expects(case.error_type, match=case.error_regex):
            info.optim_cls(params, **given.kwargs)


@pytest.mark.parametrize(
    ("cls", "kappa", "value"),
    [(VSGD, "kappa1", 0.5), (VSGD, "kappa2", 1.01), (ConstantVSGD, "kappa", 0.5), (ConstantVSGD, "kappa", None)],
)
def test_a_forgetting_rate_outside_its_range_is_refused(cls: type, kappa: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"^Invalid {kappa} value: {value} \({kappa} must be a number in \(0.5, 1\]\)$"):
        cls([nn.Parameter(torch.zeros(1))], **{kappa: value})


def test_a_bad_group_is_refused_and_changes_nothing() -> None:
    optimizer = VSGD([nn.Parameter(torch.zeros(1))])
    with pytest.raises(ValueError, match="Invalid learning rate: -1"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))], "lr": -1})
    assert len(optimizer.param_groups) == 1


@classes
def test_sparse_gradients_are_refused(cls: type) -> None:
    param = nn.Parameter(torch.zeros(3))
    param.grad = torch.ones(3).to_sparse()
    with pytest.raises(RuntimeError, match=f"^{cls.__name__} does not support sparse gradients$"):
        cls([param]).step()


@pytest.mark.parametrize("contiguous", [True, False])
@configs
def test_loss_goes_down(cls: type, kwargs: dict[str, Any], contiguous: bool) -> None:
    params, closure = problem(contiguous)
    optimizer = cls(params, **kwargs)
    losses = [closure().item()]
    for _ in range(20):
        if kwargs.get("maximize"):
            closure()
            optimizer.step()
        else:
            losses.append(optimizer.step(closure).item())
    final = closure().item()
    assert final > losses[0] if kwargs.get("maximize") else final < losses[0]


@configs
def test_loss_goes_down_with_torchs_scheduler_inputs(cls: type, kwargs: dict[str, Any]) -> None:
    for makers in INFOS[0].scheduler_inputs:
        params, closure = problem()
        optimizer = cls(params, **kwargs)
        schedulers = [make(optimizer) for make in makers]
        first = closure().item()
        for _ in range(20):
            loss = closure()
            optimizer.step()
            for scheduler in schedulers:
                scheduler.step(loss.detach()) if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else scheduler.step()
        assert (closure().item() > first) == bool(kwargs.get("maximize"))


@classes
@pytest.mark.parametrize(
    "kwargs", [{}, {"differentiable": True}, *(each for each in ENGINES if not each.get("foreach"))], ids=str
)
def test_a_tensor_lr_equals_a_number(cls: type, kwargs: dict[str, Any]) -> None:
    # 2 ** -7 is the same number in float32 and float64.
    tensors, others = ([param.detach() for param in problem()[0]] for _ in range(2))
    train(cls(tensors, lr=2**-7, **kwargs), tensors, range(5))
    train(cls(others, lr=torch.tensor([2**-7]), **kwargs), others, range(5))
    assert_close(tensors, others, rtol=0, atol=0)


@classes
@engines
def test_each_group_has_its_own_lr_and_decay(cls: type, engine: dict[str, Any]) -> None:
    (params, _), (alone, _) = problem(), problem()
    options = [{"lr": 0.1, "weight_decay": 0.5}, {"lr": 0.003, "maximize": True}]
    together = cls([{"params": [param], **each} for param, each in zip(params, options, strict=True)], **engine)
    train(together, params, range(4))
    for index, (param, each) in enumerate(zip(alone, options, strict=True)):
        optimizer = cls([param], **each, **engine)
        for seed in range(4):
            param.grad = randn_like(params, seed)[index]
            optimizer.step()
    assert_close(params, alone, rtol=0, atol=0)


@classes
@engines
@pytest.mark.parametrize("shape", [(), (1,)], ids=str)
def test_hyperparameters_may_be_tensors_of_one_number(cls: type, engine: dict[str, Any], shape: tuple[int, ...]) -> None:
    kappas = ["kappa1", "kappa2"] if cls is VSGD else ["kappa"]
    numbers = {"variance_ratio": 8.0, "prior_strength": 2.0**-20, "eps": 2.0**-10, "weight_decay": 0.125}
    numbers |= dict.fromkeys(kappas, 0.75)
    # Exact in float32, so that nothing but the kind differs.
    tensors = {name: torch.full(shape, value) for name, value in numbers.items()}
    runs = []
    for hyper in (numbers, tensors):
        params, _ = problem()
        train(cls(params, lr=0.1, **hyper, **engine), params, range(4))
        runs.append(params)
    assert_close(*runs, rtol=0, atol=0)


@classes
@engines
def test_maximize_is_minimizing_the_negative_and_leaves_the_gradient_alone(cls: type, engine: dict[str, Any]) -> None:
    (params, _), (others, _) = problem(), problem()
    up, down = cls(params, maximize=True, **engine), cls(others, **engine)
    for seed in range(4):
        grads = randn_like(params, seed)
        for param, other, grad in zip(params, others, grads, strict=True):
            param.grad, other.grad = grad.clone(), -grad
        up.step()
        down.step()
        assert_close([param.grad for param in params], grads, rtol=0, atol=0)
    assert_close(params, others, rtol=0, atol=0)
    assert_same_state(up, down)


@configs
def test_without_gradients_nothing_happens(cls: type, kwargs: dict[str, Any]) -> None:
    params, _ = problem()
    before = copy.deepcopy(params)
    optimizer = cls(params, **kwargs)
    optimizer.step()
    assert_close(params, before, rtol=0, atol=0)
    assert not optimizer.state
    train(optimizer, params, range(2))
    after, state = copy.deepcopy(params), copy.deepcopy(optimizer.state_dict())
    optimizer.zero_grad()
    optimizer.step()
    assert_close(params, after, rtol=0, atol=0)
    assert_close(optimizer.state_dict()["state"], state["state"], rtol=0, atol=0)


def test_hooks_run_around_the_step_in_order() -> None:
    params, closure = problem()
    calls: list[str] = []
    handles = [
        register_optimizer_step_pre_hook(lambda *_: calls.append("global pre")),
        register_optimizer_step_post_hook(lambda *_: calls.append("global post")),
    ]
    optimizer = VSGD(params)
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))

    def noted() -> Tensor:
        calls.append("closure")
        return closure()

    try:
        optimizer.step(noted)
    finally:
        for handle in handles:
            handle.remove()
    assert calls == ["global pre", "pre", "closure", "post", "global post"]


def test_step_returns_the_closures_loss_and_runs_it_with_gradients() -> None:
    params, closure = problem()
    optimizer = VSGD(params)
    with torch.no_grad():
        loss = optimizer.step(closure)
    assert loss.item() == problem()[1]().item()
    assert optimizer.step() is None


@configs
def test_deepcopy_and_pickle_continue_alike(cls: type, kwargs: dict[str, Any]) -> None:
    params, _ = problem()
    optimizer = cls(params, **kwargs)
    train(optimizer, params, range(3))
    copies = [copy.deepcopy((params, optimizer)), pickle.loads(pickle.dumps((params, optimizer)))]
    train(optimizer, params, range(3, 6))
    for other_params, other in copies:
        assert other.param_groups[0]["params"][0] is other_params[0]
        train(other, other_params, range(3, 6))
        assert_close(other_params, params, rtol=0, atol=0)
        assert_same_state(other, optimizer)


@engines
def test_autograd_sees_the_step_as_an_in_place_change(engine: dict[str, Any]) -> None:
    params, closure = problem()
    loss = (params[0] * params[0]).sum()
    closure()
    VSGD(params, **engine).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_capturable_refuses_the_cpu_as_adam_does() -> None:
    params, closure = problem()
    closure()
    message = "If capturable=True, params and state_steps must be on supported devices"
    with pytest.raises(AssertionError, match=message):
        torch.optim.Adam(params, capturable=True).step()
    with pytest.raises(AssertionError, match=message):
        VSGD(params, capturable=True).step()


@classes
@engines
def test_a_group_may_join_after_steps_and_parameters_may_have_names(cls: type, engine: dict[str, Any]) -> None:
    (params, _), (alone, _) = problem(), problem()
    optimizer = cls([("weight", params[0])], **engine)
    train(optimizer, params[:1], range(3))
    optimizer.add_param_group({"params": [("bias", params[1])], "lr": 0.1})
    train(optimizer, params, range(3, 6))
    late = cls([alone[1]], lr=0.1, **engine)
    for seed in range(3, 6):
        alone[1].grad = randn_like(params, seed)[1]
        late.step()
    assert_close(params[1], alone[1], rtol=0, atol=0)
    assert [group["param_names"] for group in optimizer.param_groups] == [["weight"], ["bias"]]


def test_a_meta_parameter_takes_a_dry_run() -> None:
    # As when an optimizer of a model without memory is made ready to load a checkpoint.
    param = nn.Parameter(torch.zeros(3, device="meta"))
    param.grad = torch.zeros(3, device="meta")
    optimizer = VSGD([param], lr=0.0)
    optimizer.step()
    assert optimizer.state[param]["b_g"].is_meta
