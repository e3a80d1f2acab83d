"""The benchmarks: their statistics, what they count, and that they run. No time is asserted."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
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


@pytest.fixture(scope="module")
def module() -> Iterator[Callable[[str], Any]]:
    """Imports a module of the benchmarks, which are no installed package, and leaves the path of imports as it is."""
    spec = importlib.util.spec_from_file_location("benchmarks", ROOT / "benchmarks" / "__init__.py")
    sys.modules["benchmarks"] = importlib.util.module_from_spec(spec)
    yield lambda name: importlib.import_module(f"benchmarks.{name}")
    for name in [name for name in sys.modules if name.partition(".")[0] == "benchmarks"]:
        del sys.modules[name]


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    # The suite chooses the backend itself.
    environment = {**os.environ, "KERAS_BACKEND": "none", "TF_CPP_MIN_LOG_LEVEL": "3", **environment}
    return subprocess.run(
        [sys.executable, "-m", "benchmarks", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


# Statistics


def test_a_paired_ratio_by_hand(module: Callable[[str], Any]) -> None:
    # 2 / 1, 3 / 2 and 8 / 2; one round was sat out.
    ratio = module("timing").paired_ratio([2.0, 3.0, None, 8.0], [1.0, 2.0, 5.0, 2.0])
    assert ratio == (2.0, 1.75, 3.0)


class Machine:
    """A clock, and steps that move it; the machine grows slower with every round."""

    def __init__(self) -> None:
        self.now = 0.0
        self.slowness = 1.0
        self.log: list[tuple[str, int]] = []

    def step(self, name: str, seconds: float) -> Callable[[int], None]:
        def take(count: int) -> None:
            self.log.append((name, count))
            self.now += count * seconds * self.slowness

        return take

    def slow_down(self) -> None:
        self.slowness *= 2
        self.log.append(("round", 0))


def rounds(log: list[tuple[str, int]]) -> list[list[tuple[str, int]]]:
    found: list[list[tuple[str, int]]] = []
    for entry in log:
        if entry[0] == "round":
            found.append([])
        elif found:
            found[-1].append(entry)
    return found


def test_a_machine_that_grows_slower_leaves_the_ratios_alone(module: Callable[[str], Any]) -> None:
    timing, machine = module("timing"), Machine()
    steps = {"base": machine.step("base", 1.0), "slow": machine.step("slow", 3.0)}
    limits = timing.Limits(rounds=8, sample_seconds=0.5, competitor_seconds=1e9)
    samples = timing.interleave(steps, limits, machine.slow_down, lambda: machine.now)
    assert samples["base"] == [2.0**number for number in range(1, 9)]
    assert timing.paired_ratio(samples["slow"], samples["base"]) == (3.0, 3.0, 3.0)
    orders = {tuple(name for name, _ in entries) for entries in rounds(machine.log)}
    assert orders == {("base", "slow"), ("slow", "base")}


def test_short_steps_are_repeated_and_told_as_one(module: Callable[[str], Any]) -> None:
    timing, machine = module("timing"), Machine()
    limits = timing.Limits(rounds=2, sample_seconds=1.0, competitor_seconds=1e9)
    samples = timing.interleave({"short": machine.step("short", 0.25)}, limits, machine.slow_down, lambda: machine.now)
    # One step settles, four are measured.
    assert rounds(machine.log) == [[("short", 1), ("short", 4)]] * 2
    assert samples == {"short": [0.5, 1.0]}


def test_a_slow_competitor_sits_out_after_some_rounds(module: Callable[[str], Any]) -> None:
    timing, machine = module("timing"), Machine()
    steps = {"base": machine.step("base", 1.0), "slow": machine.step("slow", 100.0)}
    limits = timing.Limits(rounds=6, sample_seconds=1.0, competitor_seconds=60.0)
    samples = timing.interleave(steps, limits, lambda: None, lambda: machine.now)
    assert samples == {"base": [1.0] * 6, "slow": [100.0] * 3 + [None] * 3}


# What is counted


def test_shapes(module: Callable[[str], Any]) -> None:
    shapes = module("shapes")
    sizes = {shape.name: (len(shape.tensors), shape.parameters) for word in shapes.NAMED for shape in shapes.parse(word)}
    assert sizes == {"conv": (34, 9_414_090), "many": (300, 300 * 64), "large": (4, 4 * 4096**2)}
    assert [len(shape.tensors) for shape in shapes.parse("tensors")] == [1, 3, 10, 30, 100, 300, 1000, 3000]
    for shape in shapes.parse("parameters"):
        assert len(shape.tensors) == 4
        assert shape.parameters == pytest.approx(int(shape.name.partition("=")[2]), rel=0.02)


@pytest.mark.parametrize("word", ["small", "tensors=", "tensors=0", "tensors=x", "conv=3"])
def test_a_shape_that_is_none(module: Callable[[str], Any], word: str) -> None:
    with pytest.raises(ValueError, match="is no shape; there are conv, many, large"):
        module("shapes").parse(word)


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak memory of a process from Linux's /proc")
def test_the_peak_is_of_memory_that_an_action_takes_and_gives_back(module: Callable[[str], Any]) -> None:
    machine = module("machine")
    if not machine.can_measure_peak():
        pytest.skip("the system does not let the peak start anew")
    # In a process of its own, as it is measured: what other tests have freed may be in this one still.
    script = """
        import numpy as np
        from benchmarks import machine
        np.ones(10_000_000)  # larger than what follows
        print(machine.peak_growth(lambda: np.ones(5_000_000)))
    """
    environment = {**os.environ, **machine.RETURN_MEMORY, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", textwrap.dedent(script)]
    assert int(subprocess.check_output(command, env=environment)) == pytest.approx(40e6, rel=0.05)


def test_moving_memory_adds_every_element_once(module: Callable[[str], Any]) -> None:
    memory = module("machine").Memory(8000)
    # Two arrays of 1000 float32, of which one is read, the other read and written.
    assert memory.moved == 3 * 4000
    for move in (memory._by_one, memory._by_all):
        before = memory._a.copy()
        move()
        np.testing.assert_array_equal(memory._a, before + 1)


def test_a_competitor_that_lacks_something_sits_out(module: Callable[[str], Any]) -> None:
    suite, measure = module("suite"), module("measure")
    competitors = {
        "base": suite.Competitor(make=lambda problem: None),
        "other": suite.Competitor(make=lambda problem: None),
        "lacking": suite.Competitor(make=lambda problem: None, needs=("no_such_package",)),
        "elsewhere": suite.Competitor(make=lambda problem: None, devices=("cuda",)),
    }
    small = suite.Suite("", ("base",), competitors, lambda shape, device: None, (), {}, "")
    assert measure.chosen(small, None, "cpu") == ["base", "other"]
    assert measure.chosen(small, None, "cuda") == ["base", "other", "elsewhere"]
    assert measure.chosen(small, ["lacking", "elsewhere"], "cpu") == ["base"]
    with pytest.raises(ValueError, match="no such competitor: none; there are base, other"):
        measure.chosen(small, ["none"], "cpu")


# Every competitor steps


def moved(problem: Any, read: Callable[[], list[np.ndarray]], competitor: Any) -> bool:
    before = read()
    competitor.make(problem).step(1)
    return all((old != new).any() for old, new in zip(before, read(), strict=True))


def test_torch_competitors_step(module: Callable[[str], Any]) -> None:
    pytest.importorskip("torch")
    loaded, (shape,) = module("suite").load("torch"), module("shapes").parse("tensors=2")
    problem = loaded.problem(shape, "cpu")
    names = [name for name in module("measure").chosen(loaded, None, "cpu") if "compile" not in name]
    assert len(names) >= 8
    for name in names:
        competitor = loaded.competitors[name]
        assert moved(problem, lambda: [param.detach().numpy().copy() for param in problem.params], competitor), name


def test_optax_competitors_step(module: Callable[[str], Any]) -> None:
    pytest.importorskip("jax")
    pytest.importorskip("optax")
    loaded, (shape,) = module("suite").load("optax"), module("shapes").parse("tensors=2")
    problem = loaded.problem(shape, module("optax_suite").jax.default_backend().replace("gpu", "cuda"))
    for name, competitor in loaded.competitors.items():
        assert moved(problem, lambda: [np.array(param) for param in problem.params], competitor), name


@pytest.mark.parametrize("task", ["apply", "train"])
def test_keras_competitors_step(module: Callable[[str], Any], task: str) -> None:
    keras = pytest.importorskip("keras")
    loaded, (shape,) = module("keras_suite").SUITES[task], module("shapes").parse("tensors=3")
    problem = loaded.problem(shape, "cpu")
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
    loaded = module("suite").load("optax")
    problem = loaded.problem(shape, module("optax_suite").jax.default_backend().replace("gpu", "cuda"))
    assert loaded.competitors["optax.adamw"].make(problem).transient_bytes() < 40e6


@pytest.mark.compiler
def test_a_compiled_step_is_measured() -> None:
    pytest.importorskip("torch")
    assert probed("torch", "tensors=1", "VSGD, torch.compile")["first_step_seconds"] > 0


def test_what_is_not_there_is_said_in_a_sentence(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    done = command("run", "torch", "--shapes", "small", "--output", str(tmp_path / "results.json"))
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("python -m benchmarks: error: 'small' is no shape; there are conv")
    assert not list(tmp_path.iterdir())


# The report


def environment(**versions: str) -> dict[str, Any]:
    return {"cpu": "C", "processors": 2, "threads": 2, "gpu": None, "system": "Linux", "versions": versions}


def competitor(seconds: list[float | None], against: list[float], state: float = 8.0) -> dict[str, Any]:
    moves = {"traffic_bytes": int(12 + 2 * state) * 100}
    return {"seconds": seconds, "against": {"base": against}, "state_bytes_per_parameter": state, **moves}


def results(cells: dict[str, Any]) -> dict[str, Any]:
    return {"suite": "torch", "title": "PyTorch", "device": "cpu", "baselines": ["base"], "cells": cells}


def cell(slow: list[float | None], **size: int) -> dict[str, Any]:
    base = [0.001, 0.002, 0.005, 0.002]
    competitors = {"base": competitor(base, base), "slow": competitor(slow, base, 12.0)}
    # 50 GB/s, but for one slow round.
    memory = {"bytes": 100_000_000, "seconds": [0.002, 0.002, 0.008, None]}
    times = {"environment": environment(torch="2"), "memory": memory, "competitors": competitors}
    return {"tensors": 4, "parameters": 100, **size, "times": times}


SLOW = [0.002, 0.003, None, 0.008]


def test_the_tables(module: Callable[[str], Any]) -> None:
    measured = cell(SLOW)
    measured["probes"] = {
        "environment": environment(torch="2"),
        "memory": "as told",
        "competitors": {"slow": {"first_step_seconds": 1.5, "transient_bytes": 64_000_000}},
    }
    told = results({"many": measured, "conv": cell([0.002] * 4)})
    told["imports"] = {"environment": environment(torch="2"), "seconds": {"vsgd.torch": 0.01}}
    text = module("report").tables(told)
    assert text.startswith("`python -m benchmarks run torch`, on 2 processors (C), Linux, 2 threads; torch 2.\n")
    assert "Memory moved 50 GB/s on conv, 50 GB/s on many." in text
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    assert ["time / base", "conv", "many"] in lines
    assert ["base", "1, 2 ms", "1, 2 ms"] in lines
    # Of conv the ratios are 2, 1, 0.4, 1; of many 2, 1.5, 4.
    assert ["slow", "1.00 (0.85 to 1.25), 2 ms", "2.00 (1.75 to 3.00), 3 ms"] in lines
    assert ["", "state, bytes / parameter", "peak of a step, MB: many", "first step, s: many"] in lines
    assert ["slow", "12.0", "64", "1.5"] in lines
    assert "`vsgd.torch` 0.01 s" in text


def test_the_page_keeps_what_stands_about_the_tables(module: Callable[[str], Any], tmp_path: Path) -> None:
    folder, page = tmp_path / "performance", tmp_path / "performance.md"
    folder.mkdir()
    page.write_text("# Performance\n\nBefore.\n\n<!-- torch -->\nold\n<!-- /torch -->\n\nAfter.\n")
    (folder / "torch.json").write_text(json.dumps(results({"many": cell(SLOW)})))
    (folder / "optax.json").write_text(json.dumps(results({"many": cell(SLOW)})))
    for _ in range(2):
        module("report").write(folder, page)
        text = page.read_text()
        assert text.startswith("# Performance\n\nBefore.\n\n<!-- torch -->\n\n### PyTorch\n")
        assert "\n<!-- /torch -->\n\nAfter.\n\n<!-- optax -->\n" in text
        assert "old" not in text
        assert text.count("2.00 (1.75 to 3.00)") == 2


def test_sweeps_are_drawn(module: Callable[[str], Any], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.image import imread

    swept = {f"tensors={number}": cell(SLOW, tensors=number) for number in (10, 1, 3)}
    (tmp_path / "torch.json").write_text(json.dumps(results({**swept, "parameters=100": cell(SLOW)})))
    module("report").write(tmp_path, tmp_path / "page.md")
    # One point is no curve.
    assert [path.name for path in tmp_path.glob("*.png")] == ["torch-tensors.png"]
    assert "](torch-tensors.png)" in (tmp_path / "page.md").read_text()
    assert imread(tmp_path / "torch-tensors.png").std() > 0.05


def test_the_floor_is_traffic_over_bandwidth(module: Callable[[str], Any]) -> None:
    # 36 bytes of each of 100 parameters, at 50 GB/s.
    assert module("plots").floor(cell(SLOW)["times"], "slow") == pytest.approx(3600 / 5e10)


def test_results_of_another_machine_are_not_mixed(module: Callable[[str], Any]) -> None:
    merge = module("measure").merge
    old = {"environment": environment(torch="2"), "competitors": {"a": 1, "b": 1}}
    same = {"environment": environment(torch="2"), "competitors": {"b": 2, "c": 2}}
    other = {"environment": environment(torch="3"), "competitors": {"b": 2, "c": 2}}
    assert merge(None, same) == same
    assert merge(old, same)["competitors"] == {"a": 1, "b": 2, "c": 2}
    assert merge(old, other) == other


def test_the_accuracy_of_compact_state_is_told(tmp_path: Path) -> None:
    for package in ("torch", "sklearn", "matplotlib", "tqdm"):
        pytest.importorskip(package)
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- compact -->\nold\n<!-- /compact -->\nafter\n")
    command = [sys.executable, "-m", "benchmarks.compact", "--seeds", "2", "--epochs", "1", "--page", str(page)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=300)
    text = page.read_text(encoding="utf-8")
    assert text.startswith("before")
    assert text.endswith("after\n")
    assert "old" not in text
    assert (tmp_path / "page" / "compact-state.png").exists()
    rows = [line for line in text.splitlines() if line.startswith("|")][2:]
    assert len(rows) == 3
    means = [[float(cell.split("±")[0]) for cell in row.split("|")[2:-1]] for row in rows]
    for wide, compact, difference in zip(*means, strict=True):
        assert compact - wide == pytest.approx(difference, abs=0.06 * wide)  # of two digits each
