"""What the optax transformations promise: numbers, state, dtypes, errors, and what their own tests ask of optax's."""

from __future__ import annotations

import importlib.util
import inspect
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from drivers import start
from drivers.precision import x64
from drivers.processes import TESTS

jax = pytest.importorskip("jax")
optax = pytest.importorskip("optax")

import jax.numpy as jnp  # noqa: E402
from adapters.optax.optax_problems import assert_same, directions, gradients, reseed, rng, solvers, train, transformations  # noqa: E402

from vsgd import core  # noqa: E402
from vsgd.numpy import VSGD  # noqa: E402
from vsgd.optax import (  # noqa: E402
    ScaleByConstantVsgdState,
    ScaleByVsgdState,
    constant_vsgd,
    scale_by_constant_vsgd,
    scale_by_vsgd,
    vsgd,
)
from vsgd.optax.state import get_arrays  # noqa: E402

seed = pytest.fixture(autouse=True)(reseed)


# --- The numbers are those of the reference. ---

HYPER = {
    "VSGD": {"variance_ratio": 7.0, "prior_strength": 1e-5, "kappa1": 0.7, "kappa2": 0.95, "eps": 1e-3, "weight_decay": 0.1},
    "ConstantVSGD": {"variance_ratio": 5.0, "prior_strength": 1e-5, "kappa": 0.7, "eps": 1e-3, "weight_decay": 0.1},
}


@pytest.mark.parametrize("hyper", [{}, HYPER], ids=["defaults", "others"])
@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.complex128])
@pytest.mark.parametrize("engine", ["optax-eager", "optax-jit"])
@pytest.mark.parametrize("kind", HYPER)
def test_steps_are_those_of_the_reference(kind: str, engine: str, dtype: type, hyper: dict[str, dict[str, float]]) -> None:
    params = [rng.standard_normal(shape).astype(dtype) for shape in ((), (3,), (2, 3))]
    wide = [param.astype(np.complex128 if dtype is np.complex128 else np.float64) for param in params]
    step, read = start(engine, kind, params, lr=0.05, **hyper.get(kind, {}))
    reference_step, reference_read = start("numpy", kind, wide, lr=0.05, **hyper.get(kind, {}))
    for _ in range(60):
        grads = [rng.standard_normal(param.shape).astype(dtype) for param in params]
        step(grads)
        reference_step([grad.astype(array.dtype) for grad, array in zip(grads, wide, strict=True)])
    tolerance = 1e-4 if dtype is np.float32 else 1e-10
    for ours, reference in zip(read(), reference_read(), strict=True):
        assert ours.keys() == reference.keys()
        for name, expected in reference.items():
            # In float32 an element may pass near 0, where only its error beside the others' size means anything.
            scale = np.abs(expected).max()
            np.testing.assert_allclose(ours[name], expected, rtol=0, atol=tolerance * scale)


@solvers
def test_defaults_are_the_references(make: Callable[..., Any]) -> None:
    kind = {vsgd: core.Hyperparameters, constant_vsgd: core.ConstantHyperparameters}[make]
    for function in (make, {vsgd: scale_by_vsgd, constant_vsgd: scale_by_constant_vsgd}[make]):
        arguments = inspect.signature(function).parameters
        assert {name: arguments[name].default for name in kind._fields} == kind()._asdict()


def test_weight_decay_alone_shrinks_exponentially() -> None:
    with x64():
        params, _ = train(vsgd(0.1, weight_decay=0.5), jnp.ones(3), [jnp.zeros(3)] * 20)
        np.testing.assert_allclose(params, (1 - 0.1 * 0.5) ** 20, rtol=1e-14)


@pytest.mark.parametrize("mask", [{"w": True, "b": False}, lambda params: {"w": True, "b": False}], ids=["tree", "callable"])
@solvers
def test_mask_tells_what_decays(make: Callable[..., Any], mask: Any) -> None:
    params = {"w": jnp.ones(3), "b": jnp.ones(2)}
    grads = [{"w": w, "b": b} for w, b in zip(gradients(4, 3), gradients(4, 2), strict=True)]
    masked, _ = train(make(0.1, weight_decay=0.5, mask=mask), params, grads)
    assert_same(masked["w"], train(make(0.1, weight_decay=0.5), params, grads)[0]["w"])
    assert_same(masked["b"], train(make(0.1), params, grads)[0]["b"])


def test_weight_decay_may_be_a_schedule() -> None:
    grads = gradients(6, 3)
    scheduled, _ = train(vsgd(0.1, weight_decay=optax.constant_schedule(0.5)), jnp.ones(3), grads)
    assert_same(scheduled, train(vsgd(0.1, weight_decay=0.5), jnp.ones(3), grads)[0])


@solvers
def test_a_constant_schedule_equals_its_constant(make: Callable[..., Any]) -> None:
    grads = gradients(6, 3)
    scheduled, _ = train(make(optax.constant_schedule(0.05)), jnp.ones(3), grads)
    assert_same(scheduled, train(make(0.05), jnp.ones(3), grads)[0])


def test_the_first_step_is_at_the_schedules_beginning() -> None:
    grads = gradients(4, 3)
    params, _ = train(vsgd(lambda count: 0.1 / (1 + count)), jnp.ones(3), grads)
    array = np.ones(3, np.float32)
    reference = VSGD([array])
    for t, grad in enumerate(grads):
        reference.lr = 0.1 / (1 + t)
        reference.step([np.asarray(grad)])
    np.testing.assert_allclose(params, array, rtol=1e-6)


# --- State and dtypes. ---


@pytest.mark.parametrize(
    ("dtype", "state_dtype"),
    [
        (jnp.float8_e4m3fn, jnp.float32),
        (jnp.float16, jnp.float32),
        (jnp.bfloat16, jnp.float32),
        (jnp.float32, jnp.float32),
        (jnp.float64, jnp.float64),
        (jnp.complex64, jnp.complex64),
        (jnp.complex128, jnp.complex128),
    ],
)
@transformations
def test_state_is_float32_or_more_and_updates_as_the_gradient(make: Callable[..., Any], dtype: Any, state_dtype: Any) -> None:
    with x64():
        params = {"w": jnp.ones((2, 3), dtype), "scalar": jnp.ones((), dtype)}
        transformation = make()
        state = transformation.init(params)
        result, new_state = jax.jit(transformation.update)(params, state)
        assert {leaf.dtype for leaf in jax.tree.leaves(result)} == {jnp.dtype(dtype)}
        for each in (state, new_state):
            assert each.count.dtype == jnp.int32
            assert {leaf.dtype for leaf in jax.tree.leaves(get_arrays(each))} == {jnp.dtype(state_dtype)}
        assert jax.tree.map(jax.typeof, state) == jax.tree.map(jax.typeof, new_state)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@transformations
def test_half_precision_differs_in_the_rounding_of_updates_alone(make: Callable[..., Any], dtype: Any) -> None:
    grads = gradients(5, 7, dtype=dtype)
    half, half_state = directions(make(), jnp.ones(7, dtype), grads)
    single, single_state = directions(make(), jnp.ones(7), [grad.astype(jnp.float32) for grad in grads])
    assert_same(half, [each.astype(dtype) for each in single])
    assert_same(half_state, single_state)


def test_updates_follow_the_gradient_and_state_the_parameter() -> None:
    with x64():
        (result,), state = directions(scale_by_vsgd(), jnp.ones(2, jnp.float64), [jnp.ones(2, jnp.bfloat16)])
        assert (result.dtype, state.mu_g.dtype) == (jnp.bfloat16, jnp.float64)
        (result,), state = directions(scale_by_vsgd(), jnp.ones(2, jnp.bfloat16), [jnp.ones(2, jnp.float64)])
        assert (result.dtype, state.mu_g.dtype) == (jnp.float64, jnp.float32)


@transformations
def test_a_float64_neighbour_changes_no_bit_of_a_float32_parameter(make: Callable[..., Any]) -> None:
    grads = gradients(5, 7)
    alone, _ = directions(make(), jnp.ones(7), grads)
    with x64():
        wide = gradients(5, 2, dtype=jnp.float64)
        mixed = [{"a": grad, "b": other} for grad, other in zip(grads, wide, strict=True)]
        together, _ = directions(make(), {"a": jnp.ones(7, jnp.float32), "b": jnp.ones(2, jnp.float64)}, mixed)
        assert_same([each["a"] for each in together], alone)
        assert_same([each["b"] for each in together], directions(make(), jnp.ones(2, jnp.float64), wide)[0])


@transformations
def test_numpy_numbers_are_numbers(make: Callable[..., Any]) -> None:
    with x64():  # where a strong float64 would widen
        grads = gradients(3, 4)
        names = core.VSGD.hyperparameters() if make is scale_by_vsgd else core.CONSTANT_VSGD.hyperparameters()
        numbers = names._replace(prior_shape=names.prior_strength)._asdict().items()
        given, state = directions(make(**{name: np.float64(value) for name, value in numbers}), jnp.ones(4, jnp.float32), grads)
        plain, plain_state = directions(make(), jnp.ones(4, jnp.float32), grads)
        assert_same((given, state), (plain, plain_state))


@transformations
def test_plain_numbers_and_numpy_arrays_are_parameters(make: Callable[..., Any]) -> None:
    params = {"number": 1.0, "array": np.ones(3, np.float32)}
    grads = [{"number": 0.5, "array": np.full(3, 0.5, np.float32)}] * 3
    results, _ = directions(make(), params, grads)
    expected, _ = directions(make(), jnp.ones(()), [jnp.full((), 0.5)] * 3)
    for result, each in zip(results, expected, strict=True):
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


@solvers
def test_a_state_of_numpy_arrays_continues(make: Callable[..., Any]) -> None:
    grads = gradients(6, 3)
    solver = make(0.1, weight_decay=0.1)
    params, state = train(solver, jnp.ones(3), grads[:3])
    state = jax.tree.map(np.asarray, state)
    for grad in grads[3:]:
        updates, state = solver.update(grad, state, params)
        params = optax.apply_updates(params, updates)
    assert_same((params, state), train(solver, jnp.ones(3), grads))


def test_state_names() -> None:
    assert ScaleByVsgdState._fields == ("count", "mu_g", "b_g", "b_ghat", "drift_scale", "noise_scale")
    assert ScaleByConstantVsgdState._fields == ("count", "mu_g", "b", "drift_scale", "noise_scale")
    assert isinstance(vsgd(0.1).init(jnp.ones(2))[0], ScaleByVsgdState)
    assert isinstance(constant_vsgd(0.1).init(jnp.ones(2))[0], ScaleByConstantVsgdState)


# --- Bad input, and packages. ---


@pytest.mark.parametrize(
    ("hyper", "message"),
    [
        ({"learning_rate": -1}, "Invalid learning rate: -1 (learning_rate must be a finite number >= 0)"),
        ({"learning_rate": None}, "Invalid learning rate: None (learning_rate must be a finite number >= 0)"),
        ({"weight_decay": -0.1}, "Invalid weight_decay value: -0.1 (weight_decay must be a finite number >= 0)"),
        ({"variance_ratio": 0}, "Invalid variance_ratio value: 0 (variance_ratio must be a number in [1e-15, 1e15])"),
        ({"prior_strength": 0.0}, "Invalid prior_strength value: 0.0 (prior_strength must be a finite number >= 1e-30)"),
        ({"eps": "0"}, "Invalid epsilon value: '0' (eps must be a finite number >= 0)"),
    ],
)
@solvers
def test_a_bad_hyperparameter_is_named(make: Callable[..., Any], hyper: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        make(**{"learning_rate": 0.01, **hyper})
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("make", "name"), [(scale_by_vsgd, "kappa1"), (scale_by_vsgd, "kappa2"), (scale_by_constant_vsgd, "kappa")]
)
def test_a_bad_kappa_is_named(make: Callable[..., Any], name: str) -> None:
    with pytest.raises(ValueError) as error:
        make(**{name: 0.5})
    assert str(error.value) == f"Invalid {name} value: 0.5 ({name} must be a number in (0.5, 1])"


def test_integer_gradients_are_refused() -> None:
    transformation = scale_by_vsgd()
    params = {"w": jnp.ones(3), "n": jnp.ones(3, jnp.int32)}
    with pytest.raises(ValueError) as error:
        transformation.update(params, transformation.init(params))
    assert str(error.value) == "updates has an array of int32 at ['n'], but must have floating or complex numbers"


def test_weight_decay_needs_the_parameters() -> None:
    solver = vsgd(0.1, weight_decay=0.1)
    with pytest.raises(ValueError, match="you are not passing `params`"):
        solver.update(jnp.ones(3), solver.init(jnp.ones(3)))


@pytest.mark.parametrize("missing", ["jax", "optax"])
def test_without_its_framework_the_adapter_names_the_extra(missing: str) -> None:
    script = f"import sys; sys.modules['{missing}'] = None; import vsgd.optax"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert "ImportError: vsgd.optax needs JAX and optax: run pip install '.[optax]' in a clone of vsgd" in done.stderr


def test_the_adapter_imports_no_other_framework() -> None:
    others = {"torch", "tensorflow", "keras", "numba", "flax", "mlx", "vsgd.numpy"}
    assert run_script(f"import sys, vsgd.optax; print(*{others} & {{*sys.modules}})") == ""


def run_script(script: str, **environment: str) -> str:
    command = [sys.executable, "-c", textwrap.dedent(script)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **environment})
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# --- The tests that optax has for its own optimizers. ---


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
    command = [sys.executable, str(Path(__file__).with_name("optax_suites.py")), module, case]
    environment = {**os.environ, "PYTHONPATH": str(TESTS)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    # The number in optax 0.2.8; later ones may have more.
    assert int(done.stdout) >= number
