"""Test invariances that follow from the mathematics, for any gradients."""

from __future__ import annotations

import contextlib
from typing import Any
from unittest import mock

import drivers
import numpy as np
import pytest
from drivers import AVAILABLE, HAS_TORCH
from drivers.base import Read
from drivers.rules import RULES
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

kinds = st.sampled_from(sorted(RULES))
# Compilers contract and vectorize differently for each array shape.
BITWISE = [name for name in AVAILABLE if name not in ("torch-fused", "optax-jit", "optax-jit-numba")]
bitwise_engines = st.sampled_from(BITWISE)

magnitudes = st.floats(-1e8, 1e8, width=32).map(lambda x: x if abs(x) > 1e-20 else 0.0)


def gradients(elements: int, dtype: Any = np.float32) -> st.SearchStrategy[np.ndarray]:
    steps = st.integers(1, 8)
    return steps.flatmap(lambda n: hnp.arrays(dtype, (n, elements), elements=magnitudes))


def run(engine: str, kind: str, grads: list[list[np.ndarray]], **options: float) -> Read:
    """Return parameters and states after steps from zero; `grads` is indexed by step, then parameter."""
    return drivers.run(engine, kind, [np.zeros_like(grad) for grad in grads[0]], grads, **options)


@pytest.fixture(autouse=True, scope="module")
def small_blocks() -> Any:
    """Use blocks of a few elements, so that small arrays are split."""
    with mock.patch("vsgd.backends.torch.leaves.CPU_BLOCK", 5) if HAS_TORCH else contextlib.nullcontext():
        yield


@settings(deadline=None, max_examples=60)
@given(kind=kinds, engine=bitwise_engines, grads=gradients(12), order=st.permutations(range(12)), at=st.integers(1, 11))
def test_elements_are_independent_of_their_neighbours_order_and_shape(
    kind: str, engine: str, grads: np.ndarray, order: list[int], at: int
) -> None:
    (plain,) = run(engine, kind, [[grad] for grad in grads])
    (permuted,) = run(engine, kind, [[grad[order]] for grad in grads])
    alone = run(engine, kind, [[np.array([element]) for element in grad] for grad in grads])
    parts = run(engine, kind, [[grad[:at], grad[at:]] for grad in grads])
    (shaped,) = run(engine, kind, [[grad.reshape(2, 3, 2)] for grad in grads])
    (transposed,) = run(engine, kind, [[grad.reshape(4, 3).T] for grad in grads])
    for name, values in plain.items():
        np.testing.assert_array_equal(values[order], permuted[name])
        for split in (alone, parts):
            np.testing.assert_array_equal(values, np.concatenate([param[name] for param in split]))
        np.testing.assert_array_equal(values, shaped[name].ravel())
        np.testing.assert_array_equal(values, transposed[name].T.ravel())


@settings(deadline=None, max_examples=60)
@given(kind=kinds, engine=st.sampled_from(AVAILABLE), grads=gradients(4))
def test_the_negative_gradient_steps_the_other_way(kind: str, engine: str, grads: np.ndarray) -> None:
    (there,) = run(engine, kind, [[grad] for grad in grads])
    (back,) = run(engine, kind, [[-grad] for grad in grads])
    np.testing.assert_array_equal(there["param"], -back["param"])
    np.testing.assert_array_equal(there["mu_g"], -back["mu_g"])


@settings(deadline=None, max_examples=100)
@given(
    grads=gradients(4, np.float64),
    variance_ratio=st.floats(0.1, 1000),
    prior_strength=st.floats(1e-12, 1e-2),
    kappa1=st.floats(0.501, 1),
    kappa2=st.floats(0.501, 1),
)
def test_rates_are_positive_and_no_step_is_longer_than_the_learning_rate(grads: np.ndarray, **hyper: float) -> None:
    (ended,) = run("numpy", "VSGD", [[grad] for grad in grads], lr=1.0, **hyper)
    assert (ended["b_g"] > 0).all()
    assert (ended["b_ghat"] > 0).all()
    assert (np.abs(ended["param"]) <= len(grads)).all()


@pytest.mark.parametrize("engine", BITWISE)
@pytest.mark.parametrize("at", [1, 33, 65537, 100_002])
def test_splitting_a_large_array_changes_no_bit(engine: str, at: int) -> None:
    # Larger than a block and than torch's threshold for threads; odd sizes, so that vectors end in the middle.
    size = 100_003
    rng = np.random.default_rng(0)
    with mock.patch("vsgd.backends.torch.leaves.CPU_BLOCK", 65536) if HAS_TORCH else contextlib.nullcontext():
        grads = [rng.standard_normal(size).astype(np.float32) for _ in range(3)]
        (whole,) = run(engine, "VSGD", [[grad] for grad in grads])
        head, tail = run(engine, "VSGD", [[grad[:at], grad[at:]] for grad in grads])
    for name in ("param", "mu_g", "b_g", "b_ghat"):
        np.testing.assert_array_equal(whole[name], np.concatenate([head[name], tail[name]]))
