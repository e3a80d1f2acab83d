"""What stands around an optimizer in a training in torch: schedulers, scaled losses, averages, steps inside backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from adapters.torch.torch_optimizers import ENGINES, problem  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.optim import lr_scheduler  # noqa: E402
from torch.testing import assert_close  # noqa: E402

from vsgd.torch import VSGD, ConstantVSGD  # noqa: E402

classes = pytest.mark.parametrize("cls", [VSGD, ConstantVSGD])
engines = pytest.mark.parametrize("engine", ENGINES, ids=str)


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
