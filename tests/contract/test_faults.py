"""Test that every adapter rejects bad arguments and damaged state with a clear message and changes nothing."""

from __future__ import annotations

import contextlib
import re
from decimal import Decimal
from fractions import Fraction
from typing import Any

import drivers
import numpy as np
import pytest
from drivers import DRIVERS, HAS_KERAS, HAS_MLX, HAS_OPTAX, HAS_TORCH, make_driver

#: For each adapter, one driver that can run here.
ADAPTERS = {name: next(driver for driver in DRIVERS if driver.startswith(name)) for name in drivers.ADAPTERS}


def make(adapter: str, kind: str, **arguments: Any) -> Any:
    """Make a driver, or raise the adapter's error."""
    return make_driver(ADAPTERS[adapter], kind, [np.ones(3, np.float32)], **arguments)


COMMON = [
    "lr",
    "variance_ratio",
    "prior_strength",
    "eps",
    "weight_decay",
    "outlier_threshold",
    "prior_shape",
    "forgetting_floor",
]
STORAGE = ["state_dtype", "seed", "stochastic_rounding"]
WITHOUT_STORAGE = [name for name, driver in ADAPTERS.items() if "bfloat16" in DRIVERS[driver].lacks]
ARGUMENTS = {
    "VSGD": [*COMMON, "kappa1", "kappa2"],
    "ConstantVSGD": [*COMMON, "kappa"],
}
KERAS_NAMES = {"lr": "learning_rate", "eps": "epsilon"}
#: Numbers, some of them out of range; JUNK holds values that are not numbers.
NUMBERS: list[Any] = [-1, 0, 1, 2**70, 10**400, True, -0.5, 0.5, 0.6, 1e-300, 1e15, -1e300, float("nan"), float("inf")]
JUNK: list[Any] = ["text", b"bytes", [], [0.5], {}, (), {"a": 1}, object(), len, 0.5j, Fraction(3, 5), Decimal("0.6")]
TYPES = ["float16", "float32", "float64", "int8", "int64", "uint8", "bool", "complex64"]


def list_values() -> list[Any]:
    """Return values of every type that a user may pass, including those of the installed frameworks."""
    values = [*NUMBERS, *JUNK, *(np.array(each) for each in ("x", None)), np.str_("x"), np.ones(2), np.ones((0,))]
    makers = [lambda value, dtype: np.asarray(value, dtype)[()], np.asarray]
    if HAS_TORCH:
        import torch

        makers.append(lambda value, dtype: torch.tensor(value, dtype=getattr(torch, dtype)))
        values += [torch.ones(2), torch.ones(1, 1).to_sparse(), torch.ones(1, device="meta")]
    if HAS_OPTAX:
        import jax.numpy as jnp

        makers.append(lambda value, dtype: jnp.asarray(value, getattr(jnp, dtype.replace("t64", "t32"))))
    for make_value in makers:
        values += [make_value(value, dtype) for dtype in TYPES for value in (0.6, [0.6])]
    return values


def find_number(value: Any) -> float | None:
    """Return a value as a real number, or None if it is not one."""
    with contextlib.suppress(TypeError, ValueError, OverflowError, RuntimeError, NotImplementedError):
        # `optax.inject_hyperparams` makes all numbers complex if one parameter is complex.
        is_number = isinstance(value, int | float) or hasattr(value, "dtype")
        number = complex(getattr(value, "item", lambda: value)()) if is_number else 1j
        return None if number.imag else number.real
    return None


def is_complex(value: Any) -> bool:
    return "complex" in str(getattr(value, "dtype", ""))


def run(adapter: str, kind: str, arguments: dict[str, Any]) -> np.ndarray:
    """Return the parameters after two steps, or raise the adapter's error before the first."""
    driver = make(adapter, kind, **arguments)
    for scale in (0.5, -2.0):
        driver.step([np.full(3, scale, np.float32)])
    param: np.ndarray = driver.read()[0]["param"]
    return param


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("kind", ARGUMENTS)
def test_a_value_of_any_type_acts_as_its_number_or_is_refused_by_name(adapter: str, kind: str) -> None:
    for name in [*ARGUMENTS[kind], *(STORAGE if adapter not in WITHOUT_STORAGE else [])]:
        names, expected = (name, KERAS_NAMES.get(name, name)), {}
        for value in list_values():
            if name in ("lr", "weight_decay") and (callable(value) or (adapter == "optax" and is_complex(value))):
                continue  # a schedule, or a number that optax' own chain accepts
            number, where = find_number(value), f"{adapter} {name}={value!r} of {type(value)}"
            try:
                after = run(adapter, kind, {name: value})
            except (ValueError, TypeError) as error:
                text = str(error).replace(repr(value), "")
                assert any(each in text for each in names), where
                assert "\n" not in text, where
                continue
            assert number is not None or value is None or name in STORAGE, where
            if adapter == "optax" and number == 0:
                continue  # JAX's arrays pass whatever their value
            if number is not None and number not in expected:
                expected[number] = run(adapter, kind, {name: int(number) if name in STORAGE else number})
            if number is not None:
                np.testing.assert_allclose(after, expected[number], rtol=1e-6, err_msg=where)
            # A learning rate of 1e15 overflows in any optimizer.
            assert np.isfinite(after).all() or (number or 0) > 1e14, where


# --- Keras: variables are saved by number. ---


def keras_optimizer(kind: str = "VSGD") -> tuple[Any, list[Any]]:
    pytest.importorskip("keras")
    from adapters.keras.keras_problems import make, tensors, variables_of

    variables = variables_of([np.ones((2, 3), np.float32), np.ones(4, np.float32)])
    optimizer = make(kind, lr=0.125)
    for scale in (1.0, -0.5, 2.0):
        optimizer.apply(tensors([np.full((2, 3), scale, np.float32), np.full(4, scale, np.float32)]), variables)
    return optimizer, variables


def values_of(optimizer: Any) -> list[np.ndarray]:
    from adapters.keras.keras_problems import to_numpy

    return [to_numpy(each) for each in optimizer.variables]


class Unreadable(dict[str, Any]):
    """A store whose last array cannot be read, like a file that is cut off."""

    def __getitem__(self, name: str) -> Any:
        if name == list(self)[-1]:
            raise OSError("cut off")
        return super().__getitem__(name)


#: Arrays that replace those of a store, and the expected message.
BAD_ARRAYS: list[tuple[dict[str, np.ndarray], str]] = [
    ({"7": np.ones(9, np.float32)}, r"\[7\] has shape \(9,\), but .* has \(4,\)"),
    ({"7": np.array(["a", "b", "c", "d"])}, r"\[7\] is of <U1, but must be of numbers"),
    ({"7": np.ones(4, np.complex64)}, r"\[7\] is of complex64, but must be of numbers"),
    ({"7": np.ones(4, bool)}, r"\[7\] is of bool, but must be of numbers"),
    ({"3": -np.ones((2, 3), np.float32)}, r"\[3\] has numbers <= 0, but .*b_g must be above zero"),
]


@pytest.mark.skipif(not HAS_KERAS, reason="Keras is not installed")
def test_keras_variables_that_lack_fail_or_do_not_fit_change_nothing() -> None:
    optimizer, _ = keras_optimizer()
    before = values_of(optimizer)
    store = {str(i): each + 1 for i, each in enumerate(before)}
    for bad, said in BAD_ARRAYS:
        with pytest.raises(ValueError, match=f"store{said}"):
            optimizer.load_own_variables({**store, **bad})
        with pytest.raises(ValueError, match=f"weights{said}"):
            optimizer.set_weights([*{**store, **bad}.values()])
    misnamed = {("x" if name == "3" else name): array for name, array in store.items()}
    with pytest.raises(ValueError, match="store lacks 3, but must have arrays for all variables"):
        optimizer.load_own_variables(misnamed)
    with pytest.raises(OSError, match="cut off"):
        optimizer.load_own_variables(Unreadable(store))
    with pytest.raises(ValueError, match="weights has 7 arrays, but the optimizer has 8 variables"):
        optimizer.set_weights([*store.values()][:-1])
    fewer = {str(i): each for i, each in enumerate(values_of(keras_optimizer("ConstantVSGD")[0]))}
    with pytest.warns(UserWarning, match="Skipping variable loading"):
        optimizer.load_own_variables(fewer)
    for ours, expected in zip(values_of(optimizer), before, strict=True):
        np.testing.assert_array_equal(ours, expected)


@pytest.mark.skipif(not HAS_KERAS, reason="Keras is not installed")
def test_keras_gradients_of_other_shapes_change_nothing() -> None:
    from adapters.keras.keras_problems import make, tensors, to_numpy, variables_of

    variables = variables_of([np.ones(3, np.float32), np.ones((2, 3), np.float32)])
    optimizer = make("VSGD", weight_decay=0.1)
    optimizer.build(variables)
    before = [to_numpy(each) for each in (*variables, *optimizer.variables)]
    for last in ((3,), (1, 3)):  # these shapes would broadcast
        grads = tensors([np.ones(3, np.float32), np.ones(last, np.float32)])
        said = re.escape(f"p1 has shape {last}, but must have (2, 3)")
        for refuse in (optimizer.apply, optimizer.surprise):
            with pytest.raises(ValueError, match=said):
                refuse(grads, variables)
    with pytest.raises(ValueError, match="grads has 1 items, but there are 2 variables"):
        optimizer.surprise(grads[:1], variables)
    for each, expected in zip((*variables, *optimizer.variables), before, strict=True):
        np.testing.assert_array_equal(to_numpy(each), expected)


@pytest.mark.skipif(not HAS_KERAS, reason="Keras is not installed")
def test_keras_says_that_nothing_is_known_before_it_is_built() -> None:
    from adapters.keras.keras_problems import make, tensors, variables_of

    (variable,) = variables_of([np.ones(3, np.float32)])
    optimizer, grads = make("VSGD"), tensors([np.ones(3, np.float32)])
    for ask in (lambda: optimizer.posterior(variable), lambda: optimizer.surprise(grads, [variable])):
        with pytest.raises(ValueError, match="p0, but must be one that the optimizer was built with"):
            ask()


# --- Optax: the user holds the state, a tree. ---


@pytest.mark.skipif(not HAS_OPTAX, reason="optax is not installed")
@pytest.mark.parametrize("kind", ARGUMENTS)
def test_optax_state_of_other_shapes_is_refused(kind: str) -> None:
    import jax.numpy as jnp

    import vsgd.optax

    scale = {"VSGD": vsgd.optax.scale_by_vsgd, "ConstantVSGD": vsgd.optax.scale_by_constant_vsgd}[kind]()
    grads = {"w": jnp.ones((2, 3))}
    state = scale.init(grads)
    # These shapes would broadcast, and silently change the state's shape.
    for shape in ((3,), (1, 3), ()):
        with pytest.raises(ValueError, match=r"state has arrays of shapes .* at \['w'\], but updates has \(2, 3\)"):
            scale.update(grads, state._replace(mu_g={"w": jnp.zeros(shape)}))


@pytest.mark.skipif(not HAS_OPTAX, reason="optax is not installed")
def test_optax_refuses_another_rules_state_and_integer_parameters() -> None:
    import jax.numpy as jnp

    from vsgd.optax import constant_vsgd, vsgd

    grads = jnp.ones(3)
    with pytest.raises(ValueError, match="state is ScaleByConstantVsgdState, but must be ScaleByVsgdState"):
        vsgd(0.1).update(grads, constant_vsgd(0.1).init(grads), grads)
    with pytest.raises(ValueError, match="params has an array of int32, but must have floating or complex numbers"):
        vsgd(0.1).init(jnp.ones(3, jnp.int32))


# --- MLX: the user holds the state, a dict. ---


@pytest.mark.skipif(not HAS_MLX, reason="MLX is not installed")
@pytest.mark.parametrize("kind", ARGUMENTS)
def test_mlx_refuses_what_does_not_fit_and_changes_nothing(kind: str) -> None:
    import mlx.core as mx
    from mlx.utils import tree_flatten

    import vsgd.mlx

    optimizer, params = getattr(vsgd.mlx, kind)(), {"v": mx.ones(4), "w": mx.ones((2, 3))}
    optimizer.apply_gradients(params, params)
    before = {name: np.array(array) for name, array in tree_flatten(optimizer.state)}
    good = optimizer.state["w"]
    *others, rate = good
    # The first two would broadcast.
    for state, grads, of, message in (
        (good, {**params, "w": mx.ones(3)}, params, r"have shapes .*\(2, 3\).* must have the gradient's: .*\(3,\)"),
        (
            {**good, rate: good[rate][0]},
            params,
            params,
            rf"have shapes .*'{rate}': \(3,\).* must have the gradient's: .*\(2, 3\)",
        ),
        ({name: good[name] for name in others}, params, params, rf"must have the gradient's: .*'{rate}': \(2, 3\)"),
        (good, params, {**params, "w": mx.ones((2, 3), mx.int32)}, "a parameter is of .*int32, but must be of real floating"),
    ):
        optimizer.state["w"] = state
        with pytest.raises(ValueError, match=message):
            optimizer.apply_gradients(grads, of)
    for name, array in tree_flatten(optimizer.state):
        np.testing.assert_array_equal(array, before[name])


@pytest.mark.skipif(not HAS_MLX, reason="MLX is not installed")
@pytest.mark.parametrize("kind", ARGUMENTS)
def test_mlx_makes_the_state_of_the_parameters_whatever_the_first_gradients_are(kind: str) -> None:
    import mlx.core as mx

    import vsgd.mlx

    optimizer, params = getattr(vsgd.mlx, kind)(), {"w": mx.ones(3)}
    with pytest.raises(ValueError, match="must have the gradient's"):
        optimizer.apply_gradients({"w": mx.ones(1)}, params)
    assert (optimizer.apply_gradients({"w": mx.ones(3)}, params)["w"] < 1).all().item()
    with mx.stream(mx.cpu):
        wide = getattr(vsgd.mlx, kind)()
        wide.apply_gradients({"w": mx.ones(3)}, {"w": mx.ones(3, mx.float64)})
        assert wide.state["w"]["mu_g"].dtype == mx.float64
