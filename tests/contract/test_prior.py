"""A prior in the gradients' own units: the number that each adapter's door makes of gradients."""

from __future__ import annotations

import gc
import re
import textwrap
import weakref
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from importlib import import_module
from typing import Any

import numpy as np
import pytest
from drivers import HAS_MLX, HAS_OPTAX, HAS_TORCH
from drivers.precision import x64
from drivers.processes import run_python

import vsgd.numpy

DOORS = ["numpy", *(name for name, here in {"torch": HAS_TORCH, "optax": HAS_OPTAX, "mlx": HAS_MLX}.items() if here)]
doors = pytest.mark.parametrize("door", DOORS)


def opened(door: str) -> tuple[Callable[..., float], Callable[[np.ndarray], Any]]:
    """The door, and what makes an array of its library."""
    prior_strength_from = import_module(f"vsgd.{door}").prior_strength_from
    if door == "mlx":
        mx = import_module("mlx.core")
        mx.set_default_device(mx.cpu)  # GPUs have no float64
        from drivers.mlx_driver import to_mlx

        return prior_strength_from, to_mlx
    to = {"torch": ("torch", "from_numpy"), "optax": ("jax.numpy", "asarray"), "numpy": ("numpy", "asarray")}[door]
    return prior_strength_from, getattr(import_module(to[0]), to[1])


def draw(dtype: Any, size: float = 1.0, batches: int = 3) -> list[list[np.ndarray]]:
    """Gradients of some mini-batches, of unlike sizes, for parameters of unlike shapes."""
    rng = np.random.default_rng(0)
    shapes = [(5, 3), (), (0, 2), (40,)]

    def normal(shape: tuple[int, ...]) -> Any:
        is_complex = np.issubdtype(dtype, np.complexfloating)
        return rng.standard_normal(shape) + (1j * rng.standard_normal(shape) if is_complex else 0)

    return [[np.asarray(size * number * normal(shape), dtype) for shape in shapes] for number in range(1, batches + 1)]


def mean_square(batches: list[list[np.ndarray]]) -> float:
    """In float64, a complex number as two."""
    grads = np.concatenate([grad.ravel() for batch in batches for grad in batch])
    parts = np.concatenate([grads.real, grads.imag] if np.iscomplexobj(grads) else [grads])
    return float(np.mean(parts.astype(np.float64) ** 2))


def placed(batches: list[list[np.ndarray]], to: Callable[[np.ndarray], Any]) -> list[list[Any]]:
    """With the library's arrays, and None where there is no gradient."""
    return [[None, *map(to, batch)] for batch in batches]


@doors
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.complex64, np.complex128])
def test_it_is_the_mean_square_of_all_elements(door: str, dtype: Any) -> None:
    if door == "mlx" and dtype == np.complex128:
        pytest.skip("MLX has no complex128")
    prior_strength_from, to = opened(door)
    with x64() if door == "optax" else nullcontext():
        found = prior_strength_from(placed(draw(dtype), to), scale=3.0)
    assert type(found) is float
    # Sums of 60 numbers in float32.
    assert found == pytest.approx(5e-5 * 3.0 * mean_square(draw(dtype)), rel=2e-6)


@doors
def test_the_default_scale_is_ten(door: str) -> None:
    prior_strength_from, to = opened(door)
    batches = placed(draw(np.float32), to)
    assert prior_strength_from(batches) == prior_strength_from(batches, scale=10.0)


@doors
@pytest.mark.parametrize(
    ("dtype", "size", "scale"),
    [(np.float16, 8e3, 1.0), (np.float16, 2e-6, 1.0), (np.float32, 1e30, 1.0), (np.float32, 1e-30, 1e40)],
)
def test_squares_neither_overflow_nor_vanish(door: str, dtype: Any, size: float, scale: float) -> None:
    prior_strength_from, to = opened(door)
    found = prior_strength_from(placed(draw(dtype, size), to), scale)
    assert found == pytest.approx(5e-5 * scale * mean_square(draw(dtype, size)), rel=2e-6)


@doors
def test_it_has_the_unit_of_a_squared_gradient_to_the_bit(door: str) -> None:
    prior_strength_from, to = opened(door)
    plain = prior_strength_from(placed(draw(np.float32), to))
    for power in (-13, 13, 40):
        assert prior_strength_from(placed(draw(np.float32, 2.0**power), to)) == 4.0**power * plain


@pytest.mark.parametrize("door", [door for door in DOORS if door != "numpy"])
def test_bfloat16_is_squared_in_float32(door: str) -> None:
    prior_strength_from, to = opened(door)
    made = [[grad.astype(np.float32) for grad in batch] for batch in draw(np.float32, 1e25)]

    def cast(array: Any, dtype: str) -> Any:
        library = import_module({"torch": "torch", "optax": "jax.numpy", "mlx": "mlx.core"}[door])
        return (array.to if door == "torch" else array.astype)(getattr(library, dtype))

    def narrow(array: np.ndarray) -> Any:
        return cast(to(array), "bfloat16")

    def back(array: np.ndarray) -> np.ndarray:
        return np.asarray(cast(narrow(array), "float32"))

    rounded = [[back(grad) for grad in batch] for batch in made]
    assert prior_strength_from(placed(made, narrow)) == pytest.approx(5e-4 * mean_square(rounded), rel=2e-6)


@doors
def test_the_gradients_of_one_mini_batch_are_held_at_a_time(door: str) -> None:
    prior_strength_from, to = opened(door)
    alive: list[weakref.ref[Any]] = []

    def batches() -> Iterator[dict[str, Any]]:
        for batch in draw(np.float32, batches=5):
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
    "nothing": ([], 10.0, "gradients has no elements, but must have those of one mini-batch at least"),
    "nothing but None": ([[None], [None]], 10.0, "gradients has no elements, but must have those of one mini-batch at least"),
    "zeros": ([[ZEROS], [ZEROS, None]], 10.0, "gradients has 6 elements, all zero, but must have some that are not"),
    "NaN": ([[ONES], [ONES, NOT_FINITE[0]]], 10.0, r"gradients\[1\]\[1\] has elements or a sum of nan, but must have finite"),
    "infinity": ([[NOT_FINITE[1]]], 10.0, r"gradients\[0\]\[0\] has elements or a sum of inf, but must have finite ones"),
    "text": ([[ONES, "x"]], 10.0, r"gradients\[0\]\[1\] is (of <U1|str), but must be"),
    "too small": (
        [[1e-14 * ONES]],
        10.0,
        "gradients and a scale of 10.0 give a prior_strength of 5e-32, but it must be a finite",
    ),
    "too large": ([[ONES]], 1e308, "give a prior_strength of 5e\\+303, but"),
}


@doors
@pytest.mark.parametrize("mistake", [name for name in MISTAKES if name != "too large"])
def test_what_is_no_gradient_is_named(door: str, mistake: str) -> None:
    prior_strength_from, to = opened(door)
    gradients, scale, text = MISTAKES[mistake]
    if door == "mlx":  # names a place in a tree by its path, which is text
        text = re.sub(r"\\\]\\\[(\d)", r"\\]\\['\1'", text)
    if isinstance(gradients, list):
        gradients = [[to(grad) if isinstance(grad, np.ndarray) else grad for grad in batch] for batch in gradients]
    with pytest.raises(ValueError, match=text):
        prior_strength_from(gradients, scale)


def test_a_strength_beyond_all_numbers_is_named() -> None:
    with pytest.raises(ValueError, match="give a prior_strength of inf, but it must be a finite number >= 1e-30"):
        vsgd.numpy.prior_strength_from([[np.full(3, 1e200)]])


@pytest.mark.parametrize("door", [door for door in DOORS if door in ("numpy", "torch")])
def test_gradients_that_are_no_list_of_mini_batches_are_named(door: str) -> None:
    prior_strength_from, to = opened(door)
    with pytest.raises(
        ValueError, match=r"gradients\[0\] is (ndarray|Tensor), but must be a list of gradients, one for each param"
    ):
        prior_strength_from([to(ONES), to(ONES)])
    with pytest.raises(ValueError, match=r"gradients\[0\]\['w'\] has elements or a sum of nan"):
        prior_strength_from([{"w": to(NOT_FINITE[0])}])


@pytest.mark.skipif(not HAS_TORCH, reason="torch is not installed")
def test_sparse_gradients_of_torch_are_named() -> None:
    prior_strength_from, to = opened("torch")
    with pytest.raises(
        ValueError, match=r"gradients\[0\]\[0\] is a tensor of layout torch.sparse_coo, but must be a dense tensor"
    ):
        prior_strength_from([[to(ONES).to_sparse()]])


@pytest.mark.skipif(not HAS_TORCH, reason="torch is not installed")
def test_gradients_with_a_graph_are_taken_without_it() -> None:
    torch = pytest.importorskip("torch")
    prior_strength_from, _ = opened("torch")
    weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    grads = torch.autograd.grad(weight.pow(3).sum(), [weight], create_graph=True)
    assert prior_strength_from([grads]) == pytest.approx(5e-4 * (3.0**2 + 12.0**2) / 2)


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


@pytest.mark.skipif(not HAS_OPTAX, reason="optax is not installed")
def test_sharded_arrays_of_jax_are_summed_over_all_devices() -> None:
    script = """
        import jax, jax.numpy as jnp, numpy as np
        from jax.sharding import NamedSharding, PartitionSpec
        from vsgd.optax import prior_strength_from

        mesh = jax.make_mesh((4, 2), ("x", "y"))
        rng = np.random.default_rng(0)
        whole = {"w": jnp.asarray(rng.standard_normal((16, 6)), jnp.float32), "b": jnp.ones(8)}
        specs = {"w": PartitionSpec("x", "y"), "b": PartitionSpec("y")}
        shards = {name: jax.device_put(whole[name], NamedSharding(mesh, specs[name])) for name in whole}
        assert len(shards["w"].sharding.device_set) == 8
        print(prior_strength_from([whole]), prior_strength_from([shards]))
    """
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    done = run_python("jax", "-c", textwrap.dedent(script), **flags)
    assert done.returncode == 0, done.stdout
    whole, sharded = map(float, done.stdout.split())
    assert sharded == pytest.approx(whole, rel=1e-6)
