"""The torch adapter's engines: the same numbers from each, for parameters of all kinds."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from adapters.torch.torch_optimizers import ENGINES, STATE_NAMES, problem, randn_like, train  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.testing import assert_close  # noqa: E402
from torch.testing._internal.two_tensor import TwoTensor  # noqa: E402

from vsgd.torch import VSGD, ConstantVSGD  # noqa: E402

classes = pytest.mark.parametrize("cls", [VSGD, ConstantVSGD])
engines = pytest.mark.parametrize("engine", ENGINES, ids=str)


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
    monkeypatch.setattr("vsgd.backends.torch.leaves.CPU_BLOCK", block)
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
    monkeypatch.setattr("vsgd.torch.optimizer._get_capturable_supported_devices", lambda: ["cpu"])
    monkeypatch.setattr("vsgd.backends.torch.leaves.CPU_BLOCK", 4)
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


@engines
def test_a_parameter_of_a_subclass_without_operations_of_its_own_is_plain(engine: dict[str, Any]) -> None:
    class Weight(nn.Parameter):
        pass

    from vsgd.backends.torch.leaves import is_plain

    one, other = Weight(torch.ones(9)), nn.Parameter(torch.ones(9))
    assert is_plain(one)
    assert not is_plain(TwoTensor(torch.ones(2), torch.ones(2)))
    for param in (one, other):
        optimizer = VSGD([param], **engine)
        train(optimizer, [param], range(3))
    assert_close(one.data, other.data, rtol=0, atol=0)
