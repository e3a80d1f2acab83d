"""PyTorch: one `optimizer.step()`."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch

import vsgd.torch
from benchmarks import machine
from benchmarks.shapes import Shape
from benchmarks.suite import COMPILER, LEARNING_RATE, WEIGHT_DECAY, Arm, Competitor, Suite


class TorchProblem:
    """Parameters with gradients of normal noise."""

    def __init__(self, shape: Shape, device: str) -> None:
        generator = torch.Generator(device).manual_seed(0)
        self.device = device
        self.params = [torch.nn.Parameter(torch.ones(tensor, device=device)) for tensor in shape.tensors]
        self.grads = [1e-2 * torch.randn(tensor, device=device, generator=generator) for tensor in shape.tensors]
        for param, grad in zip(self.params, self.grads, strict=True):
            param.grad = grad

    def flip_gradients(self) -> None:
        torch._foreach_neg_(self.grads)
        self.wait()

    def wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def make_memory(self, size: int) -> TorchMemory:
        return TorchMemory(self, size)


class TorchMemory:
    """Two float32 tensors, one of which is added to the other."""

    def __init__(self, problem: TorchProblem, size: int) -> None:
        self.problem = problem
        self.a, self.b = (torch.ones(max(1, size // 8), device=problem.device) for _ in range(2))
        self.moved = 3 * self.a.nbytes

    def step(self, count: int) -> None:
        for _ in range(count):
            self.a.add_(self.b)
        self.problem.wait()


class TorchArm:
    """A `torch.optim.Optimizer`, with a compiled step or a plain one."""

    def __init__(self, problem: TorchProblem, optimizer: torch.optim.Optimizer, compiled: bool) -> None:
        self.problem = problem
        self.optimizer = optimizer
        self.one_step: Callable[[], Any] = torch.compile(optimizer.step) if compiled else optimizer.step

    def step(self, count: int) -> None:
        for _ in range(count):
            self.one_step()
        self.problem.wait()

    def measure_state(self) -> list[tuple[int, int]]:
        values = (value for state in self.optimizer.state.values() for value in state.values())
        return [(value.numel(), value.nbytes) for value in values if isinstance(value, torch.Tensor)]

    def measure_transient_bytes(self) -> int | None:
        if self.problem.device == "cpu":
            return machine.measure_peak_growth(lambda: self.step(1))
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        self.step(1)
        return torch.cuda.max_memory_allocated() - before


def _make_arm(
    optimizer: Callable[..., Any], *, lr: float = LEARNING_RATE, compiled: bool = False, **arguments: Any
) -> Callable[[TorchProblem], Arm]:
    return lambda problem: TorchArm(problem, optimizer(problem.params, lr=lr, **arguments), compiled)


def _make_decaying_arm(optimizer: Callable[..., Any], **arguments: Any) -> Callable[[TorchProblem], Arm]:
    return _make_arm(optimizer, weight_decay=WEIGHT_DECAY, **arguments)


def _make_pytorch_optimizer_arm(name: str) -> Callable[[TorchProblem], Arm]:
    def make(problem: TorchProblem) -> Arm:
        import pytorch_optimizer

        return _make_decaying_arm(getattr(pytorch_optimizer, name))(problem)

    return make


_VSGD, _CONSTANT, _ADAMW = vsgd.torch.VSGD, vsgd.torch.ConstantVSGD, torch.optim.AdamW
_LOOP = {"fused": False, "foreach": False}
_FUSED = ("triton",) if torch.cuda.is_available() else ("numba",)

COMPETITORS = {
    "AdamW(fused=True)": Competitor(_make_decaying_arm(_ADAMW, fused=True), plotted=True),
    "AdamW()": Competitor(_make_decaying_arm(_ADAMW), plotted=True),
    "AdamW(foreach=True)": Competitor(_make_decaying_arm(_ADAMW, foreach=True)),
    "SGD(momentum=0.9)": Competitor(_make_arm(torch.optim.SGD, momentum=0.9)),
    "pytorch_optimizer AdaBelief": Competitor(_make_pytorch_optimizer_arm("AdaBelief"), needs=("pytorch_optimizer",)),
    "pytorch_optimizer VSGD": Competitor(_make_pytorch_optimizer_arm("VSGD"), needs=("pytorch_optimizer",), plotted=True),
    "VSGD(fused=True)": Competitor(_make_decaying_arm(_VSGD, fused=True), needs=_FUSED, plotted=True),
    "VSGD(fused=True), bfloat16 state": Competitor(
        _make_decaying_arm(_VSGD, fused=True, state_dtype="bfloat16"), needs=_FUSED, plotted=True
    ),
    "VSGD(foreach=True)": Competitor(_make_decaying_arm(_VSGD, foreach=True)),
    "VSGD, loop": Competitor(_make_decaying_arm(_VSGD, **_LOOP), plotted=True),
    "VSGD, torch.compile": Competitor(_make_decaying_arm(_VSGD, compiled=True), needs=(COMPILER,)),
    "ConstantVSGD(fused=True)": Competitor(_make_decaying_arm(_CONSTANT, fused=True), needs=_FUSED),
    "ConstantVSGD(foreach=True)": Competitor(_make_decaying_arm(_CONSTANT, foreach=True)),
    "ConstantVSGD, loop": Competitor(_make_decaying_arm(_CONSTANT, **_LOOP)),
    "ConstantVSGD, torch.compile": Competitor(_make_decaying_arm(_CONSTANT, compiled=True), needs=(COMPILER,)),
}

_SUITE = Suite(
    title="PyTorch, `optimizer.step()`",
    baselines=("AdamW(fused=True)", "AdamW()"),
    competitors=COMPETITORS,
    make_problem=TorchProblem,
    packages=("torch", "numba", "pytorch_optimizer"),
    imports={
        "vsgd.torch": ("torch",),
        # Imported at the first fused step.
        **({"vsgd.backends.torch.fused_cpu": ("torch", "vsgd.torch")} if find_spec("numba") else {}),
    },
    memory="on a CPU growth of the process's resident memory, on a GPU torch.cuda.max_memory_allocated",
    count_threads=torch.get_num_threads,
    find_gpu=torch.cuda.get_device_name,
)

#: By name, as `benchmarks.catalogue` has it.
SUITES = {"torch": _SUITE}
