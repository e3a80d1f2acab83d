"""State in bfloat16 and bfloat16 variables, rounded stochastically, on the Keras backend of this process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

keras = pytest.importorskip("keras")
ml_dtypes = pytest.importorskip("ml_dtypes")

from adapters.keras.keras_problems import (  # noqa: E402
    BACKEND,
    allow_float64,
    assert_continues,
    fit,
    jitted_apply,
    linear_model,
    make,
    numpy_fit,
    read,
    stateless,
    tensors,
    to_numpy,
    variables_of,
)
from drivers.rules import RULES  # noqa: E402

kinds = pytest.mark.parametrize("kind", RULES)
SHAPES = ((), (5,), (6, 7, 50), (0,))
COMPACT: dict[str, Any] = {"state_dtype": "bfloat16", "stochastic_rounding": True}


def arrays(seed: int, dtype: str, shapes: tuple[tuple[int, ...], ...] = SHAPES) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    numpy_dtype = np.dtype(getattr(ml_dtypes, dtype, dtype))
    return [np.asarray(rng.standard_normal(shape)).astype(numpy_dtype) for shape in shapes]


def wide(array: np.ndarray) -> np.ndarray:
    return np.asarray(array, np.float32)


def state_dtypes(optimizer: Any) -> set[str]:
    return {keras.backend.standardize_dtype(each.value.dtype) for each in optimizer.variables[2:]}


def equal_share(one: Any, other: Any) -> float:
    pairs = [(ours[name], theirs[name]) for ours, theirs in zip(one, other, strict=True) for name in ours]
    return float(np.mean(np.concatenate([np.ravel(wide(a) == wide(b)) for a, b in pairs])))


def eager_apply(optimizer: Any, variables: list[Any]) -> Any:
    return lambda grads: optimizer.apply(grads, variables)


def run(kind: str, dtype: str, steps: int, how: Any = eager_apply, **options: Any) -> list[dict[str, np.ndarray]]:
    variables = variables_of(arrays(0, dtype))
    optimizer = make(kind, **options)
    optimizer.build(variables)
    apply = how(optimizer, variables)
    for step in range(1, steps + 1):
        apply(tensors(arrays(step, dtype)))
    return read(optimizer, variables)


# --- The definition. ---


@kinds
def test_jitted_equals_eager_but_for_float32_rounding(kind: str) -> None:
    jitted, eager = (run(kind, "bfloat16", 10, how, weight_decay=0.125, **COMPACT) for how in (jitted_apply, eager_apply))
    assert equal_share(jitted, eager) > 0.99


@kinds
def test_gradients_of_other_dtypes_are_not_rounded(kind: str) -> None:
    def result(dtype: str) -> Any:
        variables = variables_of(arrays(0, "float32"))
        optimizer = make(kind, **COMPACT)
        for step in range(1, 4):
            optimizer.apply(tensors([grad.astype(dtype) for grad in arrays(step, "float32")]), variables)
        return read(optimizer, variables)

    with allow_float64():
        assert equal_share(result("float64"), result("float32")) > 0.999


def test_sparse_gradients_equal_dense_ones() -> None:
    if BACKEND != "tensorflow":
        pytest.skip("only TensorFlow has sparse gradients of embeddings")
    import tensorflow as tf

    ends = []
    for sparse in (True, False):
        (variable,) = variables_of([np.ones((6, 3), np.float32)])
        optimizer = make("VSGD", **COMPACT)
        grad = tf.IndexedSlices(tf.fill((2, 3), 0.3), tf.constant([4, 1]), tf.constant([6, 3]))
        for _ in range(3):
            optimizer.apply([grad if sparse else tf.convert_to_tensor(grad)], [variable])
        ends.append(read(optimizer, [variable]))
    assert equal_share(*ends) == 1


@kinds
def test_stateless_apply_equals_apply(kind: str) -> None:
    if BACKEND == "tensorflow":
        pytest.skip("Keras has no stateless_apply on TensorFlow")
    pure, plain = (run(kind, "bfloat16", 3, how, weight_decay=0.125, **COMPACT) for how in (stateless, eager_apply))
    assert equal_share(pure, plain) == 1


# --- What it is for. ---


def test_rounded_variables_may_be_spared_weight_decay() -> None:
    start = np.linspace(1.0, 1.9, 4096).astype(ml_dtypes.bfloat16)

    def shrunk(**options: Any) -> list[float]:
        variables = variables_of([start, start])
        optimizer = make("VSGD", lr=0.01, weight_decay=0.01, **options)
        optimizer.exclude_from_weight_decay(var_names=["p1"])
        optimizer.build(variables)
        apply = optimizer.apply if BACKEND == "torch" else jitted_apply(optimizer, variables)
        for _ in range(100):
            apply(tensors([np.zeros_like(start)] * 2))  # no step of its own
        return [float((wide(to_numpy(each)).astype(float) / wide(start)).mean()) for each in variables]

    assert shrunk() == [1, 1]  # to the nearest, each decay is undone
    # The mean of 4096 elements; each strays by at most 100 roundings of 2**-7, some 0.03 in all.
    assert shrunk(stochastic_rounding=True) == [pytest.approx((1 - 1e-4) ** 100, abs=0.002), 1]


@pytest.mark.compiler
def test_a_model_compiled_by_torch_rounds_too() -> None:
    if BACKEND != "torch" or tuple(map(int, keras.__version__.split(".")[:2])) < (3, 15):
        pytest.skip("torch's own, of Keras 3.15 or later")
    pytest.importorskip("torch").compiler.reset()
    ends = []
    for jit_compile in (True, False):
        model = linear_model(make("VSGD", lr=0.05, state_dtype="bfloat16"), jit_compile=jit_compile)
        fit(model, epochs=3)
        ends.append([wide(to_numpy(each)) for each in model.optimizer.variables[2:]])
    flat = [np.concatenate([each.ravel() for each in end]) for end in ends]
    # The gradients differ in their last digits; other noise would leave hardly an element.
    assert np.mean(flat[0] == flat[1]) > 0.8


# --- Models and files. ---


@kinds
def test_a_saved_model_continues_bit_by_bit(kind: str, tmp_path: Path) -> None:
    model = linear_model(make(kind, lr=0.05, weight_decay=0.01, seed=5, **COMPACT))
    fit(model, epochs=3)
    # The rounding of the state, a part in 128 of a rate, moves a step little.
    for weight, expected in zip(model.get_weights(), numpy_fit(kind, 3, lr=0.05, weight_decay=0.01), strict=True):
        np.testing.assert_allclose(weight, expected, rtol=0, atol=0.02)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert state_dtypes(loaded.optimizer) == {"bfloat16"}
    assert loaded.optimizer.get_config() == model.optimizer.get_config()
    assert_continues(loaded, model)


@kinds
def test_the_config_holds_what_was_given(kind: str) -> None:
    optimizer = make(kind, seed=np.int64(7), **COMPACT)
    config = optimizer.get_config()
    assert {name: config[name] for name in (*COMPACT, "seed")} == {**COMPACT, "seed": 7}
    revived = keras.optimizers.deserialize(keras.optimizers.serialize(optimizer))
    assert revived.get_config() == config
    assert type(config["seed"]) is int
