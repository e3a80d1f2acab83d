"""Test what the optax transformations promise beyond the contract: weight decay, dtypes, errors, and optax' own tests."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from drivers.precision import x64
from drivers.processes import TESTS

jax = pytest.importorskip("jax")
optax = pytest.importorskip("optax")

import jax.numpy as jnp  # noqa: E402
from adapters.optax.optax_problems import (  # noqa: E402
    assert_same,
    directions,
    gradients,
    solvers,
    storages,
    train,
    transformations,
)

from vsgd import core  # noqa: E402
from vsgd.optax import scale_by_vsgd, vsgd  # noqa: E402
from vsgd.optax.state import get_arrays  # noqa: E402


@pytest.mark.parametrize("mask", [{"w": True, "b": False}, lambda params: {"w": True, "b": False}], ids=["tree", "callable"])
@storages
@solvers
def test_mask_tells_what_decays(make: Callable[..., Any], dtype: Any, options: dict[str, Any], mask: Any) -> None:
    params = {"w": jnp.ones(30, dtype), "b": jnp.ones(20, dtype)}
    grads = [{"w": w, "b": b} for w, b in zip(gradients(4, 30), gradients(4, 20), strict=True)]
    masked, _ = train(make(0.1, weight_decay=0.5, mask=mask, **options), params, grads)
    assert_same(masked["w"], train(make(0.1, weight_decay=0.5, **options), params, grads)[0]["w"])
    assert_same(masked["b"], train(make(0.1, **options), params, grads)[0]["b"])


def test_weight_decay_may_be_a_schedule() -> None:
    grads = gradients(6, 3)
    scheduled, _ = train(vsgd(0.1, weight_decay=optax.constant_schedule(0.5)), jnp.ones(3), grads)
    assert_same(scheduled, train(vsgd(0.1, weight_decay=0.5), jnp.ones(3), grads)[0])


@pytest.mark.parametrize(
    ("dtype", "grad_dtype", "state_dtype"),
    [
        ("float8_e4m3fn", "float8_e4m3fn", "float32"),
        ("float16", "float16", "float32"),
        ("float64", "bfloat16", "float64"),
        ("bfloat16", "float64", "float32"),
        ("complex128", "complex64", "complex128"),
    ],
)
@transformations
def test_updates_follow_the_gradient_and_state_the_parameter(
    make: Callable[..., Any], dtype: str, grad_dtype: str, state_dtype: str
) -> None:
    with x64():
        params, grads = ({"w": jnp.ones((2, 3), each), "scalar": jnp.ones((), each)} for each in (dtype, grad_dtype))
        transformation = make()
        state = transformation.init(params)
        result, new_state = jax.jit(transformation.update)(grads, state)
        assert {leaf.dtype.name for leaf in jax.tree.leaves(result)} == {grad_dtype}
        assert {leaf.dtype.name for leaf in jax.tree.leaves(get_arrays(state))} == {state_dtype}
        assert jax.tree.map(jax.typeof, state) == jax.tree.map(jax.typeof, new_state)


@transformations
def test_64_bit_neighbours_and_numbers_change_no_bit_of_a_float32_parameter(make: Callable[..., Any]) -> None:
    grads = gradients(5, 7)
    alone, _ = directions(make(), jnp.ones(7), grads)
    with x64():  # where a strong float64 would widen
        wide = gradients(5, 2, dtype=jnp.float64)
        mixed = [{"a": grad, "b": other} for grad, other in zip(grads, wide, strict=True)]
        rule = core.VSGD if make is scale_by_vsgd else core.CONSTANT_VSGD
        defaults = rule.hyperparameters()
        numbers = defaults._replace(prior_shape=defaults.prior_strength)._asdict().items()
        transformation = make(**{name: np.float64(value) for name, value in numbers})
        together, _ = directions(transformation, {"a": jnp.ones(7, jnp.float32), "b": jnp.ones(2, jnp.float64)}, mixed)
        assert_same([each["a"] for each in together], alone)
        assert_same([each["b"] for each in together], directions(make(), jnp.ones(2, jnp.float64), wide)[0])


@transformations
def test_plain_numbers_and_numpy_arrays_are_parameters_and_state(make: Callable[..., Any]) -> None:
    transformation = make()
    expected, _ = directions(transformation, jnp.ones(()), [jnp.full((), 0.5)] * 3)
    state, grads = transformation.init({"number": 1.0, "array": np.ones(3, np.float32)}), {"number": 0.5}
    for each in expected:
        result, state = transformation.update({**grads, "array": np.full(3, 0.5, np.float32)}, state)
        state = jax.tree.map(np.asarray, state)
        np.testing.assert_array_equal(result["number"], each)
        np.testing.assert_array_equal(result["array"], np.full(3, each))


@transformations
def test_the_count_stays_at_its_largest(make: Callable[..., Any]) -> None:
    transformation = make()
    largest = jnp.asarray(jnp.iinfo(jnp.int32).max, jnp.int32)
    state = transformation.init(jnp.ones(3))._replace(count=largest)
    result, state = transformation.update(jnp.ones(3), state)
    assert state.count == largest
    assert jnp.isfinite(result).all()


# --- Bad input, and packages. ---


def test_integer_gradients_are_refused() -> None:
    transformation = scale_by_vsgd()
    params = {"w": jnp.ones(3), "n": jnp.ones(3, jnp.int32)}
    with pytest.raises(
        ValueError, match=r"updates has an array of int32 at \['n'\], but must have floating or complex numbers"
    ):
        transformation.update(params, transformation.init({"w": jnp.ones(3), "n": jnp.ones(3)}))


def test_rounding_needs_the_parameters() -> None:
    solver = vsgd(0.1, stochastic_rounding=True)
    with pytest.raises(ValueError, match="you are not passing `params`"):
        solver.update(jnp.ones(3), solver.init(jnp.ones(3)))


def run(*command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(TESTS)}
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False, env=environment)


@pytest.mark.parametrize("missing", ["jax", "optax"])
def test_without_its_framework_the_adapter_names_the_extra(missing: str) -> None:
    done = run("-c", f"import sys; sys.modules['{missing}'] = None; import vsgd.optax")
    assert "ImportError: vsgd.optax needs JAX and optax: run pip install '.[optax]' in a clone of vsgd" in done.stderr


def test_the_adapter_imports_no_other_framework() -> None:
    others = {"torch", "tensorflow", "keras", "numba", "flax", "mlx", "vsgd.numpy"}
    done = run("-c", f"import sys, vsgd.optax; print(*{others} & {{*sys.modules}})")
    assert done.stdout.strip() == "", done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "case", "number"),
    [
        ("optax.contrib._common_test", "ContribTest", 32),
        ("optax._src.alias_test", "AliasTest", 32),
        ("optax._src.float64_test", "Float64Test", 4),
    ],
)
def test_optax_own_suites_pass_whole(module: str, case: str, number: int) -> None:
    pytest.importorskip("absl")
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"this optax does not ship {module}")
    done = run(str(Path(__file__).with_name("optax_suites.py")), module, case)
    assert done.returncode == 0, done.stderr
    # This is the number in optax 0.2.8; later versions may have more.
    assert int(done.stdout) >= number
