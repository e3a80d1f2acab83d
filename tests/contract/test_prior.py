"""Test `prior_strength_from`, which computes a prior in the gradients' own units, in each adapter."""

from __future__ import annotations

import gc
import re
import weakref
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from importlib import import_module
from typing import Any

import numpy as np
import pytest
from drivers import ADAPTERS, HAS_JAX, HAS_KERAS, HAS_MLX, HAS_OPTAX, HAS_TORCH
from drivers.emulation import round_to_nearest
from drivers.precision import x64

import vsgd.numpy

doors = pytest.mark.parametrize("door", ADAPTERS)


def opened(door: str) -> tuple[Callable[..., float], Callable[..., Any]]:
    """Return the adapter's `prior_strength_from`, and a function that makes an array of its library, with an optional dtype."""
    library = import_module(
        {"torch": "torch", "optax": "jax.numpy", "keras": "keras.ops", "mlx": "mlx.core"}.get(door, "numpy")
    )
    if door == "mlx":
        library.set_default_device(library.cpu)  # GPUs have no float64

    def to(array: np.ndarray, dtype: str | None = None) -> Any:
        name = dtype or array.dtype.name
        if door == "torch":
            return library.from_numpy(array).to(getattr(library, name))
        if door == "keras":
            return library.cast(library.convert_to_tensor(array, dtype=array.dtype.name), name)
        return library.array(array, name if door in ("numpy", "optax") else getattr(library, name))

    return import_module(f"vsgd.{door}").prior_strength_from, to


def draw(dtype: Any, size: float = 1.0, batches: int = 3) -> list[list[np.ndarray]]:
    """Return gradients of some mini-batches of different sizes, for parameters of different shapes."""
    rng = np.random.default_rng(0)
    shapes = [(5, 3), (), (0, 2), (40,)]

    def normal(shape: tuple[int, ...]) -> Any:
        is_complex = np.issubdtype(dtype, np.complexfloating)
        return rng.standard_normal(shape) + (1j * rng.standard_normal(shape) if is_complex else 0)

    return [[np.asarray(size * number * normal(shape), dtype) for shape in shapes] for number in range(1, batches + 1)]


def mean_square(batches: list[list[np.ndarray]]) -> float:
    """Return the mean square in float64; a complex number counts as two."""
    grads = np.concatenate([grad.ravel() for batch in batches for grad in batch])
    parts = np.concatenate([grads.real, grads.imag] if np.iscomplexobj(grads) else [grads])
    return float(np.mean(parts.astype(np.float64) ** 2))


@doors
@pytest.mark.parametrize(
    ("dtype", "size", "scale"),
    [
        *((dtype, 1.0, 3.0) for dtype in ("float16", "float32", "float64", "complex64", "complex128")),
        # Squares neither overflow nor vanish.
        *[("float16", 8e3, 1.0), ("float16", 2e-6, 1.0), ("float32", 1e30, 1.0), ("float32", 1e-30, 1e40)],
        ("bfloat16", 1e25, 1.0),
    ],
)
def test_it_is_the_mean_square_of_all_elements(door: str, dtype: str, size: float, scale: float) -> None:
    if (door, dtype) in (("mlx", "complex128"), ("numpy", "bfloat16")):
        pytest.skip(f"{door} has no {dtype}")
    prior_strength_from, to = opened(door)
    made = draw("float32" if dtype == "bfloat16" else dtype, size)
    with x64() if door in ("optax", "keras") and HAS_JAX else nullcontext():
        # None marks a parameter without a gradient.
        found = prior_strength_from([[None, *(to(grad, dtype) for grad in batch)] for batch in made], scale)
    assert type(found) is float
    rounded = [[round_to_nearest(grad) if dtype == "bfloat16" else grad for grad in batch] for batch in made]
    # The sums of 60 numbers are in float32.
    assert found == pytest.approx(5e-5 * scale * mean_square(rounded), rel=2e-6)


@doors
def test_it_has_the_unit_of_a_squared_gradient_to_the_bit(door: str) -> None:
    prior_strength_from, to = opened(door)
    plain = prior_strength_from([list(map(to, batch)) for batch in draw(np.float32)], scale=10.0)
    for power in (0, -13, 13, 40):
        batches = [list(map(to, batch)) for batch in draw(np.float32, 2.0**power)]
        assert prior_strength_from(batches) == 4.0**power * plain  # the default scale is ten


@doors
def test_the_gradients_of_one_mini_batch_are_held_at_a_time(door: str) -> None:
    prior_strength_from, to = opened(door)
    alive: list[weakref.ref[Any]] = []

    def batches() -> Iterator[dict[str, Any]]:
        for batch in draw(np.float32, batches=5):
            if any(each() is not None for each in alive):
                gc.collect()
            assert [each() for each in alive] == [None] * len(alive)
            grads = {str(i): to(grad.copy()) for i, grad in enumerate(batch)}
            alive.extend(map(weakref.ref, grads.values()))
            yield grads
            del grads

    plain = [{str(i): to(grad) for i, grad in enumerate(batch)} for batch in draw(np.float32, batches=5)]
    assert prior_strength_from(batches()) == prior_strength_from(plain)
    assert len(alive) == 20


NOT_FINITE = np.array([1.0, np.nan], np.float32), np.array([1.0, -np.inf], np.float32)
ZEROS = np.zeros(3, np.float32)
ONES = np.ones(3, np.float32)
MISTAKES: dict[str, tuple[Any, float, str]] = {
    "scale": ([[ONES]], 0.0, r"Invalid scale value: 0.0 \(scale must be a finite number > 0\)"),
    "no iterable": (5, 10.0, "gradients is int, but must be an iterable over mini-batches"),
    "nothing but None": ([[None], [None]], 10.0, "gradients has no elements, but must have those of one mini-batch at least"),
    "zeros": ([[ZEROS], [ZEROS, None]], 10.0, "gradients has 6 elements, all zero, but must have some that are not"),
    "NaN": ([[ONES], [ONES, NOT_FINITE[0]]], 10.0, r"gradients\[1\]\[1\] has elements or a sum of nan, but must have finite"),
    "infinity": ([[NOT_FINITE[1]]], 10.0, r"gradients\[0\]\[0\] has elements or a sum of inf, but must have finite ones"),
    "text": ([[ONES, "x"]], 10.0, r"gradients\[0\]\[1\] is (of <U1|str|of string), but must be"),
    "too small": ([[1e-14 * ONES]], 10.0, "gradients and a scale of 10.0 give a prior_strength of 5e-32, but it must be"),
}


@doors
@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_is_no_gradient_is_named(door: str, mistake: str) -> None:
    prior_strength_from, to = opened(door)
    gradients, scale, text = MISTAKES[mistake]
    if door == "mlx":  # MLX names a place in a tree by its path, which is text
        text = re.sub(r"\\\]\\\[(\d)", r"\\]\\['\1'", text)
    if isinstance(gradients, list):
        gradients = [[to(grad) if isinstance(grad, np.ndarray) else grad for grad in batch] for batch in gradients]
    with pytest.raises(ValueError, match=text):
        prior_strength_from(gradients, scale)


def test_a_strength_beyond_all_numbers_is_named() -> None:
    with pytest.raises(ValueError, match="give a prior_strength of inf, but it must be a finite number >= 1e-30"):
        vsgd.numpy.prior_strength_from([[np.full(3, 1e200)]])


@pytest.mark.parametrize("door", [door for door in ADAPTERS if door in ("numpy", "torch", "keras")])
def test_gradients_that_are_no_list_of_mini_batches_are_named(door: str) -> None:
    prior_strength_from, to = opened(door)
    with pytest.raises(ValueError, match=r"gradients\[0\] is \w+, but must be a list of gradients, one for each"):
        prior_strength_from([to(ONES), to(ONES)])
    with pytest.raises(ValueError, match=r"gradients\[0\]\['w'\] has elements or a sum of nan"):
        prior_strength_from([{"w": to(NOT_FINITE[0])}])


@pytest.mark.skipif(not HAS_TORCH, reason="torch is not installed")
def test_gradients_of_torch_may_have_a_graph_but_not_be_sparse() -> None:
    torch = pytest.importorskip("torch")
    prior_strength_from, to = opened("torch")
    weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    grads = torch.autograd.grad(weight.pow(3).sum(), [weight], create_graph=True)
    assert prior_strength_from([grads]) == pytest.approx(5e-4 * (3.0**2 + 12.0**2) / 2)
    sparse = r"gradients\[0\]\[0\] is a tensor of layout torch.sparse_coo, but must be a dense tensor"
    with pytest.raises(ValueError, match=sparse):
        prior_strength_from([[to(ONES).to_sparse()]])


@pytest.mark.skipif(not HAS_KERAS, reason="Keras is not installed")
def test_gradients_of_keras_may_be_variables_arrays_of_numpy_or_rows() -> None:
    import keras

    prior_strength_from, _ = opened("keras")
    values = np.array([3.0, -4.0], np.float32)
    for grad in (values, keras.Variable(values)):
        assert prior_strength_from([{"w": grad}]) == pytest.approx(5e-4 * 12.5)
    with pytest.raises(ValueError, match=r"gradients\[0\]\[0\] is of int32, but must be of floating or complex numbers"):
        prior_strength_from([[np.ones(2, np.int32)]])
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        slices = tf.IndexedSlices(tf.constant([[3.0, 4.0], [1.0, 1.0]]), tf.constant([1, 1]), tf.constant([4, 2]))
        # A row that occurs twice is the sum of both, and a row that is left out is zero.
        assert prior_strength_from([[slices]]) == pytest.approx(5e-4 * (16 + 25) / 8)


@pytest.mark.skipif(not HAS_OPTAX, reason="optax is not installed")
def test_trees_of_jax_are_named_by_path_and_may_be_stacked() -> None:
    import jax.numpy as jnp

    prior_strength_from, _ = opened("optax")
    with pytest.raises(ValueError, match=r"gradients\[0\]\['a'\]\[1\] is an array of int32, but must be an array of floating"):
        prior_strength_from([{"a": [jnp.ones(2), jnp.ones(2, jnp.int32)]}])
    batches = draw(np.float32)
    stacked = [jnp.stack(grads) for grads in zip(*batches, strict=True)]
    assert prior_strength_from([stacked]) == pytest.approx(prior_strength_from(batches), rel=1e-6)
    assert prior_strength_from(jnp.ones((3, 5))) == pytest.approx(5e-4)  # a tree may be an array


@pytest.mark.skipif(not HAS_MLX, reason="MLX is not installed")
def test_trees_of_mlx_are_named_by_path_and_may_be_an_array() -> None:
    import mlx.core as mx

    prior_strength_from, _ = opened("mlx")
    with pytest.raises(ValueError, match=r"gradients\[0\]\['layers.1.w'\] is an array of mlx.core.int32, but must be an array"):
        prior_strength_from([{"layers": [{"w": mx.ones(2)}, {"w": mx.ones(2, mx.int32)}]}])
    with pytest.raises(ValueError, match=r"gradients\[1\] has elements or a sum of nan"):
        prior_strength_from(mx.array([[1.0, 2.0], [1.0, mx.nan]]))
    assert prior_strength_from(mx.ones((3, 5))) == pytest.approx(5e-4)
