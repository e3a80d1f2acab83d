"""Test the noise-scale meter: compare each step with the gradients of its parts, computed one by one by autograd."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from vsgd.monitor import Look, Monitor
from vsgd.torch import VSGD
from vsgd.torch.monitor import watch
from vsgd.torch.noise_scale import NoiseScaleMeter

SIZE = 8


class Network(nn.Module):
    """A network with a shared, a possibly complex, a scalar and a rarely used weight, and ones without elements or gradient."""

    def __init__(self, dtype: torch.dtype = torch.complex64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.shared = nn.Linear(3, 4), nn.Linear(4, 4)
        self.turn = nn.Parameter(torch.randn(4, dtype=dtype))
        self.shift, self.rare = nn.Parameter(torch.ones(())), nn.Parameter(torch.ones(4))
        self.empty, self.unused = nn.Parameter(torch.ones(0)), nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor, rare: bool) -> Tensor:
        y = (self.shared(self.shared(self.first(x)).tanh()) * self.turn).real
        return (y + self.rare * rare if rare else y).sum(1) + self.shift


def losses(model: Network, step: int, parts: int = 3, factor: float = 1.0) -> Iterator[Tensor]:
    """Yield the loss of each part of a step."""
    generator = torch.Generator().manual_seed(step)
    for part in range(parts):
        yield factor * model(torch.randn(SIZE, 3, generator=generator), rare=part == 1).square().mean()


def compute_truth(model: Network, *args: Any) -> tuple[float, float]:
    """Return trace and squared norm from the variance over the parts, in units of the sum of their losses."""
    rows = []
    for loss in losses(model, *args):
        grads = torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True)
        rows.append(torch.cat([torch.view_as_real(grad.to(torch.complex128)).ravel() for grad in grads]))
    table = len(rows) * torch.stack(rows)
    trace = SIZE * table.var(0).sum().item()
    return trace, table.mean(0).square().sum().item() - trace / (len(rows) * SIZE)


def start(model: Network | None = None, **options: Any) -> tuple[Network, torch.optim.Optimizer, NoiseScaleMeter]:
    model = model or Network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    return model, optimizer, NoiseScaleMeter(optimizer, micro_batch_size=SIZE, **options)


def take_step(model: Network, optimizer: torch.optim.Optimizer, *args: Any) -> tuple[float, float]:
    """Take a step, and return its true trace and squared norm."""
    truth = compute_truth(model, *args)
    optimizer.zero_grad()
    for loss in losses(model, *args):
        loss.backward()
    optimizer.step()
    return truth


@pytest.mark.parametrize("parts", [2, 3])
@pytest.mark.parametrize("factor", [1.0, 1 / 3])
@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("rescale", [lambda params: None, lambda params: nn.utils.clip_grad_norm_(params, 0.01)])
def test_a_step_gives_what_its_parts_give(parts: int, factor: float, set_to_none: bool, rescale: Callable[..., Any]) -> None:
    model, optimizer, meter = start()
    for step in (0, 1):
        truth = compute_truth(model, step, parts, factor)
        optimizer.zero_grad(set_to_none)
        for loss in losses(model, step, parts, factor):
            loss.backward()
        rescale(model.parameters())
        optimizer.step()
        assert meter._found[step].tolist() == pytest.approx(truth, rel=1e-4)


def test_it_averages_the_last_steps_until_it_is_removed() -> None:
    model, optimizer, meter = start(window=2)
    with meter:
        truths = [take_step(model, optimizer, step) for step in range(3)]
    take_step(model, optimizer, 3)
    seen = meter.read()
    assert seen[:2] == pytest.approx([(one + other) / 2 for one, other in zip(*truths[1:], strict=True)], rel=1e-4)
    assert seen.steps == 2
    assert not any(meter._parts.values())


@pytest.mark.parametrize("knows_scaler", [True, False])
def test_a_scaled_loss_and_a_step_that_its_scaler_skips(knows_scaler: bool) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    model, optimizer, meter = start(Network(torch.float32), scaler=scaler if knows_scaler else None)
    truths = []
    for step, factor in enumerate((1.0, float("inf"), 1.0)):
        scale = 1.0 if knows_scaler else scaler.get_scale()
        truths.append(compute_truth(model, step, 2, factor * scale))
        optimizer.zero_grad()
        for loss in losses(model, step, 2, factor):
            scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == 512
    for found, truth in zip(meter._found, truths[::2], strict=True):
        assert found.tolist() == pytest.approx(truth, rel=1e-4)


def test_parts_of_a_step_that_was_not_taken_do_not_count() -> None:
    model, optimizer, meter = start()
    next(losses(model, 5)).backward()
    truth = take_step(model, optimizer, 0)
    assert meter.read()[:2] == pytest.approx(truth, rel=1e-4)
    # Without a new gradient there are no parts.
    optimizer.step()
    assert meter.read().steps == 1


def test_no_step_waits_for_a_value() -> None:
    class Refusing(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
            return func(*args, **(kwargs or {}))

    model, optimizer, meter = start()
    with Refusing():
        for loss in losses(model, 0):
            loss.backward()
        optimizer.step()
        with pytest.raises(AssertionError):
            meter._found[0][0].item()  # the mode notices a read
    assert meter.read().steps == 1


def test_a_monitor_writes_the_measurement_as_it_is() -> None:
    model = Network()
    optimizer = VSGD(model.parameters())
    meter = NoiseScaleMeter(optimizer, micro_batch_size=SIZE)
    looks: list[Look] = []
    with watch(optimizer, Monitor(looks, every=2), batch_size=3 * SIZE, noise_scale=meter):
        for step in range(5):
            take_step(model, optimizer, step)
            if step == 2:
                third = meter.read()  # the look is taken before the third step, with its gradients
    assert [look.step for look in looks] == [2, 4]
    for look, seen in zip(looks, (third, meter.read()), strict=True):
        overall = look.overall
        assert (overall.noise_trace, overall.noise_squared_norm, overall.noise_scale_error) == seen[:3]
        assert all(each.noise_scale_error is None for each in look.tensors.values())


def test_what_cannot_be_measured_is_refused() -> None:
    model, optimizer, meter = start()
    next(losses(model, 0)).backward()
    optimizer.step()
    with pytest.raises(ValueError, match="no step with two or more parts, but must have seen one"):
        meter.read()
    for bad in ({"micro_batch_size": 0}, {"window": 1}):
        with pytest.raises(ValueError, match=f"{next(iter(bad))} must be"):
            NoiseScaleMeter(optimizer, **{"micro_batch_size": 1, **bad})
