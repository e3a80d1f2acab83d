"""Test that the core has no framework, no literals and one function for every namespace, and what each module imports."""

from __future__ import annotations

import ast
import inspect
import os
import subprocess
import sys
import textwrap
from typing import Any

import numpy as np
import pytest
from drivers.rules import RULES

from vsgd import core
from vsgd.validation import validate_numbers


def run(script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", textwrap.dedent(script)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **environment})


FRAMEWORKS = {"torch", "jax", "tensorflow", "keras", "numba", "mlx", "matplotlib"}


@pytest.mark.parametrize(
    ("modules", "own"),
    [
        ("vsgd, vsgd.core", None),
        ("vsgd.numpy", "numpy"),
        ("vsgd.monitor, vsgd.monitor.plots, vsgd.monitor.report", "numpy"),
        ("vsgd.torch", "torch"),
        ("vsgd.mlx", "mlx"),
    ],
)
def test_each_module_imports_its_own_framework_only(modules: str, own: str | None) -> None:
    if own is not None:
        pytest.importorskip(own)
    done = run(f"import sys, {modules}; print(*sys.modules)")
    assert done.returncode == 0, done.stderr
    # Torch itself imports NumPy.
    unwanted = FRAMEWORKS | ({"numpy"} if own in (None, "mlx") else set()) | (set() if own == "numpy" else {"vsgd.numpy"})
    assert not set(done.stdout.split()) & (unwanted - {own})


@pytest.mark.parametrize(("name", "framework"), [("torch", "PyTorch"), ("mlx", "MLX")])
def test_without_its_framework_an_adapter_names_the_extra(name: str, framework: str) -> None:
    done = run(f"import sys; sys.modules['{name}'] = None; import vsgd.{name}")
    assert f"ImportError: vsgd.{name} needs {framework}: run pip install '.[{name}]' in a clone of vsgd" in done.stderr


@pytest.mark.parametrize("name", ["VSGD", "ConstantVSGD"])
def test_the_package_itself_names_the_adapters(name: str) -> None:
    import vsgd

    with pytest.raises(AttributeError, match=f"vsgd has no {name} of its own: import it from vsgd.torch, vsgd.keras, "):
        getattr(vsgd, name)
    assert not hasattr(vsgd, "something_else")


TRAIN = """
import torch
from vsgd.torch import VSGD
param = torch.nn.Parameter(torch.ones(3))
param.grad = torch.ones(3)
VSGD([param]).step()
VSGD([param]).step()
print(bool((param < 1).all()))
optimizer = VSGD([param], fused=True)
try:
    optimizer.step()
except ImportError as error:
    print(error, len(optimizer.state), sep="; ")
"""
WITHOUT_NUMBA = """
import importlib.util, sys
sys.modules["numba"] = None
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name: None if name == "numba" else find_spec(name)
"""


def test_without_numba_fused_names_the_extra_and_the_default_falls_back() -> None:
    pytest.importorskip("torch")
    done = run(WITHOUT_NUMBA + TRAIN)
    assert done.stdout.split() == ["True"]
    sentence = "VSGD's fused step on cpu needs numba 0.61 or newer, but found none: run pip install 'numba>=0.61'"
    assert done.stderr.count(f"UserWarning: VSGD takes slow steps, because {sentence}") == 1
    assert f"ImportError: {sentence}" in done.stderr


def test_a_numba_that_cannot_compile_is_left_aside_unless_asked_for() -> None:
    pytest.importorskip("numba")
    pytest.importorskip("torch")
    done = run(TRAIN, NUMBA_DISABLE_JIT="1")
    cause = "vsgd's fused kernel needs numba's compiler, which NUMBA_DISABLE_JIT turns off"
    assert done.stdout.splitlines() == ["True", f"the engine of fused=True cannot be imported: {cause}; 0"]


@pytest.mark.parametrize("rule", RULES)
def test_the_update_holds_no_numeric_literal(rule: str) -> None:
    # A literal would widen float32 in numba and weaken dtypes in jax.
    for function in (RULES[rule].make_update, core.descend):
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
        assert not [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and not isinstance(node.value, str)]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lr": -0.1}, "Invalid learning rate: -0.1 (lr must be a finite number >= 0)"),
        ({"lr": 10**400}, f"Invalid learning rate: 1{'0' * 96}... (lr must be a finite number >= 0)"),
        ({"eps": float("nan")}, "Invalid epsilon value: nan (eps must be a finite number >= 0)"),
        ({"weight_decay": "0"}, "Invalid weight_decay value: '0' (weight_decay must be a finite number >= 0)"),
        ({"variance_ratio": 0}, "Invalid variance_ratio value: 0 (variance_ratio must be a number in [1e-15, 1e15])"),
        (
            {"prior_strength": 0.0},
            "Invalid prior_strength value: 0.0 (prior_strength must be 'auto' or a finite number >= 1e-30)",
        ),
        (
            {"prior_strength": ""},
            "Invalid prior_strength value: '' (prior_strength must be 'auto' or a finite number >= 1e-30)",
        ),
        ({"kappa": 0.5}, "Invalid kappa value: 0.5 (kappa must be a number in (0.5, 1])"),
        ({"prior_shape": -1.0}, "Invalid prior_shape value: -1.0 (prior_shape must be None or a finite number >= 0)"),
        ({"forgetting_floor": 1}, "Invalid forgetting_floor value: 1 (forgetting_floor must be a number in [0, 1))"),
        ({"kappa1": 1.5}, "Invalid kappa1 value: 1.5 (kappa1 must be a number in (0.5, 1])"),
    ],
)
def test_a_bad_hyperparameter_is_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        validate_numbers(**values)
    assert str(error.value) == message


def test_good_numbers_and_values_not_yet_known_pass() -> None:
    validate_numbers(
        lr=0, eps=0.0, weight_decay=0, variance_ratio=1, prior_strength="auto", kappa=1, kappa1=0.51, kappa2=np.float32(1)
    )
    validate_numbers(np.ndarray, lr=np.array(-1.0), prior_strength=np.array(0.0))
