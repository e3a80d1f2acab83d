"""The engines of each adapter behind one small interface, for the tests that hold for all of them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
from rules import RULES

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


@functools.cache
def optax_solver(kind: str, *, jit: bool, **hyper: Any) -> tuple[Any, Callable[..., Any]]:
    """The transformation of these hyperparameters and its step; cached, so that equal ones are compiled once."""
    jax = pytest.importorskip("jax")
    optax = pytest.importorskip("optax")
    import vsgd.optax

    make = {"VSGD": vsgd.optax.vsgd, "ConstantVSGD": vsgd.optax.constant_vsgd}[kind]
    solver = make(hyper.pop("lr", 0.01), **hyper)

    def step(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        updates, state = solver.update(grads, state, params)
        moved = [None if update is None else param for param, update in zip(params, updates, strict=True)]
        stepped = optax.apply_updates(moved, updates)
        return [old if new is None else new for old, new in zip(params, stepped, strict=True)], state

    return solver, jax.jit(step) if jit else step


def x64(enable: bool = True) -> AbstractContextManager[Any]:
    """JAX with 64-bit numbers, or without, which is its default."""
    jax = pytest.importorskip("jax")
    if hasattr(jax, "enable_x64"):
        return jax.enable_x64(enable)
    from jax.experimental import enable_x64  # in older ones

    return enable_x64(enable)


def optax_engine(
    kind: str, params: Sequence[np.ndarray], *, jit: bool, **hyper: Any
) -> tuple[Step, Callable[[], list[dict[str, np.ndarray]]]]:
    jnp = pytest.importorskip("jax.numpy")
    solver, take_step = optax_solver(kind, jit=jit, **hyper)
    double = any(param.dtype in (np.float64, np.complex128) for param in params)
    with x64(double):
        arrays = [jnp.asarray(param) for param in params]
        state = solver.init(arrays)

    def step(grads: Sequence[np.ndarray | None]) -> None:
        nonlocal arrays, state
        with x64(double):
            arrays, state = take_step(arrays, state, [None if grad is None else jnp.asarray(grad) for grad in grads])

    def read() -> list[dict[str, np.ndarray]]:
        names = RULES[kind].state_names
        trees = [getattr(state[0], name) for name in names]
        columns = zip(arrays, *trees, strict=True)
        return [
            {
                "param": np.array(param),
                "step": np.array(state[0].count),
                **dict(zip(names, map(np.array, of_param), strict=True)),
            }
            for param, *of_param in columns
        ]

    return step, read


def to_mlx(array: np.ndarray) -> Any:
    """An array of MLX, which would make float32 of float64."""
    mx = pytest.importorskip("mlx.core")
    return mx.array(array, getattr(mx, array.dtype.name))


def mlx_engine(kind: str, params: Sequence[np.ndarray], **hyper: Any) -> tuple[Step, Callable[[], list[dict[str, np.ndarray]]]]:
    mx = pytest.importorskip("mlx.core")
    import vsgd.mlx

    mx.set_default_device(mx.cpu)  # GPUs have no float64
    arrays = {str(i): to_mlx(param) for i, param in enumerate(params)}
    # As an array, for MLX would keep a number as float32.
    optimizer = getattr(vsgd.mlx, kind)(to_mlx(np.array(hyper.pop("lr", 0.01))), **hyper)
    optimizer.init(arrays)

    def step(grads: Sequence[np.ndarray | None]) -> None:
        given = {str(i): to_mlx(grad) for i, grad in enumerate(grads) if grad is not None}
        arrays.update(optimizer.apply_gradients(given, arrays))
        mx.eval(arrays, optimizer.state)

    def read() -> list[dict[str, np.ndarray]]:
        named = ({"param": arrays[i], "step": optimizer.step, **optimizer.state[i]} for i in arrays)
        return [{name: np.array(array) for name, array in each.items()} for each in named]

    return step, read


HAS_TORCH = find_spec("torch") is not None
HAS_OPTAX = find_spec("jax") is not None and find_spec("optax") is not None
HAS_MLX = find_spec("mlx") is not None
HAS_NUMBA = HAS_TORCH and find_spec("numba") is not None
ENGINES: dict[str, Engine] = {
    "numpy": numpy_engine,
    "torch-loop": partial(torch_engine, foreach=False),
    "torch-foreach": partial(torch_engine, foreach=True),
    "torch-fused": partial(torch_engine, fused=True),
    "optax-eager": partial(optax_engine, jit=False),
    "optax-jit": partial(optax_engine, jit=True),
    "mlx": mlx_engine,
}
#: Those that can run here; what must be here, `pytest --require` says.
AVAILABLE = [
    "numpy",
    *(["torch-loop", "torch-foreach"] if HAS_TORCH else []),
    *(["torch-fused"] if HAS_NUMBA else []),
    *(["optax-eager", "optax-jit"] if HAS_OPTAX else []),
    *(["mlx"] if HAS_MLX else []),
]
