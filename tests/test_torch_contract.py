"""What torch's own tests ask of Adam, asked of VSGD; the cases come from torch's `OptimizerInfo`."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch import Tensor, nn  # noqa: E402
from torch.optim import lr_scheduler  # noqa: E402
from torch.optim.optimizer import (  # noqa: E402
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.testing import assert_close  # noqa: E402
from torch.testing._internal.common_optimizers import OptimizerInfo  # noqa: E402
from torch.testing._internal.two_tensor import TwoTensor  # noqa: E402
from torch_optimizers import (  # noqa: E402
    ENGINES,
    INFOS,
    STATE_NAMES,
    all_inputs,
    assert_same_state,
    problem,
    randn_like,
    train,
)

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


SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "ConstantLR": lambda opt: lr_scheduler.ConstantLR(opt, total_iters=5),
    "CosineAnnealingLR": lambda opt: lr_scheduler.CosineAnnealingLR(opt, 20),
    "CosineAnnealingWarmRestarts": lambda opt: lr_scheduler.CosineAnnealingWarmRestarts(opt, 5),
    "CyclicLR": lambda opt: lr_scheduler.CyclicLR(opt, 1e-3, 1e-2, step_size_up=5, cycle_momentum=False),
    "ExponentialLR": lambda opt: lr_scheduler.ExponentialLR(opt, 0.9),
    "LambdaLR": lambda opt: lr_scheduler.LambdaLR(opt, lambda step: 0.95**step),
    "LinearLR": lambda opt: lr_scheduler.LinearLR(opt),
    "MultiStepLR": lambda opt: lr_scheduler.MultiStepLR(opt, [5, 10]),
    "MultiplicativeLR": lambda opt: lr_scheduler.MultiplicativeLR(opt, lambda step: 0.95),
    "OneCycleLR": lambda opt: lr_scheduler.OneCycleLR(opt, 0.02, total_steps=30, cycle_momentum=False),
    "PolynomialLR": lambda opt: lr_scheduler.PolynomialLR(opt, 30),
    "ReduceLROnPlateau": lambda opt: lr_scheduler.ReduceLROnPlateau(opt),
    "StepLR": lambda opt: lr_scheduler.StepLR(opt, 5),
    "ChainedScheduler": lambda opt: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(opt, total_iters=5), lr_scheduler.ExponentialLR(opt, 0.9)]
    ),
    "SequentialLR": lambda opt: lr_scheduler.SequentialLR(
        opt, [lr_scheduler.LinearLR(opt, total_iters=5), lr_scheduler.ExponentialLR(opt, 0.95)], [5]
    ),
}


def test_every_built_in_scheduler_is_listed() -> None:
    abstract = {"LRScheduler", "SWALR"}
    assert set(lr_scheduler.__all__) - abstract == set(SCHEDULERS)


@pytest.mark.parametrize("tensor_lr", [False, True])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_built_in_scheduler_sets_the_step_size(name: str, tensor_lr: bool) -> None:
    params, closure = problem()
    optimizer = VSGD(params, lr=torch.tensor(0.01) if tensor_lr else 0.01)
    scheduler = SCHEDULERS[name](optimizer)
    reference_params, reference_closure = problem()
    reference = VSGD(reference_params)
    first = closure().item()
    for _ in range(20):
        # The scheduler's step equals setting the number that it came to.
        reference.param_groups[0]["lr"] = float(optimizer.param_groups[0]["lr"])
        reference_closure()
        reference.step()
        loss = closure()
        optimizer.step()
        scheduler.step(loss.detach()) if name == "ReduceLROnPlateau" else scheduler.step()
    assert closure().item() < first
    assert_close(params, reference_params, rtol=0, atol=0)


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
def test_complex_parameters_equal_two_real_ones(cls: type, engine: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(7, 3, dtype=torch.complex128, generator=generator)
    complex_param, real_param = nn.Parameter(values.clone()), nn.Parameter(torch.view_as_real(values.clone()))
    options = {**engine, "weight_decay": 0.1}
    one, other = cls([complex_param], **options), cls([real_param], **options)
    for t in range(5):
        grad = torch.randn(7, 3, dtype=torch.complex128, generator=generator)
        # A conjugate is lazy: its memory holds the other sign.
        complex_param.grad = grad.conj() if t == 3 else grad
        real_param.grad = torch.view_as_real(complex_param.grad.resolve_conj()).clone()
        one.step()
        other.step()
    assert_close(torch.view_as_real(complex_param.detach()), real_param.detach(), rtol=0, atol=0)
    for name in STATE_NAMES[cls]:
        assert one.state[complex_param][name].dtype is torch.complex128
        assert_close(torch.view_as_real(one.state[complex_param][name]), other.state[real_param][name], rtol=0, atol=0)


def assorted() -> list[nn.Parameter]:
    """Parameters of all kinds: 0-d, empty, all dtypes, dense in another order, with gaps, one that never has a gradient."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    tensors = [
        randn(),
        randn(0, 3),
        randn(33, 9),
        randn(4, 3, 5, 5).to(memory_format=torch.channels_last),
        randn(6, 5).t(),
        randn(6, 8)[:, ::2],
        randn(5, 1).expand(5, 4).clone(),
        randn(11, dtype=torch.float64),
        randn(8, 3, dtype=torch.bfloat16),
        randn(13, dtype=torch.float16),
        torch.complex(randn(5, 2), randn(5, 2)),
        randn(3),
    ]
    return [nn.Parameter(tensor) for tensor in tensors]


def train_assorted(cls: type, **options: Any) -> tuple[list[nn.Parameter], Any]:
    params = assorted()
    optimizer = cls(params, weight_decay=0.1, **options)
    generator = torch.Generator().manual_seed(1)
    for t in range(6):
        for index, param in enumerate(params[:-1]):
            grad = torch.randn(param.shape, generator=generator).to(param.dtype)
            # Some gradients in the parameter's order of memory, some not; one parameter joins late.
            param.grad = grad if index % 3 else torch.empty_like(param.detach()).copy_(grad)
            if index == 2 and t < 2:
                param.grad = None
        optimizer.step()
    return params, optimizer


@classes
@pytest.mark.parametrize("block", [4, 65536])
def test_all_engines_agree_on_all_kinds_of_parameters(cls: type, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vsgd.backends.torch_blocks.CPU_BLOCK", block)
    reference, reference_optimizer = train_assorted(cls, foreach=False)
    for engine in (*ENGINES[1:], {}):
        params, optimizer = train_assorted(cls, **engine)
        # Fused, the compiler contracts a*b+c to one rounding: the last bits differ.
        tolerance = {"rtol": 0, "atol": 0} if "foreach" in engine else {}
        assert_close(params, reference, **tolerance)
        for param, other in zip(params, reference, strict=True):
            state, other_state = optimizer.state.get(param, {}), reference_optimizer.state.get(other, {})
            assert_close(state, other_state, **tolerance)
            assert all(state[name].stride() == param.stride() for name in STATE_NAMES[cls] if state and param.dim() == 4)
    assert reference_optimizer.state[reference[2]]["step"] == 4
    assert reference_optimizer.state[reference[0]]["step"] == 6
    assert reference[-1] not in reference_optimizer.state


@classes
@engines
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_equals_float32_rounded_after_each_step(cls: type, engine: dict[str, Any], dtype: torch.dtype) -> None:
    param, master = nn.Parameter(torch.ones(9, dtype=dtype)), nn.Parameter(torch.ones(9))
    one, other = cls([param], lr=0.1, **engine), cls([master], lr=0.1, foreach=False)
    for seed in range(5):
        (grad,) = randn_like([param], seed)
        param.grad, master.grad = grad, grad.float()
        one.step()
        other.step()
        master.data = master.data.to(dtype).float()
        assert_close(param.detach().float(), master.detach(), rtol=0, atol=0)
    assert all(one.state[param][name].dtype is torch.float32 for name in STATE_NAMES[cls])


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


@engines
def test_a_parameter_unfrozen_late_starts_as_new(engine: dict[str, Any]) -> None:
    (params, _), (fresh, _) = problem(), problem()
    optimizer = VSGD(params, **engine)
    for seed in range(8):
        params[0].grad = randn_like(params, seed)[0]
        params[1].grad = randn_like(params, seed)[1] if seed >= 5 else None
        optimizer.step()
    alone = VSGD([fresh[1]], **engine)
    for seed in range(5, 8):
        fresh[1].grad = randn_like(params, seed)[1]
        alone.step()
    assert_close(params[1], fresh[1], rtol=0, atol=0)
    assert optimizer.state[params[1]]["step"] == 3


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
@classes
def test_one_optimizer_per_parameter_stepped_inside_backward(cls: type, engine: dict[str, Any]) -> None:
    def network() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))

    inside, outside = network(), network()
    optimizers = {param: cls([param], **engine) for param in inside.parameters()}

    def step_and_free(param: Tensor) -> None:
        optimizers[param].step()
        param.grad = None

    for param in inside.parameters():
        param.register_post_accumulate_grad_hook(step_and_free)
    optimizer = cls(outside.parameters(), **engine)
    for seed in range(4):
        x = torch.randn(7, 6, generator=torch.Generator().manual_seed(seed))
        inside(x).square().sum().backward()
        outside(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert_close(list(inside.parameters()), list(outside.parameters()), rtol=0, atol=0)


@classes
@engines
def test_grad_scaler_unscales_and_skips_what_is_not_finite(cls: type, engine: dict[str, Any]) -> None:
    (params, closure), (others, other_closure) = problem(), problem()
    scaled, plain = cls(params, **engine), cls(others, **engine)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=100)
    for t in range(4):
        closure()
        for param in params:
            param.grad = param.grad * scaler.scale(torch.ones(()))
            if t == 2:
                param.grad[0] = torch.inf
        scaler.step(scaled)
        scaler.update()
        if t != 2:
            other_closure()
            plain.step()
    # Scales are powers of two: unscaling is exact.
    assert_close(params, others, rtol=0, atol=0)
    assert scaler.get_scale() == 512.0


def test_swa_and_ema_average_what_the_optimizer_stepped() -> None:
    from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn

    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    swa, ema = AveragedModel(model), AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    optimizer = VSGD(model.parameters(), lr=0.1)
    scheduler = SWALR(optimizer, swa_lr=0.05, anneal_epochs=2, anneal_strategy="linear")
    seen = []
    for _ in range(4):
        optimizer.zero_grad()
        model(torch.randn(5, 3)).square().sum().backward()
        optimizer.step()
        scheduler.step()
        swa.update_parameters(model)
        ema.update_parameters(model)
        seen.append(model.weight.detach().clone())
    exponential = seen[0]
    for weight in seen[1:]:
        exponential = 0.9 * exponential + 0.1 * weight
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.05)
    assert_close(swa.module.weight.detach(), torch.stack(seen).mean(0))
    assert_close(ema.module.weight.detach(), exponential)


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


@pytest.mark.parametrize("hyper", list(itertools.product([0.0, 0.1], [False, True])))
@classes
def test_autograd_runs_through_a_differentiable_step(cls: type, hyper: tuple[float, bool]) -> None:
    weight_decay, maximize = hyper
    options = {"weight_decay": weight_decay, "maximize": maximize, "differentiable": True}

    def stepped(lr: Tensor, param: Tensor, grad: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        # Clones, for a leaf that is tracked may not change in place; not detached: gradcheck needs the graph.
        param = param.clone()
        param.grad = grad.clone()
        optimizer = cls([param.detach().requires_grad_()], lr=lr, **options)
        optimizer.param_groups[0]["params"] = [param]
        named = {name: tensor.clone() for name, tensor in zip(STATE_NAMES[cls], state, strict=True)}
        optimizer.state[param] = {"step": torch.tensor(3.0), **named}
        optimizer.step()
        return param, *(optimizer.state[param][name] for name in STATE_NAMES[cls])

    generator = torch.Generator().manual_seed(0)
    param, grad, mu_g, *rates = (
        torch.randn(6, dtype=torch.float64, generator=generator) for _ in range(2 + len(STATE_NAMES[cls]))
    )
    inputs = [torch.tensor(0.01, dtype=torch.float64), param, grad, mu_g, *(rate.abs() + 0.1 for rate in rates)]
    assert torch.autograd.gradcheck(stepped, [tensor.requires_grad_() for tensor in inputs])


@classes
@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("tensor_lr", [False, True])
def test_coefficients_on_the_device_equal_those_on_the_host(
    cls: type, foreach: bool, tensor_lr: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # No CPU can capture a graph; that the step reads nothing back can be had here all the same.
    monkeypatch.setattr("vsgd.torch._get_capturable_supported_devices", lambda: ["cpu"])
    monkeypatch.setattr("vsgd.backends.torch_blocks.CPU_BLOCK", 4)
    (params, _), (others, _) = problem(dtype=torch.float64), problem(dtype=torch.float64)
    lr = torch.tensor(0.01, dtype=torch.float64) if tensor_lr else 0.01
    captured = cls(params, lr=lr, weight_decay=0.1, capturable=True, foreach=foreach)
    host = cls(others, weight_decay=0.1, foreach=foreach)
    for seed in range(8):
        grads = randn_like(params, seed)
        for index, (param, other) in enumerate(zip(params, others, strict=True)):
            # Counts differ between parameters, and so do their coefficients.
            param.grad, other.grad = (None, None) if index == 1 and seed < 3 else (grads[index], grads[index].clone())
        with monkeypatch.context() as patch:
            if captured.state:  # the first step looks whether lr is 0, which a warm-up before the capture has behind it
                patch.setattr(Tensor, "item", lambda _: pytest.fail("a value was read back to the host"))
            captured.step()
        host.step()
    assert_close(params, others, rtol=1e-13, atol=0)
    assert captured.state[params[1]]["step"] == 5


@engines
def test_state_that_no_longer_fits_is_an_error_and_no_write_elsewhere(engine: dict[str, Any]) -> None:
    # As when a parameter's data was exchanged, in pruning or resizing.
    param = nn.Parameter(torch.ones(3))
    optimizer = VSGD([param], **engine)
    param.grad = torch.ones(3)
    optimizer.step()
    param.data, param.grad = torch.ones(400_000), None
    param.grad = torch.ones(400_000)
    with pytest.raises((RuntimeError, ValueError)):
        optimizer.step()


@engines
def test_state_that_fits_another_parameter_is_an_error(engine: dict[str, Any]) -> None:
    # As many elements as there should be, in another shape.
    params = [nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(3, 2))]
    optimizer = VSGD(params, **engine)
    train(optimizer, params, range(1))
    one, other = (optimizer.state[param] for param in params)
    for name in STATE_NAMES[VSGD]:
        one[name], other[name] = other[name], one[name]
    with pytest.raises((RuntimeError, ValueError)):
        train(optimizer, params, range(1))


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


@engines
def test_a_gradient_that_is_a_lazy_negative_counts_as_what_it_is(engine: dict[str, Any]) -> None:
    # As the imaginary part of a conjugate is: memory of the other sign, with a bit that says so.
    lazy = torch._neg_view(torch.tensor([1.0, -2.0, 3.0, -4.0]))
    assert lazy.is_neg()
    params = [nn.Parameter(torch.ones(4)) for _ in range(2)]
    params[0].grad, params[1].grad = lazy, lazy.resolve_neg().clone()
    for param in params:
        VSGD([param], **engine).step()
    assert_close(params[0], params[1])


def test_a_step_that_is_refused_counts_no_step() -> None:
    params, closure = problem()
    optimizer = VSGD(params, capturable=True)
    closure()
    with pytest.raises(AssertionError, match="capturable"):
        optimizer.step()
    assert [state["step"].item() for state in optimizer.state.values()] == [0, 0]


@engines
def test_a_parameter_of_a_subclass_without_operations_of_its_own_is_plain(engine: dict[str, Any]) -> None:
    class Weight(nn.Parameter):
        pass

    from vsgd.backends.torch_blocks import is_plain

    one, other = Weight(torch.ones(9)), nn.Parameter(torch.ones(9))
    assert is_plain(one)
    assert not is_plain(TwoTensor(torch.ones(2), torch.ones(2)))
    for param in (one, other):
        optimizer = VSGD([param], **engine)
        train(optimizer, [param], range(3))
    assert_close(one.data, other.data, rtol=0, atol=0)


def test_a_meta_parameter_takes_a_dry_run() -> None:
    # As when an optimizer of a model without memory is made ready to load a checkpoint.
    param = nn.Parameter(torch.zeros(3, device="meta"))
    param.grad = torch.zeros(3, device="meta")
    optimizer = VSGD([param], lr=0.0)
    optimizer.step()
    assert optimizer.state[param]["b_g"].is_meta
