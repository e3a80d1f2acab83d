"""Test that every runner, on every device and in both precisions, agrees with the authors' code or with NumPy in float64."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import pytest
from drivers.rules import RULES
from drivers.trajectories import deviation, golden
from matrix import worker
from matrix.experiments import (
    DATA_NEEDS,
    DTYPES,
    EXPERIMENTS,
    RUNNERS,
    TOLERANCE,
    Experiment,
    Run,
    cells,
    is_reference,
    missing,
    run,
    trained,
    training,
)
from matrix.numpy_runners import RUNNERS as NUMPY

from vsgd.posterior import Posterior

CELLS = [
    pytest.param(
        name,
        device,
        dtype,
        experiment,
        marks=[pytest.mark.compiler] if "compiled" in name else [],
        id=f"{name}-{device}-{dtype}-{experiment}",
    )
    for name in RUNNERS
    for device in RUNNERS[name].devices
    for experiment, dtype in cells(name)
    if not is_reference(name, experiment, dtype)
]


@functools.cache
def reference(experiment: str) -> Run:
    """Return the reference of an experiment's runs, in float64 on the CPU."""
    chosen = EXPERIMENTS[experiment]
    if chosen.case is not None and chosen.hyper is None:
        return golden(chosen.case).after
    return run(NUMPY["numpy"], chosen, "float64", training() if chosen.case is None else None)


def compared(experiment: Experiment) -> set[str]:
    """Return the names of each parameter's arrays."""
    if experiment.reads == "posterior":
        return set(Posterior._fields)
    return {"param"} if experiment.case is None else {"param", *RULES[experiment.kind].state_names}


@pytest.mark.parametrize(("name", "device", "dtype", "experiment"), CELLS)
def test_agrees(
    name: str,
    device: str,
    dtype: str,
    experiment: str,
    outcome: Callable[[str], worker.Outcome],
    agreement: dict[worker.Cell, float],
) -> None:
    spec, chosen = RUNNERS[name], EXPERIMENTS[experiment]
    needs = [*spec.needs, *(DATA_NEEDS if chosen.case is None else ())]
    if missing(needs):
        pytest.skip(f"{' and '.join(missing(needs))} not installed")
    runs, _, gpu, _ = outcome(spec.worker)
    if device == "gpu" and gpu is None:
        pytest.skip("no GPU")
    ours = runs[name, device, experiment, dtype]
    assert not isinstance(ours, str), ours
    for arrays in ours:
        assert arrays.keys() == compared(chosen)
        assert {array.dtype.name for array in arrays.values()} == {dtype}
    kind, axis = ("training", None) if chosen.case is None else ("fed", 0)
    worst = deviation(ours, reference(experiment), axis)
    agreement[name, device, experiment, dtype] = worst.error
    assert worst.error <= TOLERANCE[kind][dtype], f"{worst.name} strays by {worst.error:.1e} at step {worst.step}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("experiment", ["training", "constant-training"])
def test_the_bound_is_ten_roundings(experiment: str, dtype: str) -> None:
    pytest.importorskip("sklearn")
    kind, data = EXPERIMENTS[experiment].kind, training()
    exact = np.dtype(dtype).type
    drifts = []
    for seed in range(3):
        rng = np.random.default_rng(seed)
        ends = [np.where(rng.random(param.shape) < 0.5, exact(-np.inf), exact(np.inf)) for param in data.params0]
        moved = [np.nextafter(param.astype(dtype), end) for param, end in zip(data.params0, ends, strict=True)]
        one, other = (trained(NUMPY["numpy"], kind, data._replace(params0=params), dtype) for params in (data.params0, moved))
        drifts.append(deviation(one, other, axis=None).error)
    bound = TOLERANCE["training"][dtype]
    assert max(drifts) < bound / 5
    if dtype == "float32":
        assert min(drifts) > bound / 50


def test_the_training_learns() -> None:
    pytest.importorskip("sklearn")
    data = training()
    for experiment in ("training", "constant-training"):
        kernel1, bias1, kernel2, bias2 = (arrays["param"][-1] for arrays in reference(experiment))
        logits = np.tanh(data.x[-1] @ kernel1 + bias1) @ kernel2 + bias2
        assert (logits.argmax(axis=1) == data.y[-1]).mean() > 0.9
