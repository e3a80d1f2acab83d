"""Test state and parameters in bfloat16, rounded stochastically, in every adapter that supports them."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from drivers import DRIVERS, assert_equal, make_driver
from drivers.emulation import BAD_STORAGE, emulate_step, round_all, round_to_nearest, steps_apart, words
from drivers.rules import RULES

import vsgd.numpy
from vsgd import core

drivers = pytest.mark.parametrize("driver", DRIVERS)
kinds = pytest.mark.parametrize("kind", RULES)
SHAPES = ((), (5,), (6, 7, 50), (0,))
COMPACT: dict[str, Any] = {"state_dtype": "bfloat16", "stochastic_rounding": True}


def draw(seed: int, shapes: tuple[tuple[int, ...], ...] = SHAPES) -> list[np.ndarray]:
    """Return random arrays whose values bfloat16 represents, so that all dtypes start from the same values."""
    rng = np.random.default_rng(seed)
    return [round_to_nearest(np.asarray(rng.standard_normal(shape), np.float32)) for shape in shapes]


def share_rounded_otherwise(driver: str, kind: str, dtype: str, seed: int) -> float:
    """Return the share of the rounded values that differ from the definition."""
    # The decay is so strong that rounding it separately would show.
    rule, lr, decay = RULES[kind], 0.0625, 3.1
    made = make_driver(driver, kind, draw(0), dtype, promise="bfloat16", lr=lr, weight_decay=decay, seed=seed, **COMPACT)
    initial = [round_to_nearest(np.float32(value)) for value in rule.initial_state(rule.hyperparameters())]
    states = [dict(zip(rule.state_names, (np.full(shape, value) for value in initial), strict=True)) for shape in SHAPES]
    before = [{"param": param, **state} for param, state in zip(draw(0), states, strict=True)]
    differ = total = 0
    for step in range(1, 11):
        grads = draw(step)
        made.step(grads)
        after = made.read()
        # Each step starts from the driver's own values, so that a difference does not grow.
        for number, (grad, old, new) in enumerate(zip(grads, before, after, strict=True)):
            word = words(seed, number, step, grad.shape)
            given = [np.asarray(old[name], np.float32) for name in rule.state_names]
            grad = grad.astype(np.float16).astype(np.float32) if dtype == "float16" else grad
            direction, state = emulate_step(rule, step, grad, given, word)
            old_param = np.asarray(old["param"], np.float16 if dtype == "float16" else np.float32).astype(np.float32)
            param = core.descend(old_param, direction, np.float32(lr), np.float32(1 - lr * decay))
            pairs = [(new[name], value) for name, value in zip(rule.state_names, state, strict=True)]
            if dtype == "bfloat16":
                pairs.append((new["param"], *round_all([param], word, len(state))))
            else:
                # Keras rounds weight decay and step separately.
                rtol, atol = {"float32": (1e-6, 1e-7), "float16": (2**-9, 1e-4)}[dtype]
                np.testing.assert_allclose(new["param"].astype(np.float32), param, rtol=rtol, atol=atol)
            for ours, theirs in pairs:
                apart = steps_apart(np.ascontiguousarray(ours, np.float32), np.asarray(theirs, np.float32))
                # The last digits of a value near zero come from the subtraction.
                assert not np.any((apart > 1) & (np.abs(theirs) > 1e-4))
                differ, total = differ + np.count_nonzero(apart), total + apart.size
        before = after
    assert total > 40_000
    assert {each.dtype for each in made.list_state()} == {"bfloat16"}
    return differ / total


@pytest.mark.parametrize("seed", [0, -7, 2**40 + 3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@kinds
@drivers
def test_each_step_rounds_as_the_definition_says(driver: str, kind: str, dtype: str, seed: int) -> None:
    # Compilers round the last digit of float32 differently, which decides about one of ten thousand roundings.
    assert share_rounded_otherwise(driver, kind, dtype, seed) < 1e-3


@pytest.mark.parametrize("dtype", ["float64", "complex64"])
@kinds
@drivers
def test_wide_and_complex_parameters_keep_their_precision(driver: str, kind: str, dtype: str) -> None:
    params = [np.linspace(1, 2, 50).astype(dtype)]
    ends = []
    for options in ({}, COMPACT):
        made = make_driver(driver, kind, params, promise="bfloat16", lr=0.125, weight_decay=0.125, **options)
        for _ in range(3):
            made.step(params)
        ends.append(made)
    assert ends[0].list_state() == ends[1].list_state()
    assert_equal(ends[1].read(), ends[0].read())


@pytest.mark.parametrize(("kind", "size"), [("VSGD", 6), ("ConstantVSGD", 4)])
@drivers
def test_bytes_of_state(driver: str, kind: str, size: int) -> None:
    params = draw(0, ((10, 10),))
    made = make_driver(driver, kind, params, promise="bfloat16", state_dtype="bfloat16")
    made.step(params)
    assert [each.dtype for each in made.list_state()] == ["bfloat16"] * (size // 2)
    assert sum(each.nbytes for each in made.list_state()) == 100 * size


# Forgetting is 1 / t here, so rounding to the nearest would keep a rate unchanged from step 512 on.
DROP, STEPS = 600, 1800


def noisy_gradients() -> list[np.ndarray]:
    table = np.random.default_rng(0).standard_normal((97, 256)).astype(np.float32)
    return [table[step % 97] * np.float32(1.0 if step < DROP else 0.1) for step in range(STEPS)]


@pytest.mark.parametrize(("kind", "rate", "kappa"), [("VSGD", "b_ghat", "kappa2"), ("ConstantVSGD", "b", "kappa")])
@drivers
def test_the_noise_estimate_follows_a_drop_of_the_noise(driver: str, kind: str, rate: str, kappa: str) -> None:
    options = {"lr": 0.0, kappa: 1.0}
    if "bfloat16" in DRIVERS[driver].lacks:
        pytest.skip(DRIVERS[driver].lacks["bfloat16"])
    zeros = [np.zeros(256, np.float32)]
    made = make_driver(driver, kind, zeros, promise="many steps", state_dtype="bfloat16", **options)
    reference, nearest = (getattr(vsgd.numpy, kind)(list(map(np.copy, zeros)), **options) for _ in range(2))
    for grad in noisy_gradients():
        made.step([grad])
        reference.step([grad])
        nearest.step([grad])
        for name in RULES[kind].state_names:
            nearest.state[0][name] = round_to_nearest(nearest.state[0][name])
    expected = reference.state[0][rate].mean()
    assert made.read()[0][rate].mean() == pytest.approx(expected, rel=0.02)
    assert nearest.state[0][rate].mean() > 1.5 * expected  # it froze


@drivers
def test_a_decay_that_bfloat16_cannot_hold_is_not_lost(driver: str) -> None:
    start = round_to_nearest(np.linspace(1.0, 1.9, 4096, dtype=np.float32))
    ends = []
    for rounds in (False, True):
        made = make_driver(
            driver, "VSGD", [start], "bfloat16", promise="bfloat16", lr=0.01, weight_decay=0.01, stochastic_rounding=rounds
        )
        for _ in range(100):
            made.step([np.zeros_like(start)])  # the gradient moves nothing
        ends.append((made.read()[0]["param"].astype(float) / start).mean())
    assert ends[0] == 1  # rounding to the nearest undoes each decay
    # Each of the 4096 averaged elements is off by about 0.03, from at most 100 roundings of 2**-7.
    assert ends[1] == pytest.approx((1 - 1e-4) ** 100, abs=0.002)


@pytest.mark.parametrize(("options", "message"), BAD_STORAGE)
@kinds
@drivers
def test_a_bad_argument_is_named(driver: str, kind: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        make_driver(driver, kind, draw(0), promise="bfloat16", **options)
