"""Every engine follows the authors' code: parameters, mu and both rates, at every step."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
from engines import ENGINES as ANY_ENGINES
from engines import x64
from trajectories import CASES, Golden, assert_follows, golden, stack

import vsgd.numpy

STATE = ("mu_g", "b_g", "b_ghat")
TOLERANCE = {np.float64: 1e-10, np.float32: 1e-4}
Run = list[dict[str, np.ndarray]]


CONSTANT_HYPER = {"lr": 0.05, "variance_ratio": 5.0, "prior_strength": 1e-6, "kappa": 0.7, "weight_decay": 0.1}


def run_numpy(case: Golden, dtype: type) -> Run:
    params = [param.astype(dtype) for param in case.params0]
    optimizer = vsgd.numpy.VSGD(params, **case.hyper)
    steps = []
    for t, lr in enumerate(case.lr):
        optimizer.lr = float(lr)
        optimizer.step([grad[t].astype(dtype) for grad in case.grads])
        states = zip(params, optimizer.state, strict=True)
        steps.append([{"param": param.copy(), **{name: state[name].copy() for name in STATE}} for param, state in states])
    return stack(steps)


def run_torch(case: Golden, dtype: type, *, compiled: bool = False, **flags: bool) -> Run:
    torch = pytest.importorskip("torch")
    from vsgd.torch import VSGD

    if flags.get("fused"):
        pytest.importorskip("numba")
    # Autograd refuses a differentiable step on a leaf that it tracks.
    tracked = not flags.get("differentiable")
    params = [torch.nn.Parameter(torch.from_numpy(param.astype(dtype)), tracked) for param in case.params0]
    # As a tensor where compiled, for the compiler takes a number for a constant of the function.
    optimizer = VSGD(params, lr=torch.zeros((), dtype=torch.float64) if compiled else 0.0, **case.hyper, **flags)
    group = optimizer.param_groups[0]
    torch.compiler.reset()
    step = torch.compile(optimizer.step) if compiled else optimizer.step
    steps = []
    for t, lr in enumerate(case.lr):
        if compiled:
            group["lr"].fill_(lr)
        else:
            group["lr"] = float(lr)
        for param, grad in zip(params, case.grads, strict=True):
            param.grad = torch.from_numpy(grad[t].astype(dtype))
        step()
        arrays = [{"param": param.detach(), **optimizer.state[param]} for param in params]
        steps.append([{name: named[name].numpy().copy() for name in ("param", *STATE)} for named in arrays])
    return stack(steps)


def run_optax(case: Golden, dtype: type, *, jit: bool) -> Run:
    jax = pytest.importorskip("jax")
    optax = pytest.importorskip("optax")
    import jax.numpy as jnp

    from vsgd.optax import vsgd

    with x64(dtype is np.float64):
        lr = jnp.asarray(case.lr, dtype)
        solver = vsgd(lambda count: lr[count], **case.hyper)
        update = jax.jit(solver.update) if jit else solver.update
        params = [jnp.asarray(param, dtype) for param in case.params0]
        state = solver.init(params)
        steps = []
        for t in range(len(case.lr)):
            updates, state = update([jnp.asarray(grad[t], dtype) for grad in case.grads], state, params)
            params = optax.apply_updates(params, updates)
            trees = (params, *(getattr(state[0], name) for name in STATE))
            steps.append(
                [dict(zip(("param", *STATE), map(np.array, arrays), strict=True)) for arrays in zip(*trees, strict=True)]
            )
        return stack(steps)


ENGINES: dict[str, Callable[[Golden, type], Run]] = {
    "numpy": run_numpy,
    "torch-loop": partial(run_torch, foreach=False),
    "torch-foreach": partial(run_torch, foreach=True),
    "torch-fused": partial(run_torch, fused=True),
    "torch-differentiable": partial(run_torch, differentiable=True),
    "optax-eager": partial(run_optax, jit=False),
    "optax-jit": partial(run_optax, jit=True),
}


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("engine", ENGINES)
def test_engine_follows_the_authors_code(engine: str, case: str, dtype: type) -> None:
    run = ENGINES[engine](golden(case), dtype)
    assert run[0]["mu_g"].dtype == dtype
    assert_follows(run, golden(case).after, TOLERANCE[dtype])


@pytest.mark.compiler
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("case", CASES)
def test_compiled_step_follows_the_authors_code(case: str, dtype: type) -> None:
    run = run_torch(golden(case), dtype, compiled=True)
    assert_follows(run, golden(case).after, TOLERANCE[dtype])


@pytest.mark.compiler
def test_compiled_foreach_follows_the_authors_code() -> None:
    run = run_torch(golden("weight_decay"), np.float64, compiled=True, foreach=True, capturable=True)
    assert_follows(run, golden("weight_decay").after, TOLERANCE[np.float64])


def run_constant(engine: str, case: Golden, dtype: type) -> Run:
    step, read = ANY_ENGINES[engine]("ConstantVSGD", [param.astype(dtype) for param in case.params0], **CONSTANT_HYPER)
    steps = []
    for t in range(len(case.lr)):
        step([grad[t].astype(dtype) for grad in case.grads])
        steps.append([{name: each[name] for name in ("param", "mu_g", "b")} for each in read()])
    return stack(steps)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("engine", ANY_ENGINES)
def test_constant_vsgd_follows_the_reference_in_float64(engine: str, dtype: type) -> None:
    case = golden("defaults")
    assert_follows(run_constant(engine, case, dtype), run_constant("numpy", case, np.float64), TOLERANCE[dtype])
