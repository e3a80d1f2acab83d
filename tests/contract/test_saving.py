"""Test that a saved and loaded run continues bit by bit, in every adapter and storage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from drivers import DRIVERS, assert_equal, make_driver
from drivers.rules import RULES

SHAPES = ((), (5,), (6, 7, 50), (0,))
#: The parameters' dtype, and the state's options.
STORAGE: dict[str, tuple[str, dict[str, Any]]] = {
    **{dtype: (dtype, {}) for dtype in ("float64", "float32", "float16")},
    "compact": ("bfloat16", {"state_dtype": "bfloat16", "stochastic_rounding": True, "seed": 9}),
}


@pytest.mark.parametrize("storage", STORAGE)
@pytest.mark.parametrize("kind", RULES)
@pytest.mark.parametrize("driver", DRIVERS)
def test_a_resumed_run_is_the_uninterrupted_one(driver: str, kind: str, storage: str, tmp_path: Path) -> None:
    dtype, options = STORAGE[storage]
    rng = np.random.default_rng(0)

    def draw() -> list[np.ndarray]:
        return [np.asarray(rng.standard_normal(shape), np.float32 if storage == "compact" else dtype) for shape in SHAPES]

    params = draw()

    def make() -> Any:
        promise = "bfloat16" if storage == "compact" else None
        return make_driver(driver, kind, params, dtype, promise=promise, weight_decay=0.1, **options)

    one, other = make(), make()
    for _ in range(5):
        one.step(draw())
    one.save(tmp_path / "saved")
    other.load(tmp_path / "saved")
    for _ in range(5):
        grads = draw()
        one.step(grads)
        other.step(grads)
    assert_equal(other.read(), one.read())
    assert other.list_state() == one.list_state()
    wanted = {"float64": "float64", "compact": "bfloat16"}.get(storage, "float32")
    assert {array.dtype for array in one.list_state()} == {wanted}
