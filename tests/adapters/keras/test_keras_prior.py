"""A prior in the gradients' own units, in Keras: the door, and the scale of the loss."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from drivers import start

pytest.importorskip("keras")

from adapters.keras.keras_problems import BACKEND, floatx, make, tensors, to_numpy
from keras import ops

import vsgd.numpy
from vsgd.keras import prior_strength_from

kinds = pytest.mark.parametrize("kind", ["VSGD", "ConstantVSGD"])


def draw(size: float = 1.0, imaginary: complex = 0.0) -> list[list[np.ndarray]]:
    """Gradients of three mini-batches, of unlike sizes."""
    rng = np.random.default_rng(0)

    def normal(shape: tuple[int, ...]) -> Any:
        return rng.standard_normal(shape) + (imaginary * rng.standard_normal(shape) if imaginary else 0.0)

    return [[size * number * normal((5, 3)), size * number * normal((40,))] for number in (1, 2, 3)]


@pytest.mark.parametrize(
    ("dtype", "size", "scale"),
    [
        ("float64", 1.0, 3.0),
        ("float32", 1.0, 3.0),
        ("float32", 1e30, 1.0),
        ("float32", 1e-30, 1e40),
        ("float16", 8e3, 1.0),
        ("float16", 2e-6, 1.0),
        ("bfloat16", 1e25, 1.0),
        ("complex64", 1.0, 3.0),
    ],
)
def test_it_is_the_mean_square_of_all_elements_and_its_squares_neither_overflow_nor_vanish(
    dtype: str, size: float, scale: float
) -> None:
    with floatx("float64" if dtype == "float64" else "float32"):
        batches = draw(size, 1j if dtype == "complex64" else 0.0)
        given = [[None, *(ops.cast(ops.convert_to_tensor(grad), dtype) for grad in batch)] for batch in batches]
        wide = "complex128" if dtype == "complex64" else "float32" if "16" in dtype else dtype
        rounded = [[to_numpy(ops.cast(grad, wide) if "16" in dtype else grad) for grad in batch[1:]] for batch in given]
        found = prior_strength_from(given, scale)
    assert type(found) is float
    # Sums of 60 numbers in float32; NumPy's door has its own test.
    assert found == pytest.approx(vsgd.numpy.prior_strength_from(rounded, scale), rel=2e-6)


def test_variables_and_dicts_and_numpy_arrays_are_taken() -> None:
    import keras

    values = np.array([3.0, -4.0], np.float32)
    for grad in (values, keras.Variable(values), ops.convert_to_tensor(values)):
        assert prior_strength_from([{"w": grad}]) == pytest.approx(5e-4 * 12.5)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="TensorFlow's own")
def test_rows_that_indexed_slices_leave_out_are_zero() -> None:
    import tensorflow as tf

    slices = tf.IndexedSlices(tf.constant([[3.0, 4.0], [1.0, 1.0]]), tf.constant([1, 1]), tf.constant([4, 2]))
    # A row that stands twice is the sum of both.
    assert prior_strength_from([[slices]]) == pytest.approx(5e-4 * (16 + 25) / 8)


@pytest.mark.parametrize(
    ("gradients", "text"),
    [
        ([], "gradients has no elements"),
        ([[np.zeros(3, np.float32)]], "gradients has 3 elements, all zero"),
        ([[np.ones(2, np.float32), np.array([1.0, np.nan], np.float32)]], r"gradients\[0\]\[1\] has elements or a sum of nan"),
        ([["x"]], r"gradients\[0\]\[0\] is (str|of string), but must be"),
        ([[np.ones(2, np.int32)]], r"gradients\[0\]\[0\] is of int32, but must be of floating or complex numbers"),
        ([np.ones(2, np.float32)], r"gradients\[0\] is ndarray, but must be a list of gradients"),
    ],
)
def test_what_is_no_gradient_is_named(gradients: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        prior_strength_from(gradients)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@kinds
def test_a_loss_times_a_power_of_two_changes_no_bit(kind: str, dtype: str) -> None:
    batches = [[grad.astype(dtype) for grad in batch] for batch in draw(1e-3)]

    def run(s: float, eps: float) -> list[dict[str, np.ndarray]]:
        grads = [[s * grad for grad in batch] for batch in batches]
        strength = prior_strength_from([tensors(batch) for batch in grads])
        hyper = {"lr": 0.1, "prior_strength": strength, "prior_shape": 0.0, "eps": eps}
        step, read = start("keras", kind, [np.ones_like(grad) for grad in grads[0]], **hyper)
        for batch in 4 * grads:
            step(batch)
        units = {"mu_g": s, "b_g": s * s, "b_ghat": s * s, "b": s * s}
        return [{name: values / np.asarray(units.get(name, 1), dtype) for name, values in each.items()} for each in read()]

    with floatx(dtype):
        for s, eps in ((2.0**13, 1e-5), (2.0**-13, 0.0)):
            for one, other in zip(run(1.0, eps), run(s, s * eps), strict=True):
                assert one["param"].dtype == dtype
                for name, values in one.items():
                    np.testing.assert_array_equal(values, other[name])


@kinds
def test_a_saved_optimizer_keeps_its_shape_and_an_older_one_has_the_papers(kind: str) -> None:
    optimizer = make(kind, prior_shape=0.0)
    config = optimizer.get_config()
    assert type(optimizer).from_config(config).prior_shape == 0.0
    del config["prior_shape"]
    assert type(optimizer).from_config(config).prior_shape is None
