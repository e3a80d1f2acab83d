"""Test what a step does on a GPU apart from its numbers: streams, waits, graphs, and more elements than 32 bits can count."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from adapters.torch.torch_optimizers import classes, set_grads
from torch import nn

from vsgd.torch import VSGD

pytestmark = pytest.mark.gpu
ROUNDED = {"state_dtype": "bfloat16", "stochastic_rounding": True, "seed": 3}
engines = pytest.mark.parametrize("engine", [{"fused": True}, {"foreach": True}, {"foreach": False}], ids=str)
AUTO = {"prior_strength": "auto"}
noises = pytest.mark.parametrize("noise", [{}, ROUNDED, AUTO], ids=["float32", "rounded", "calibrated"])


def make_params(noise: dict[str, Any]) -> list[nn.Parameter]:
    dtype = torch.bfloat16 if "state_dtype" in noise else torch.float32
    params = [nn.Parameter(torch.linspace(-1, 1, size).to("cuda", dtype)) for size in (5, 5000, 70_000)]
    set_grads(params, 0)
    return params


def assert_equal(params: list[nn.Parameter], others: list[nn.Parameter]) -> None:
    torch.cuda.synchronize()
    for param, other in zip(params, others, strict=True):
        assert torch.equal(param, other)


def test_steps_on_changing_streams_equal_those_on_one() -> None:
    params, others = make_params({}), make_params({})
    optimizer, other = VSGD(params, fused=True), VSGD(others, fused=True)
    streams = [torch.cuda.Stream() for _ in range(3)]
    torch.cuda.synchronize()
    for step in range(30):
        other.step()
        streams[step % 3].wait_stream(streams[step % 3 - 1])
        with torch.cuda.stream(streams[step % 3]):
            torch.cuda._sleep(2_000_000)
            optimizer.step()
    assert_equal(params, others)


@engines
@noises
@pytest.mark.parametrize("capturable", [False, True])
def test_the_host_does_not_wait(engine: dict[str, Any], noise: dict[str, Any], capturable: bool) -> None:
    optimizer = VSGD(make_params(noise), capturable=capturable, **engine, **noise)
    optimizer.step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@classes
@engines
@noises
def test_a_replayed_graph_equals_single_steps(cls: type, engine: dict[str, Any], noise: dict[str, Any]) -> None:
    params, others = make_params(noise), make_params(noise)
    optimizer, other = (cls(each, capturable=True, **engine, **noise) for each in (params, others))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        optimizer.step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    # A graph that reads freed memory would read these numbers.
    junk = [torch.full((size,), 7, device="cuda") for size in (4, 64, 1024, 8192)] * 8
    for _ in range(5):
        graph.replay()
    for _ in range(6):
        other.step()
    assert_equal(params, others)
    assert optimizer.state[params[0]]["step"].item() == 6
    assert len(junk) == 32


def test_a_first_step_that_calibrates_cannot_be_captured() -> None:
    optimizer = VSGD(make_params({}), capturable=True, **AUTO)
    with pytest.raises(RuntimeError, match="before a CUDA graph is captured"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        optimizer.step()
    assert not optimizer.state


@pytest.mark.skipif(not torch.cuda.is_available() or torch.cuda.mem_get_info()[0] < 40e9, reason="needs 40 GB of GPU memory")
def test_both_ends_of_a_tensor_beyond_32_bits_are_stepped() -> None:
    ends = []
    for size in (2**31 + 5000, 10):
        param = nn.Parameter(torch.ones(size, dtype=torch.bfloat16, device="cuda"))
        param.grad = torch.full_like(param, 0.5)
        param.grad[-7:] = -0.25
        optimizer = VSGD([param], lr=0.25, fused=True)
        for _ in range(2):
            optimizer.step()
        ends.append((param[:3].tolist(), param[-7:].tolist()))
    assert ends[0] == ends[1]
