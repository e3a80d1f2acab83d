"""Test where torch's gradient observer attaches, what it survives, and what it rejects."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from vsgd.monitor import Look, Monitor
from vsgd.torch import VSGD, GradientObserver
from vsgd.torch.monitor import watch


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2))


def compute_loss(model: nn.Module, step: int) -> torch.Tensor:
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
    loss: torch.Tensor = model(x).square().mean()
    return loss


@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.SGD, VSGD])
def test_attached_to_an_optimizer_it_sees_each_steps_gradients_and_changes_nothing(make: Callable[..., Any]) -> None:
    plain, watched = make_model(), make_model()
    optimizers = [make(model.parameters(), lr=0.01) for model in (plain, watched)]
    attached, by_hand = (GradientObserver(model.named_parameters()) for model in (watched, plain))

    def take_step(step: int) -> None:
        for model, optimizer in zip((plain, watched), optimizers, strict=True):
            optimizer.zero_grad()
            compute_loss(model, step).backward()
            if model is plain and step < 6:
                by_hand.observe()
            optimizer.step()

    with attached.attach(optimizers[1]):
        for step in range(6):
            take_step(step)
    take_step(6)  # the observer no longer sees it
    for one, other in zip(plain.parameters(), watched.parameters(), strict=True):
        assert torch.equal(one, other)
        torch.testing.assert_close(attached.posterior(other), by_hand.posterior(one), rtol=0, atol=0)


@pytest.mark.parametrize("fused", [False, True])
def test_a_scaler_is_undone_and_its_overflow_passed_over(fused: bool) -> None:
    plain, scaled = make_model(), make_model()
    observer, other = GradientObserver(scaled.named_parameters()), GradientObserver(plain.named_parameters())
    optimizer = torch.optim.AdamW(scaled.parameters(), lr=0.0, fused=fused)
    observer.attach(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(5):
        optimizer.zero_grad()
        plain.zero_grad()
        scaler.scale(compute_loss(scaled, step)).backward()
        compute_loss(plain, step).backward()
        if step == 2:  # an overflow: an optimizer that is not fused takes no step
            for param in scaled.parameters():
                param.grad.fill_(float("inf"))  # type: ignore[union-attr]
        else:
            other.observe()
        scaler.step(optimizer)
        scaler.update()
    for one, two in zip(scaled.parameters(), plain.parameters(), strict=True):
        ours, theirs = observer.posterior(one), other.posterior(two)
        torch.testing.assert_close(ours.mean, theirs.mean, rtol=0.2 if fused else 1e-5, atol=1e-6)
        assert all(torch.isfinite(field).all() for field in ours)


def test_half_precision_double_precision_and_frozen_parameters() -> None:
    half = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    double = nn.Parameter(torch.ones(2, dtype=torch.float64))
    frozen = nn.Parameter(torch.ones(4), requires_grad=False)
    observer = GradientObserver([("half", half), ("double", double), ("frozen", frozen)])
    half.grad, double.grad = torch.full_like(half, 2), torch.full_like(double, 2)
    observer.observe()
    assert observer.posterior(half).mean.dtype == torch.float32
    assert observer.posterior(double).mean.tolist() == [0.5, 0.5]  # a quarter of the first gradient
    assert observer.surprise() == {}  # the first gradient has no prediction
    observer.observe()
    assert list(observer.surprise()) == ["half", "double"]
    with pytest.raises(ValueError, match="param is frozen, which has no gradient yet, but one must be observed first"):
        observer.posterior(frozen)
    with pytest.raises(ValueError, match=r"param of shape \(2,\) is not watched, but must be one of named_parameters"):
        observer.posterior(nn.Parameter(torch.ones(2)))


def test_what_is_no_list_of_named_numbers_is_refused() -> None:
    param = nn.Parameter(torch.ones(2))
    with pytest.raises(TypeError, match="has a Parameter, but must have pairs of a name and a tensor"):
        GradientObserver([param])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="has the name 'a' more than once, but names must be unique"):
        GradientObserver([("a", param), ("a", nn.Parameter(torch.ones(1)))])
    with pytest.raises(ValueError, match=r"has a of torch.int64, but must have floating or complex numbers"):
        GradientObserver([("a", torch.ones(2, dtype=torch.int64))])


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda saved: saved["options"].update(seed=1), "state_dict has seed 1, but must have the observer's 0"),
        (lambda saved: saved["state"].pop("a"), "state_dict and observer do not both have a, but must have the same"),
        (lambda saved: saved["state"]["a"].update(gain=torch.ones(3)), r"has gain of shape \(3,\) for a, but must have \(2,\)"),
    ],
)
def test_a_state_of_another_observer_is_refused_and_nothing_changes(spoil: Callable[[Any], Any], sentence: str) -> None:
    param = nn.Parameter(torch.ones(2))
    observer, other = GradientObserver([("a", param)]), GradientObserver([("a", param)])
    for each, value in ((observer, 1.0), (other, 7.0)):
        param.grad = torch.full((2,), value)
        each.observe()
    saved = other.state_dict()
    spoil(saved)
    with pytest.raises(ValueError, match=sentence):
        observer.load_state_dict(saved)
    assert observer.posterior(param).mean.tolist() == [0.25, 0.25]


def test_the_monitor_takes_it_with_any_optimizer() -> None:
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    observer = GradientObserver(model.named_parameters(), max_elements=7)
    observer.attach(optimizer)
    looks: list[Look] = []
    watch(optimizer, Monitor(looks, every=4), batch_size=8, observer=observer)
    for step in range(6):
        optimizer.zero_grad()
        compute_loss(model, step).backward()
        if step == 4:  # the look comes after the observer's hook
            observer.observe()
            expected = {name: observer.posterior(param) for name, param in model.named_parameters()}
            surprise = observer.surprise()
            observer.observe = lambda **_: None  # type: ignore[method-assign]
        optimizer.step()
    (look,) = looks
    assert look.step == 4
    assert list(look.tensors) == list(expected)
    for name, param in model.named_parameters():
        found, posterior = look.tensors[name], expected[name]
        scale = param.numel() / posterior.mean.numel()
        assert found.noise_trace == pytest.approx(8 * scale * posterior.noise_variance.sum().item(), rel=1e-5)
        assert found.gain == pytest.approx(np.median(posterior.gain), rel=1e-5)
        assert found.surprise == pytest.approx(surprise[name].item(), rel=1e-5)
        assert math.isnan(found.noise_scale)  # the state has no squared norm
    with pytest.raises(TypeError, match="optimizer is SGD, but must be VSGD or ConstantVSGD, or have an observer"):
        watch(optimizer, Monitor([]))
