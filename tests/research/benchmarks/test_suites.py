"""Test that every competitor of the benchmarks' suites steps, and that the suites' commands run. No time is asserted."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from research.scripts import run

from benchmarks import catalogue, machine, measure, shapes

# The numbers of state that each competitor stores per parameter.
STATE = {
    "torch": {
        **dict.fromkeys(("AdamW(fused=True)", "AdamW()", "AdamW(foreach=True)"), 2),
        **{"SGD(momentum=0.9)": 1, "VSGD(foreach=True)": 3, "VSGD, loop": 3},
        **{"ConstantVSGD(foreach=True)": 2, "ConstantVSGD, loop": 2},
    },
    "optax": {
        **{"optax.adamw": 2, "optax.adabelief": 2, "optax.lion": 1, "optax.sgd(momentum=0.9)": 1},
        **{"vsgd": 3, "vsgd, bfloat16 state": 1.5, "constant_vsgd": 2},
    },
}
KERAS = {"keras AdamW": 2, "keras Lion": 1, "keras SGD(momentum=0.9)": 1}
KERAS |= {"VSGD": 3, "VSGD, bfloat16 state": 1.5, "ConstantVSGD": 2}
STATE |= {f"keras-{task}-{backend}": KERAS for task in ("apply", "train") for backend in ("tensorflow", "jax", "torch")}


def command(*arguments: str, **environment: str) -> str:
    # The suite chooses the backend itself.
    return run("-m", "benchmarks", *arguments, KERAS_BACKEND="none", TF_CPP_MIN_LOG_LEVEL="3", **environment)


def read(name: str, problem: Any) -> list[np.ndarray]:
    """Return copies of the parameters of a suite's problem."""
    if name == "torch":
        return [param.detach().numpy().copy() for param in problem.params]
    if name == "optax":
        return [np.array(param) for param in problem.params]
    import keras

    apply = name == "keras-apply"
    variables = problem.variables if apply else keras.Model(problem.inputs, problem.outputs).trainable_variables
    return [np.array(keras.ops.convert_to_numpy(variable)) for variable in variables]


@pytest.mark.parametrize("name", ["torch", "optax", "keras-apply", "keras-train"])
def test_every_competitor_moves_every_parameter(name: str) -> None:
    framework, _, task = name.partition("-")
    pytest.importorskip(framework)
    found = importlib.import_module(f"benchmarks.{framework}_suite")
    loaded = found.SUITES[task] if task else catalogue.load_suite(name)
    device = found.jax.default_backend().replace("gpu", "cuda") if name == "optax" else "cpu"
    (shape,) = shapes.parse("tensors=3")
    problem = loaded.make_problem(shape, device)
    assert [each.shape for each in read(name, problem)] == list(shape.tensors)
    names = [each for each in measure.choose_competitors(loaded, None, device) if "compile" not in each]
    assert len(names) >= 6
    for each in names:
        before = read(name, problem)
        loaded.competitors[each].make(problem).step(1)
        assert all((old != new).any() for old, new in zip(before, read(name, problem), strict=True)), each


def test_a_network_of_the_convolutions_has_their_tensors() -> None:
    pytest.importorskip("keras")
    (shape,) = shapes.parse("conv")
    problem = importlib.import_module("benchmarks.keras_suite").TrainProblem(shape, "cpu")
    assert [each.shape for each in read("keras-train", problem)] == list(shape.tensors)


# The command line


@pytest.mark.parametrize("suite", STATE)
def test_a_run_of_a_suite(suite: str, tmp_path: Path) -> None:
    packages = suite.split("-")[::2]  # the second of three words is a task
    for package in packages:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"no {package}")
    output = tmp_path / "results.json"
    options = ("--rounds", "1", "--parts", "times", "--output", str(output), "--competitors", *STATE[suite])
    printed = command("run", suite, "--shapes", "tensors=2", *options)
    results = json.loads(output.read_text())
    assert results["suite"] == suite
    assert results["device"] == "cpu"
    (cell,) = results["cells"].values()
    assert (cell["tensors"], cell["parameters"]) == (2, 128)
    times = cell["times"]
    assert times["memory"]["bytes"] == 3 * 4 * 5 * 128 / 2
    assert times["memory"]["seconds"][0] > 0
    assert set(packages) <= {name.removesuffix("-cpu") for name in times["environment"]["versions"]}
    assert set(times["competitors"]) == set(STATE[suite])
    for name, found in times["competitors"].items():
        # A step reads parameter, gradient and state, and writes parameter and state.
        state = 4 * STATE[suite][name]
        assert found["traffic_bytes"] == (12 + 2 * state) * 128, name
        # The state includes a count of steps.
        assert state <= found["state_bytes_per_parameter"] < state + 0.1, name
        assert set(found["against"]) == set(results["baselines"])
        assert len(found["seconds"]) == 1
        assert found["seconds"][0] > 0
        assert f"\n| {name} " in printed


def test_probes_and_imports_join_times(tmp_path: Path) -> None:
    pytest.importorskip("optax")
    output, shape = tmp_path / "results.json", "parameters=40000"
    options = ("--shapes", shape, "--rounds", "1", "--output", str(output), "--competitors", "vsgd")
    for parts in (["times"], ["probes", "imports"]):
        printed = command("run", "optax", *options, "--parts", *parts)
    results = json.loads(output.read_text())
    cell = results["cells"][shape]
    assert set(cell["times"]["competitors"]) == set(cell["probes"]["competitors"]) == {"optax.adamw", "vsgd"}
    assert all(found["first_step_seconds"] > 0 for found in cell["probes"]["competitors"].values())
    # XLA needs no copy of the parameters for Adam's step.
    assert 0 <= cell["probes"]["competitors"]["optax.adamw"]["transient_bytes"] < 4 * 40_000
    assert results["imports"]["seconds"]["vsgd.optax"] > 0
    for text in ("time / optax.adamw", f"first step, s: {shape}", "`vsgd.optax`"):
        assert text in printed


def probed(*arguments: str, **environment: str) -> dict[str, float]:
    return json.loads(command("probe", *arguments, **environment).splitlines()[-1])


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak memory of a process from Linux's /proc")
def test_temporaries_of_the_parameters_size_show() -> None:
    pytest.importorskip("torch")
    if not machine.can_measure_peak():
        pytest.skip("the system does not let the peak start anew")
    # Torch's lists of tensors copy 16 MB of parameters; its fused kernel copies none.
    lists, fused = (
        probed("torch", "parameters=4000000", f"AdamW({mode}=True)", **machine.RETURN_MEMORY)["transient_bytes"]
        for mode in ("foreach", "fused")
    )
    assert lists >= 12e6
    assert fused < 4e6


@pytest.mark.compiler
def test_a_compiled_step_is_measured() -> None:
    pytest.importorskip("torch")
    assert probed("torch", "tensors=1", "VSGD, torch.compile")["first_step_seconds"] > 0
