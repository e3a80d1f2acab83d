"""The core: no framework, no literal, one function for every namespace; and what imports what."""

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


def modules_after(statement: str) -> set[str]:
    command = [sys.executable, "-c", f"import sys\n{statement}\nprint(*sys.modules)"]
    return set(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())


def test_importing_the_package_or_its_core_imports_no_framework() -> None:
    assert not modules_after("import vsgd, vsgd.core") & {
        "numpy",
        "torch",
        "jax",
        "tensorflow",
        "keras",
        "numba",
        "mlx",
    }


def test_each_adapter_imports_its_own_framework_only() -> None:
    assert not modules_after("import vsgd.numpy") & {"torch", "jax", "tensorflow", "keras", "numba", "mlx"}
    assert not modules_after("import vsgd.monitor, vsgd.monitor.plots") & {"torch", "jax", "tensorflow", "keras", "matplotlib"}
    pytest.importorskip("torch")
    assert not modules_after("import vsgd.torch") & {"jax", "tensorflow", "keras", "numba", "mlx", "vsgd.numpy"}


def test_the_mlx_adapter_imports_mlx_only() -> None:
    pytest.importorskip("mlx.core")
    assert not modules_after("import vsgd.mlx") & {"numpy", "torch", "jax", "tensorflow", "keras", "numba", "vsgd.numpy"}


@pytest.mark.parametrize(("name", "framework"), [("torch", "PyTorch"), ("mlx", "MLX")])
def test_without_its_framework_an_adapter_names_the_extra(name: str, framework: str) -> None:
    script = f"import sys; sys.modules['{name}'] = None; import vsgd.{name}"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert f"ImportError: vsgd.{name} needs {framework}: run pip install '.[{name}]' in a clone of vsgd" in done.stderr


def test_without_numba_fused_names_the_extra_and_the_default_falls_back() -> None:
    pytest.importorskip("torch")
    script = """
        import sys
        sys.modules["numba"] = None
        import importlib.util
        find_spec = importlib.util.find_spec
        importlib.util.find_spec = lambda name: None if name == "numba" else find_spec(name)
        import torch
        from vsgd.torch import VSGD
        param = torch.nn.Parameter(torch.ones(3))
        param.grad = torch.ones(3)
        VSGD([param]).step()
        VSGD([param]).step()
        print(bool((param < 1).all()))
        VSGD([param], fused=True)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["True"]
    sentence = "VSGD's fused step on cpu needs numba 0.61 or newer, but found none: run pip install 'numba>=0.61'"
    assert done.stderr.count(f"UserWarning: VSGD takes slow steps, because {sentence}") == 1
    assert f"ImportError: {sentence}" in done.stderr


def test_a_numba_that_cannot_compile_is_left_aside_unless_asked_for() -> None:
    pytest.importorskip("numba")
    pytest.importorskip("torch")
    script = """
        import torch
        from vsgd.torch import VSGD
        param = torch.nn.Parameter(torch.ones(3))
        param.grad = torch.ones(3)
        VSGD([param]).step()
        print(bool((param < 1).all()))
        optimizer = VSGD([param], fused=True)
        try:
            optimizer.step()
        except ImportError as error:
            print(error, len(optimizer.state), sep="; ")
    """
    environment = {**os.environ, "NUMBA_DISABLE_JIT": "1"}
    command = [sys.executable, "-c", textwrap.dedent(script)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    cause = "vsgd's fused kernel needs numba's compiler, which NUMBA_DISABLE_JIT turns off"
    assert done.stdout.splitlines() == ["True", f"the engine of fused=True cannot be imported: {cause}; 0"]


@pytest.mark.parametrize("rule", RULES)
def test_the_update_holds_no_numeric_literal(rule: str) -> None:
    # A literal would widen float32 in numba and weaken dtypes in jax.
    for function in (RULES[rule].make_update, core.descend):
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
        assert not [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and not isinstance(node.value, str)]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_every_namespace_runs_the_same_update(rule: str, dtype: type) -> None:
    torch = pytest.importorskip("torch")
    from vsgd.backends.torch import foreach

    the_rule = RULES[rule]
    hyper = the_rule.hyperparameters()
    rng = np.random.default_rng(0)
    wrappers: dict[str, tuple[Any, Any, Any]] = {
        "numpy": (np, np.asarray, np.asarray),
        "torch": (torch, torch.from_numpy, lambda tensor: tensor.numpy()),
        "torch lists": (
            foreach.TensorListOps(),
            lambda array: foreach.TensorList([torch.from_numpy(array)]),
            lambda tensors: tensors[0].numpy(),
        ),
    }
    updates = {name: the_rule.make_update(xp) for name, (xp, _, _) in wrappers.items()}
    states = {
        name: tuple(wrap(np.full(7, value, dtype)) for value in the_rule.initial_state(hyper))
        for name, (_, wrap, _) in wrappers.items()
    }
    for t in range(1, 6):
        grad = rng.standard_normal(7).astype(dtype)
        c = the_rule.coefficients(t, hyper)
        seen = {}
        for name, (_, wrap, unwrap) in wrappers.items():
            direction, states[name] = updates[name](wrap(grad), states[name], c)
            seen[name] = [unwrap(array) for array in (direction, *states[name])]
            assert all(array.dtype == dtype for array in seen[name])
        for name in wrappers:
            np.testing.assert_array_equal(seen[name][1:], seen["numpy"][1:])
            # Torch has its roots from MKL, which do not always round to the nearest.
            np.testing.assert_array_max_ulp(seen[name][0], seen["numpy"][0], maxulp=2)


@pytest.mark.parametrize("rule", RULES)
def test_the_first_step_keeps_nothing_of_the_initial_rates(rule: str) -> None:
    coefficients = RULES[rule].coefficients(1, RULES[rule].hyperparameters())
    assert {value for name, value in coefficients._asdict().items() if name.startswith("keep")} == {0.0}


@pytest.mark.parametrize("prior_strength", [1e-12, 1e-8, 1e-2])
def test_the_initial_state_is_the_authors_first_division(prior_strength: float) -> None:
    # They divide 2 b by 2a - 1 at the first step; we start so that b / a is the same.
    hyper = core.Hyperparameters(prior_strength=prior_strength)
    _, b_g, b_ghat = core.VSGD.initial_state(hyper)
    pa2, pbg2, pbhg2 = 2 * prior_strength + 1 + 1e-4, 2 * prior_strength, 2 * 30 * prior_strength
    assert b_g / core.compute_shape(hyper) == pytest.approx(pbg2 / (pa2 - 1), rel=1e-11)
    assert b_ghat / core.compute_shape(hyper) == pytest.approx(pbhg2 / (pa2 - 1), rel=1e-11)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lr": -0.1}, "Invalid learning rate: -0.1 (lr must be a finite number >= 0)"),
        ({"lr": float("inf")}, "Invalid learning rate: inf (lr must be a finite number >= 0)"),
        ({"lr": 10**400}, f"Invalid learning rate: 1{'0' * 96}... (lr must be a finite number >= 0)"),
        ({"eps": float("nan")}, "Invalid epsilon value: nan (eps must be a finite number >= 0)"),
        ({"weight_decay": "0"}, "Invalid weight_decay value: '0' (weight_decay must be a finite number >= 0)"),
        ({"variance_ratio": 0}, "Invalid variance_ratio value: 0 (variance_ratio must be a number in [1e-15, 1e15])"),
        ({"prior_strength": 0.0}, "Invalid prior_strength value: 0.0 (prior_strength must be a finite number >= 1e-30)"),
        ({"kappa": 0.5}, "Invalid kappa value: 0.5 (kappa must be a number in (0.5, 1])"),
        ({"kappa1": 1.5}, "Invalid kappa1 value: 1.5 (kappa1 must be a number in (0.5, 1])"),
        ({"kappa2": None}, "Invalid kappa2 value: None (kappa2 must be a number in (0.5, 1])"),
    ],
)
def test_a_bad_hyperparameter_is_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        validate_numbers(**values)
    assert str(error.value) == message


def test_good_numbers_and_values_not_yet_known_pass() -> None:
    validate_numbers(
        lr=0, eps=0.0, weight_decay=0, variance_ratio=1, prior_strength=1e-30, kappa=1, kappa1=0.51, kappa2=np.float32(1)
    )
    validate_numbers(np.ndarray, lr=np.array(-1.0), prior_strength=np.array(0.0))
