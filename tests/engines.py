"""The engines of each adapter behind one small interface, for the tests that hold for all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest

import vsgd.numpy

Step = Callable[[Sequence[np.ndarray | None]], None]
#: `engine(class name, params, **hyper) -> (step, read)`; `read()` gives {"param": ..., state name: ...} for each parameter.
Engine = Callable[..., tuple[Step, Callable[[], list[dict[str, np.ndarray]]]]]


def numpy_engine(
    kind: str, params: Sequence[np.ndarray], **hyper: Any
) -> tuple[Step, Callable[[], list[dict[str, np.ndarray]]]]:
    arrays = [param.copy() for param in params]
    optimizer = getattr(vsgd.numpy, kind)(arrays, **hyper)

    def read() -> list[dict[str, np.ndarray]]:
        pairs = zip(arrays, optimizer.state, strict=True)
        return [{"param": array.copy(), **{name: np.copy(value) for name, value in state.items()}} for array, state in pairs]

    return optimizer.step, read


def torch_engine(
    kind: str, params: Sequence[np.ndarray], **options: Any
) -> tuple[Step, Callable[[], list[dict[str, np.ndarray]]]]:
    torch = pytest.importorskip("torch")
    import vsgd.torch

    if options.get("fused"):
        pytest.importorskip("numba")
    tensors = [torch.nn.Parameter(torch.from_numpy(param.copy())) for param in params]
    optimizer = getattr(vsgd.torch, kind)(tensors, **options)

    def step(grads: Sequence[np.ndarray | None]) -> None:
        for tensor, grad in zip(tensors, grads, strict=True):
            tensor.grad = None if grad is None else torch.from_numpy(grad.copy())
        optimizer.step()

    def read() -> list[dict[str, np.ndarray]]:
        named = ({"param": tensor.detach(), **optimizer.state[tensor]} for tensor in tensors)
        return [{name: value.numpy().copy() for name, value in tensors.items()} for tensors in named]

    return step, read


HAS_TORCH = find_spec("torch") is not None
HAS_NUMBA = HAS_TORCH and find_spec("numba") is not None
ENGINES: dict[str, Engine] = {
    "numpy": numpy_engine,
    "torch-loop": partial(torch_engine, foreach=False),
    "torch-foreach": partial(torch_engine, foreach=True),
    "torch-fused": partial(torch_engine, fused=True),
}
#: Those that can run here; what must be here, `pytest --require` says.
AVAILABLE = ["numpy", *(["torch-loop", "torch-foreach"] if HAS_TORCH else []), *(["torch-fused"] if HAS_NUMBA else [])]
