"""What the matrix runs: runners by name, experiments, the data of a small training, and how each is driven.

This module imports no framework. An experiment drives a runner (of `*_runners.py`), whatever its framework. A runner is an
optimizer with its parameters, made by `(kind, params, lr=..., **hyper)`, where `lr` is the step size of each step, or None
for the adapter's default. `step(grads)` takes a step with these gradients. `train(x, y)` takes a step of the network on this
batch, with gradients that the framework computes. `read()` returns value and state of each parameter, or at least the value in
a training. `posterior()` returns the posterior of each parameter's gradient.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np
from drivers.trajectories import CASES, golden, stack
from packaging.requirements import Requirement

DTYPES = ("float64", "float32")
DEVICES = ("cpu", "gpu")
#: The step size of a training, which is the adapters' default.
LR = 0.01
STEPS = 200
BATCH = 64
#: A training's parameters are compared every so many steps.
STRIDE = 20

#: The packages that provide a training's data.
DATA_NEEDS = ("sklearn",)

# By what each run gets: gradients, or a network to train. Frameworks round a training's gradients and order its sums
# differently, and such roundings grow. So its bound in float32 is ten times the distance between two float32 trainings of NumPy
# whose initial weights differ by one unit in the last place (5e-7 to 1e-6 of the array's largest value);
# `test_the_bound_is_ten_roundings` checks it. In float64 such twins drift apart by 1e-15 to 2e-15, far below the bound.
TOLERANCE = {"fed": {"float64": 1e-10, "float32": 1e-4}, "training": {"float64": 1e-9, "float32": 1e-5}}

#: For each parameter, its arrays by name, time first.
Run = list[dict[str, np.ndarray]]
Snapshot = list[dict[str, np.ndarray]]


class Spec(NamedTuple):
    """One runner.

    Attributes:
        worker: the process that runs it, named as the module `{worker}_runners` or, with its backend, `keras-{backend}`.
        needs: the packages that it requires.
        devices: where it can run, of `DEVICES`.
        cells: what it runs, as (experiment, dtype); None: everything.
    """

    worker: str
    needs: tuple[str, ...] = ()
    devices: tuple[str, ...] = DEVICES
    cells: frozenset[tuple[str, str]] | None = None


class Experiment(NamedTuple):
    """One experiment.

    Attributes:
        kind: the optimizer's class.
        case: the golden case whose gradients the runner gets; None: a training, where each framework computes its gradients.
        hyper: the hyperparameters, if they differ from the golden case's.
        reads: the runner's method that returns what is compared after each step.
    """

    kind: str
    case: str | None
    hyper: dict[str, float] | None = None
    reads: str = "read"


EXPERIMENTS = {
    **{f"golden-{case}": Experiment("VSGD", case) for case in CASES},
    "constant-fed": Experiment(
        "ConstantVSGD", "defaults", {"variance_ratio": 5.0, "prior_strength": 1e-6, "kappa": 0.7, "weight_decay": 0.1}
    ),
    "outliers-fed": Experiment("VSGD", "defaults", {"outlier_threshold": 1.5}),
    "posterior": Experiment("VSGD", "defaults", {"prior_strength": 1e-6}, "posterior"),
    "constant-posterior": Experiment("ConstantVSGD", "defaults", {"variance_ratio": 5.0, "kappa": 0.7}, "posterior"),
    "training": Experiment("VSGD", None),
    "constant-training": Experiment("ConstantVSGD", None),
}

# Each takes seconds to compile, so run only the trajectories of the authors' code and a training.
_COMPILED = frozenset(
    [*((f"golden-{case}", dtype) for case in CASES for dtype in ("float64", "float32")), ("training", "float64")]
)
_COMPILED_FEW = frozenset([("golden-weight_decay", "float64"), ("constant-training", "float32")])

# On PyTorch `keras.ops.minimum` takes float64 through float32; the adapter uses the torch engines there.
_KERAS_TORCH = frozenset(
    (experiment, dtype) for experiment in EXPERIMENTS for dtype in DTYPES if (experiment, dtype) != ("outliers-fed", "float64")
)

_CPU, _GPU = DEVICES[:1], DEVICES[1:]
_TORCH, _JAX, _OPTAX, _TRITON, _MLX = ("torch",), ("jax",), ("jax", "optax"), ("torch", "triton>=3.6"), ("mlx",)
RUNNERS = {
    "numpy": Spec("numpy", devices=_CPU),
    "core-numpy": Spec("numpy", devices=_CPU),
    "torch-loop": Spec("torch", _TORCH),
    "torch-foreach": Spec("torch", _TORCH),
    "torch-fused": Spec("torch", ("torch", "numba"), devices=_CPU),
    "torch-triton": Spec("torch", _TRITON, devices=_GPU),
    "torch-triton-capturable": Spec("torch", _TRITON, devices=_GPU),
    "torch-triton-interpreted": Spec("triton", _TRITON, devices=_CPU),
    "torch-differentiable": Spec("torch", _TORCH),
    "torch-compiled": Spec("torch", _TORCH, cells=_COMPILED),
    "torch-compiled-foreach": Spec("torch", _TORCH, cells=_COMPILED_FEW),
    "core-torch": Spec("torch", _TORCH),
    "core-torch-lists": Spec("torch", _TORCH),
    "optax-eager": Spec("jax", _OPTAX),
    "optax-jit": Spec("jax", _OPTAX),
    "optax-jit-numba": Spec("jax", (*_OPTAX, "numba"), devices=_CPU),
    "core-jax": Spec("jax", _JAX),
    "mlx": Spec("mlx", _MLX, devices=_CPU),
    "mlx-compiled": Spec("mlx", _MLX, devices=_CPU, cells=_COMPILED_FEW),
    "core-mlx": Spec("mlx", _MLX, devices=_CPU),
    **{
        f"{name}-{backend}": Spec(f"keras-{backend}", ("keras", backend))
        for backend in ("tensorflow", "jax", "torch")
        for name in ("keras", "core-keras")
    },
    "core-keras-torch": Spec("keras-torch", ("keras", "torch"), cells=_KERAS_TORCH),
    "core-tensorflow": Spec("keras-tensorflow", ("keras", "tensorflow")),
}


class Training(NamedTuple):
    """A network with one hidden layer of 32 tanh units on the digits.

    Attributes:
        params0: kernel and bias of both layers, float64.
        x: the batches' pixels, (steps, batch, 64).
        y: their classes, (steps, batch).
    """

    params0: list[np.ndarray]
    x: np.ndarray
    y: np.ndarray


@functools.cache
def training() -> Training:
    """Return the training; its data need scikit-learn."""
    from sklearn.datasets import load_digits

    rng = np.random.default_rng(5)
    pixels, classes = load_digits(return_X_y=True)
    shapes = ((64, 32), (32, 10))
    params = [array for shape in shapes for array in (rng.standard_normal(shape) / np.sqrt(shape[0]), np.zeros(shape[1]))]
    # Round to float32, so that all runs start from exactly the same weights.
    params = [param.astype(np.float32).astype(np.float64) for param in params]
    chosen = np.stack([rng.choice(len(classes), BATCH, replace=False) for _ in range(STEPS)])
    return Training(params, pixels[chosen] / 16, classes[chosen].astype(np.int32))


def fed(make: Callable[..., Any], experiment: Experiment, dtype: str) -> Run:
    """Feed a golden case's gradients to an optimizer, and return what it holds after each step."""
    kind, case, hyper, reads = experiment
    inputs = golden(case)
    runner = make(kind, [param.astype(dtype) for param in inputs.params0], lr=inputs.lr, **(hyper or inputs.hyper))
    steps = []
    for t in range(len(inputs.lr)):
        runner.step([grad[t].astype(dtype) for grad in inputs.grads])
        steps.append(getattr(runner, reads)())
    return stack(steps)


def trained(make: Callable[..., Any], kind: str, data: Training, dtype: str) -> Run:
    """Train with the adapter's defaults, and return the parameters every `STRIDE` steps."""
    runner = make(kind, [param.astype(dtype) for param in data.params0], lr=None)
    steps = []
    for t in range(STEPS):
        runner.train(data.x[t].astype(dtype), data.y[t])
        if (t + 1) % STRIDE == 0:
            steps.append([{"param": each["param"]} for each in runner.read()])
    return stack(steps)


def run(make: Callable[..., Any], experiment: Experiment, dtype: str, data: Training | None) -> Run:
    """Run one cell of the matrix; only a training uses `data`."""
    if experiment.case is None:
        return trained(make, experiment.kind, data, dtype)
    return fed(make, experiment, dtype)


def cells(name: str) -> list[tuple[str, str]]:
    """Return what a runner runs, as (experiment, dtype)."""
    every = [(experiment, dtype) for experiment in EXPERIMENTS for dtype in DTYPES]
    chosen = RUNNERS[name].cells
    return every if chosen is None else [cell for cell in every if cell in chosen]


def is_reference(name: str, experiment: str, dtype: str) -> bool:
    """Return whether this run is the reference of an experiment that the authors' code does not cover."""
    return (name, dtype) == ("numpy", "float64") and not experiment.startswith("golden")


def missing(requirements: Sequence[str]) -> list[str]:
    """Return the packages of these, with or without a version, that are not installed."""
    return [each for each in requirements if not _is_installed(Requirement(each))]


def _is_installed(package: Requirement) -> bool:
    return find_spec(package.name) is not None and (not package.specifier or version(package.name) in package.specifier)
