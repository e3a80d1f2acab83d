"""`torch.compile(optimizer.step)`: one graph, no compiling anew, the same steps."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")

from adapters.torch.torch_optimizers import problem, train  # noqa: E402
from torch import nn  # noqa: E402
from torch.testing import assert_close  # noqa: E402

from vsgd.torch import VSGD, ConstantVSGD  # noqa: E402


class GraphCounter:
    """A compiler backend that runs the graphs as they are and counts them."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: Any) -> Any:
        self.graphs += 1
        return graph.forward


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch.compiler.reset()


@pytest.mark.parametrize("foreach", [None, True])
@pytest.mark.parametrize("cls", [VSGD, ConstantVSGD])
def test_one_graph_serves_a_whole_schedule(cls: type, foreach: bool | None) -> None:
    (params, _), (others, _) = problem(), problem()
    counter = GraphCounter()
    options = {"foreach": foreach, "capturable": bool(foreach), "weight_decay": 0.1}
    optimizer = cls(params, lr=torch.tensor(0.01), **options)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    eager = cls(others, weight_decay=0.1, foreach=False)
    step = torch.compile(optimizer.step, backend=counter)
    for seed in range(10):
        for param, other in zip(params, others, strict=True):
            param.grad = torch.randn(param.shape, generator=torch.Generator().manual_seed(seed))
            other.grad = param.grad.clone()
        eager.param_groups[0]["lr"] = float(optimizer.param_groups[0]["lr"])
        step()
        eager.step()
        scheduler.step()
    assert counter.graphs == 1
    assert_close(params, others)
    assert optimizer.state[params[0]]["step"] == 10


def test_the_compiled_step_holds_states_of_half_precision_parameters_in_float32() -> None:
    params, _ = problem(dtype=torch.bfloat16)
    others = [nn.Parameter(param.detach().clone()) for param in params]
    optimizer, eager = VSGD(params, lr=torch.tensor(0.01)), VSGD(others, foreach=False)
    compiled = torch.compile(optimizer.step, backend="aot_eager")
    for seed in range(3):
        for param, other in zip(params, others, strict=True):
            param.grad = torch.randn(param.shape, generator=torch.Generator().manual_seed(seed)).bfloat16()
            other.grad = param.grad.clone()
        compiled()
        eager.step()
    assert optimizer.state[params[0]]["b_g"].dtype is torch.float32
    assert_close(params, others)


@pytest.mark.compiler
def test_forward_backward_and_step_compile_together() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))
    twin = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))
    twin.load_state_dict(model.state_dict())
    optimizer, eager = VSGD(model.parameters(), lr=torch.tensor(0.01)), VSGD(twin.parameters(), foreach=False)
    x = torch.randn(32, 6)

    def train_step(network: nn.Module, opt: torch.optim.Optimizer) -> None:
        opt.zero_grad()
        network(x).square().mean().backward()
        opt.step()

    compiled = torch.compile(train_step)
    for _ in range(5):
        compiled(model, optimizer)
        train_step(twin, eager)
    assert_close(list(model.parameters()), list(twin.parameters()))


@pytest.mark.compiler
def test_powers_of_the_count_are_computed_outside_of_the_loop_over_elements() -> None:
    from torch._inductor.utils import run_and_get_code

    params = [nn.Parameter(torch.ones(4096))]
    params[0].grad = torch.ones(4096)
    optimizer = VSGD(params, lr=torch.tensor(0.01))
    _, code = run_and_get_code(torch.compile(optimizer.step))
    before, *after = "".join(code).split("for(")
    assert "pow(" in before
    assert after
    assert "pow(" not in "".join(after)


@pytest.mark.gpu
@pytest.mark.parametrize("engine", [{"foreach": True}, {"foreach": False}, {"fused": True}], ids=str)
@pytest.mark.parametrize("cls", [VSGD, ConstantVSGD])
def test_a_cuda_graph_captures_the_step(cls: type, engine: dict[str, bool]) -> None:
    if "fused" in engine:
        pytest.importorskip("triton")
    (params, _), (others, _) = problem(), problem()
    params = [nn.Parameter(param.detach().cuda()) for param in params]
    optimizer = cls(params, capturable=True, **engine)
    grads = [torch.zeros_like(param) for param in params]
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
    eager = cls(others, foreach=False)
    # Torch's recipe: warm up on a side stream, then capture. With lr at its value, gradients not zero.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    for grad in grads:
        grad.fill_(1.0)
    with torch.cuda.stream(stream):
        optimizer.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    for _ in range(3):
        graph.replay()
    for param in others:
        param.grad = torch.ones_like(param)
    for _ in range(4):
        eager.step()
    assert_close([param.cpu() for param in params], others)
    assert optimizer.state[params[0]]["step"].item() == 4


def test_the_eager_step_is_not_disturbed_by_a_compiled_one() -> None:
    (params, _), (others, _) = problem(), problem()
    optimizer, eager = VSGD(params, lr=torch.tensor(0.01)), VSGD(others)
    train(optimizer, params, range(2))
    compiled = torch.compile(optimizer.step, backend="eager")
    for seed, step in enumerate([compiled, optimizer.step, compiled], start=2):
        for param in params:
            param.grad = torch.randn(param.shape, generator=torch.Generator().manual_seed(seed))
        step()
    train(eager, others, range(2))
    for seed in range(2, 5):
        for param in others:
            param.grad = torch.randn(param.shape, generator=torch.Generator().manual_seed(seed))
        eager.step()
    assert_close(params, others)
    assert optimizer.state[params[0]]["step"] == 5


def test_a_compiled_step_refuses_a_sparse_gradient_and_makes_no_state() -> None:
    param = nn.Parameter(torch.ones(3))
    param.grad = torch.ones(3).to_sparse()
    optimizer = VSGD([param])
    with pytest.raises(Exception, match="VSGD does not support sparse gradients"):
        torch.compile(optimizer.step, backend="eager")()
    assert not optimizer.state[param]
