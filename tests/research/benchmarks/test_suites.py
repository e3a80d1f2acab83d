"""The benchmarks' suites: every competitor steps, and their commands run. No time is asserted."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).parents[3]
# What each suite needs, the bytes that a step must move for each float32 parameter, and the state's, by competitor.
SUITES = {
    "torch": (
        ("torch",),
        {
            "AdamW(fused=True)": (28, 8),
            "AdamW()": (28, 8),
            "AdamW(foreach=True)": (28, 8),
            "SGD(momentum=0.9)": (20, 4),
            "VSGD(foreach=True)": (36, 12),
            "VSGD, loop": (36, 12),
            "ConstantVSGD(foreach=True)": (28, 8),
            "ConstantVSGD, loop": (28, 8),
        },
    ),
    "optax": (
        ("jax", "optax"),
        {
            "optax.adamw": (28, 8),
            "optax.adabelief": (28, 8),
            "optax.lion": (20, 4),
            "optax.sgd(momentum=0.9)": (20, 4),
            "vsgd": (36, 12),
            "vsgd, bfloat16 state": (24, 6),
            "constant_vsgd": (28, 8),
        },
    ),
    **{
        f"keras-{task}-{backend}": (
            ("keras", backend),
            {
                "keras AdamW": (28, 8),
                "keras Lion": (20, 4),
                "keras SGD(momentum=0.9)": (20, 4),
                "VSGD": (36, 12),
                "VSGD, bfloat16 state": (24, 6),
                "ConstantVSGD": (28, 8),
            },
        )
        for task in ("apply", "train")
        for backend in ("tensorflow", "jax", "torch")
    },
}


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    # The suite chooses the backend itself.
    environment = {**os.environ, "KERAS_BACKEND": "none", "TF_CPP_MIN_LOG_LEVEL": "3", **environment}
    return subprocess.run(
        [sys.executable, "-m", "benchmarks", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


def moved(problem: Any, read: Callable[[], list[np.ndarray]], competitor: Any) -> bool:
    before = read()
    competitor.make(problem).step(1)
    return all((old != new).any() for old, new in zip(before, read(), strict=True))


def test_torch_competitors_step(module: Callable[[str], Any]) -> None:
    pytest.importorskip("torch")
    loaded, (shape,) = module("catalogue").load_suite("torch"), module("shapes").parse("tensors=2")
    problem = loaded.make_problem(shape, "cpu")
    names = [name for name in module("measure").choose_competitors(loaded, None, "cpu") if "compile" not in name]
    assert len(names) >= 8
    for name in names:
        competitor = loaded.competitors[name]
        assert moved(problem, lambda: [param.detach().numpy().copy() for param in problem.params], competitor), name


def test_optax_competitors_step(module: Callable[[str], Any]) -> None:
    pytest.importorskip("jax")
    pytest.importorskip("optax")
    loaded, (shape,) = module("catalogue").load_suite("optax"), module("shapes").parse("tensors=2")
    problem = loaded.make_problem(shape, module("optax_suite").jax.default_backend().replace("gpu", "cuda"))
    for name, competitor in loaded.competitors.items():
        assert moved(problem, lambda: [np.array(param) for param in problem.params], competitor), name


@pytest.mark.parametrize("task", ["apply", "train"])
def test_keras_competitors_step(module: Callable[[str], Any], task: str) -> None:
    keras = pytest.importorskip("keras")
    loaded, (shape,) = module("keras_suite").SUITES[task], module("shapes").parse("tensors=3")
    problem = loaded.make_problem(shape, "cpu")
    variables = problem.variables if task == "apply" else keras.Model(problem.inputs, problem.outputs).trainable_variables
    assert [tuple(variable.shape) for variable in variables] == list(shape.tensors)
    for name, competitor in loaded.competitors.items():
        assert moved(problem, lambda: [np.array(keras.ops.convert_to_numpy(each)) for each in variables], competitor), name


def test_a_network_of_the_convolutions_has_their_tensors(module: Callable[[str], Any]) -> None:
    keras = pytest.importorskip("keras")
    (shape,) = module("shapes").parse("conv")
    problem = module("keras_suite").TrainProblem(shape, "cpu")
    model = keras.Model(problem.inputs, problem.outputs)
    assert [tuple(variable.shape) for variable in model.trainable_variables] == list(shape.tensors)


# The command line


@pytest.mark.parametrize("suite", SUITES)
def test_a_run_of_a_suite(suite: str, tmp_path: Path) -> None:
    needs, floors = SUITES[suite]
    for package in needs:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"no {package}")
    output = tmp_path / "results.json"
    options = ("--rounds", "1", "--parts", "times", "--output", str(output), "--competitors", *floors)
    done = command("run", suite, "--shapes", "tensors=2", *options)
    assert done.returncode == 0, done.stderr
    results = json.loads(output.read_text())
    assert results["suite"] == suite
    assert results["device"] == "cpu"
    (cell,) = results["cells"].values()
    assert (cell["tensors"], cell["parameters"]) == (2, 128)
    times = cell["times"]
    assert times["memory"]["bytes"] == 3 * 4 * 5 * 128 / 2
    assert times["memory"]["seconds"][0] > 0
    assert times["environment"]["processors"] >= 1
    assert set(needs) <= {name.removesuffix("-cpu") for name in times["environment"]["versions"]}
    assert set(times["competitors"]) == set(floors)
    for name, (moves, state) in floors.items():
        found = times["competitors"][name]
        assert found["traffic_bytes"] == moves * 128, name
        # And a count of steps.
        assert state <= found["state_bytes_per_parameter"] < state + 0.1, name
        assert set(found["against"]) == set(results["baselines"])
        assert len(found["seconds"]) == 1
        assert found["seconds"][0] > 0
        assert f"\n| {name} " in done.stdout


def test_probes_and_imports_beside_times(tmp_path: Path) -> None:
    pytest.importorskip("optax")
    output = tmp_path / "results.json"
    options = ("--shapes", "tensors=2", "--rounds", "1", "--output", str(output), "--competitors", "vsgd")
    for parts in (["times"], ["probes", "imports"]):
        done = command("run", "optax", *options, "--parts", *parts)
        assert done.returncode == 0, done.stderr
    results = json.loads(output.read_text())
    cell = results["cells"]["tensors=2"]
    assert set(cell["times"]["competitors"]) == set(cell["probes"]["competitors"]) == {"optax.adamw", "vsgd"}
    for found in cell["probes"]["competitors"].values():
        assert found["first_step_seconds"] > 0
        assert 0 <= found["transient_bytes"] < 1e6
    assert results["imports"]["seconds"]["vsgd.optax"] > 0
    for text in ("time / optax.adamw", "first step, s: tensors=2", "`vsgd.optax`"):
        assert text in done.stdout


def probed(*arguments: str, **environment: str) -> dict[str, float]:
    done = command("probe", *arguments, **environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak memory of a process from Linux's /proc")
def test_temporaries_of_the_parameters_size_show(module: Callable[[str], Any]) -> None:
    pytest.importorskip("torch")
    machine = module("machine")
    if not machine.can_measure_peak():
        pytest.skip("the system does not let the peak start anew")
    # Torch's lists of tensors make a copy of 16 MB of parameters, its fused kernel none.
    lists, fused = (
        probed("torch", "parameters=4000000", f"AdamW({mode}=True)", **machine.RETURN_MEMORY)["transient_bytes"]
        for mode in ("foreach", "fused")
    )
    assert lists >= 12e6
    assert fused < 4e6


def test_jax_tells_the_memory_of_a_step(module: Callable[[str], Any]) -> None:
    pytest.importorskip("optax")
    (shape,) = module("shapes").parse("parameters=40000")
    loaded = module("catalogue").load_suite("optax")
    problem = loaded.make_problem(shape, module("optax_suite").jax.default_backend().replace("gpu", "cuda"))
    assert loaded.competitors["optax.adamw"].make(problem).measure_transient_bytes() < 4 * shape.parameters


@pytest.mark.compiler
def test_a_compiled_step_is_measured() -> None:
    pytest.importorskip("torch")
    assert probed("torch", "tensors=1", "VSGD, torch.compile")["first_step_seconds"] > 0


def test_what_is_not_there_is_said_in_a_sentence(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    done = command("run", "torch", "--shapes", "small", "--output", str(tmp_path / "results.json"))
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("python -m benchmarks: error: shape is 'small', but must be one of conv")
    assert not list(tmp_path.iterdir())
