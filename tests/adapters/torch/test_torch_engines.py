"""Test that the torch adapter's engines compute the same numbers, for parameters of all kinds."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from adapters.torch.torch_optimizers import ENGINES, STATE_NAMES, classes, engines, problem, randn_like, train
from torch import Tensor, nn
from torch.testing import assert_close
from torch.testing._internal.two_tensor import TwoTensor

from vsgd.backends.torch.leaves import is_plain
from vsgd.torch import VSGD


def train_assorted(cls: type, **options: Any) -> tuple[list[nn.Parameter], Any]:
    """Train parameters of all kinds: 0-d, empty, all dtypes, other memory orders, with gaps, one that never has a gradient."""
    shapes = ((), (0, 3), (33, 9), (4, 3, 5, 5), (6, 5), (6, 8), (11,), (8, 3), (13,), (5, 2), (3,))
    tensors = randn_like([torch.empty(shape) for shape in shapes], seed=0)
    tensors[3] = tensors[3].to(memory_format=torch.channels_last)
    tensors[4], tensors[5] = tensors[4].t(), tensors[5][:, ::2]
    for index, dtype in enumerate((torch.float64, torch.bfloat16, torch.float16, torch.complex64), start=6):
        tensors[index] = tensors[index].to(dtype)
    params = [nn.Parameter(tensor) for tensor in tensors]
    optimizer = cls(params, weight_decay=0.1, **options)
    generator = torch.Generator().manual_seed(1)
    for t in range(6):
        for index, param in enumerate(params[:-1]):
            grad = torch.randn(param.shape, generator=generator).to(param.dtype)
            # Some gradients have the parameter's memory order, and some do not; one parameter joins late.
            param.grad = grad if index % 3 else torch.empty_like(param.detach()).copy_(grad)
            if index == 2 and t < 2:
                param.grad = None
        optimizer.step()
    return params, optimizer


@classes
@pytest.mark.parametrize("block", [4, 65536])
def test_all_engines_agree_on_all_kinds_of_parameters(cls: type, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vsgd.backends.torch.leaves.CPU_BLOCK", block)
    reference, reference_optimizer = train_assorted(cls, foreach=False)
    for engine in (*ENGINES[1:], {}):
        params, optimizer = train_assorted(cls, **engine)
        # The fused engine's compiler contracts a*b+c to one rounding, so the last bits differ.
        tolerance = {"rtol": 0, "atol": 0} if "foreach" in engine else {}
        assert_close(params, reference, **tolerance)
        for param, other in zip(params, reference, strict=True):
            state, other_state = optimizer.state.get(param, {}), reference_optimizer.state.get(other, {})
            assert_close(state, other_state, **tolerance)
            assert all(state[name].stride() == param.stride() for name in STATE_NAMES[cls] if state and param.dim() == 4)
    assert reference_optimizer.state[reference[2]]["step"] == 4
    assert reference_optimizer.state[reference[0]]["step"] == 6
    assert reference[-1] not in reference_optimizer.state


@pytest.mark.parametrize("hyper", list(itertools.product([0.0, 0.1], [False, True])))
@classes
def test_autograd_runs_through_a_differentiable_step(cls: type, hyper: tuple[float, bool]) -> None:
    weight_decay, maximize = hyper
    options = {"weight_decay": weight_decay, "maximize": maximize, "differentiable": True}

    def stepped(lr: Tensor, param: Tensor, grad: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        # Clone, because a tracked leaf may not change in place; do not detach, because gradcheck needs the graph.
        param = param.clone()
        param.grad = grad.clone()
        optimizer = cls([param.detach().requires_grad_()], lr=lr, **options)
        optimizer.param_groups[0]["params"] = [param]
        named = {name: tensor.clone() for name, tensor in zip(STATE_NAMES[cls], state, strict=True)}
        optimizer.state[param] = {"step": torch.tensor(3.0), **named}
        optimizer.step()
        return param, *(optimizer.state[param][name] for name in STATE_NAMES[cls])

    tensors = [torch.empty(6, dtype=torch.float64)] * (2 + len(STATE_NAMES[cls]))
    param, grad, mu_g, *rates = randn_like(tensors, seed=0)
    inputs = [torch.tensor(0.01, dtype=torch.float64), param, grad, mu_g, *(rate.abs() + 0.1 for rate in rates)]
    assert torch.autograd.gradcheck(stepped, [tensor.requires_grad_() for tensor in inputs])


@classes
@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("tensor_lr", [False, True])
def test_coefficients_on_the_device_equal_those_on_the_host(
    cls: type, foreach: bool, tensor_lr: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The CPU cannot capture a graph, but this test can still check that the step reads nothing back.
    monkeypatch.setattr("vsgd.torch.optimizer.list_capturable_devices", lambda: ["cpu"])
    monkeypatch.setattr("vsgd.backends.torch.leaves.CPU_BLOCK", 4)
    (params, _), (others, _) = problem(dtype=torch.float64), problem(dtype=torch.float64)
    lr = torch.tensor(0.01, dtype=torch.float64) if tensor_lr else 0.01
    captured = cls(params, lr=lr, weight_decay=0.1, capturable=True, foreach=foreach)
    host = cls(others, weight_decay=0.1, foreach=foreach)
    for seed in range(8):
        grads = randn_like(params, seed)
        for index, (param, other) in enumerate(zip(params, others, strict=True)):
            # Counts differ between parameters, and so do their coefficients.
            param.grad = other.grad = None if index == 1 and seed < 3 else grads[index]
        with monkeypatch.context() as patch:
            if captured.state:  # the first step checks whether lr is 0; warm-up precedes a capture
                patch.setattr(Tensor, "item", lambda _: pytest.fail("a value was read back to the host"))
            captured.step()
        host.step()
    assert_close(params, others, rtol=1e-13, atol=0)
    assert captured.state[params[1]]["step"] == 5


@engines
@pytest.mark.parametrize("shape", [(400_000,), (3, 2)], ids=str)
def test_state_that_no_longer_fits_is_an_error_and_no_write_elsewhere(engine: dict[str, Any], shape: tuple[int, ...]) -> None:
    # Pruning or resizing exchanges a parameter's data like this.
    param = nn.Parameter(torch.ones(2, 3))
    optimizer = VSGD([param], **engine)
    train(optimizer, [param], range(1))
    param.grad, param.data = None, torch.ones(shape)
    with pytest.raises((RuntimeError, ValueError)):
        train(optimizer, [param], range(1))


@engines
@pytest.mark.parametrize("kind", ["negative", "conjugate"])
def test_a_lazy_gradient_counts_as_what_it_is(kind: str, engine: dict[str, Any]) -> None:
    # The memory holds the negative values, with a bit that marks it, like the imaginary part of a conjugate.
    grad = torch.tensor([1.0, -2.0, 3.0, -4.0])
    lazy = torch._neg_view(grad) if kind == "negative" else torch.complex(grad, grad).conj()
    params = [nn.Parameter(torch.ones_like(lazy)) for _ in range(2)]
    params[0].grad, params[1].grad = lazy, lazy.resolve_neg().resolve_conj().clone()
    for param in params:
        VSGD([param], **engine).step()
    assert_close(params[0], params[1])


@engines
def test_a_parameter_of_a_subclass_without_operations_of_its_own_is_plain(engine: dict[str, Any]) -> None:
    class Weight(nn.Parameter):
        pass

    one, other = Weight(torch.ones(9)), nn.Parameter(torch.ones(9))
    assert is_plain(one)
    assert not is_plain(TwoTensor(torch.ones(2), torch.ones(2)))
    for param in (one, other):
        train(VSGD([param], **engine), [param], range(3))
    assert_close(one.data, other.data, rtol=0, atol=0)


@engines
def test_blocks_and_layouts_have_the_noise_of_their_places(engine: dict[str, Any]) -> None:
    big = torch.randn(3, 70_000)
    params = {"one": big.clone(), "transposed": big.t().contiguous().t(), "gapped": torch.randn(3, 140_000)[:, ::2].copy_(big)}
    ends = {}
    for name, tensor in params.items():
        param = nn.Parameter(tensor)
        optimizer = VSGD([param], **engine, state_dtype="bfloat16")
        train(optimizer, [param], range(3))
        ends[name] = optimizer.state[param]["b_g"]
    # The state has no gaps, so its layout equals that of the first one.
    assert (ends["one"] == ends["gapped"]).float().mean() > 0.999
    # The transposed state has another memory order, and is rounded with different noise.
    assert (ends["one"] == ends["transposed"]).float().mean() < 0.9
