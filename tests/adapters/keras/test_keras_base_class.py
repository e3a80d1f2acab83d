"""What Keras' base class does around the update, on the backend of this process, as `test_keras.py`: clipping, decay, averages,
accumulation, `stateless_apply`, and variables that are not stepped."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from drivers import assert_equal, run

keras = pytest.importorskip("keras")

from adapters.keras.keras_problems import (  # noqa: E402
    BACKEND,
    FLOAT32,
    GRADS,
    PARAMS,
    floatx,
    kinds,
    make,
    read,
    stateless,
    storages,
    tensors,
    to_numpy,
    variables_of,
)

import vsgd.numpy  # noqa: E402
from vsgd import core  # noqa: E402


def test_clipped_gradients_equal_those_clipped_by_hand() -> None:
    norms = [np.sqrt(sum((grad**2).sum() for grad in grads)) for grads in GRADS]
    clipped = [[grad * min(1, 0.7 / norm) for grad in grads] for grads, norm in zip(GRADS, norms, strict=True)]
    with floatx("float64"):
        # float32's rounding: TensorFlow and JAX take the norm's bound through float32.
        assert_equal(run("keras", "VSGD", PARAMS, GRADS, global_clipnorm=0.7), run("numpy", "VSGD", PARAMS, clipped), 1e-6)


@pytest.mark.parametrize("how", ["var_list", "var_names"])
def test_weight_decay_spares_what_is_excluded(how: str) -> None:
    with floatx("float64"):
        variables = variables_of(PARAMS)
        optimizer = make("VSGD", lr=0.125, weight_decay=0.25)
        optimizer.exclude_from_weight_decay(**{how: variables[1:] if how == "var_list" else ["p1"]})
        for grads in GRADS:
            optimizer.apply(tensors(grads), variables)
        decayed, _ = run("numpy", "VSGD", PARAMS, GRADS, lr=0.125, weight_decay=0.25)
        _, spared = run("numpy", "VSGD", PARAMS, GRADS, lr=0.125)
        assert_equal(read(optimizer, variables), [decayed, spared], 1e-12)


def test_ema_overwrites_the_variables_with_their_average() -> None:
    with floatx("float64"):
        variables = variables_of(PARAMS[:1])
        optimizer = make("VSGD", lr=0.125, use_ema=True, ema_momentum=0.75, ema_overwrite_frequency=3)
        array = PARAMS[0].copy()
        reference = vsgd.numpy.VSGD([array], lr=0.125)
        average = array
        for t, grads in enumerate(GRADS):
            optimizer.apply(tensors(grads[:1]), variables)
            reference.step(grads[:1])
            # At the first step the average is the variable.
            average = 0.75 * average + 0.25 * array if t else array.copy()
            if t % 3 == 2:
                array[...] = average
            np.testing.assert_allclose(to_numpy(variables[0]), array, rtol=1e-12)
        np.testing.assert_allclose(read(optimizer, variables)[0]["b_g"], reference.state[0]["b_g"], rtol=1e-12)


@kinds
def test_accumulated_gradients_equal_their_mean(kind: str) -> None:
    means = [[np.mean(grads, axis=0) for grads in zip(*GRADS[i : i + 4], strict=True)] for i in range(0, 12, 4)]
    with floatx("float64"):
        for t in range(1, 13):
            accumulated = run("keras", kind, PARAMS, GRADS[:t], gradient_accumulation_steps=4)
            assert_equal(accumulated, run("numpy", kind, PARAMS, means[: t // 4]), 1e-12)


@pytest.mark.filterwarnings("ignore:Gradients do not exist:UserWarning")
def test_a_variable_without_gradient_is_untouched_and_counts_the_common_steps() -> None:
    silent = [[grads[0], None] for grads in GRADS[:3]]
    with floatx("float64"):
        _, start = run("numpy", "VSGD", PARAMS, [])
        _, untouched = run("keras", "VSGD", PARAMS, silent)
        assert_equal([untouched], [start])
        _, late = run("keras", "VSGD", PARAMS, [*silent, GRADS[3]])
    reference = vsgd.numpy.VSGD([PARAMS[1].copy()])
    reference.state[0]["step"] = 3
    reference.step(GRADS[3][1:])
    state = {name: reference.state[0][name] for name in core.VSGD.state_names}
    assert_equal([late], [{"param": reference.params[0], **state}], 1e-12)


def test_a_variable_that_its_gradient_overwrites_has_no_state() -> None:
    plain, scale = variables_of([np.ones(2, np.float32), np.ones((), np.float32)])
    scale.overwrite_with_gradient = True
    optimizer, grads = make("VSGD"), tensors([np.ones(2, np.float32), np.asarray(5.0, np.float32)])
    optimizer.apply(grads, [plain, scale])
    assert to_numpy(scale) == 5
    assert [each.name for each in optimizer.variables] == ["iteration", "learning_rate", "p0_mu_g", "p0_b_g", "p0_b_ghat"]
    (expected,) = run("numpy", "VSGD", [np.ones(2)], [[np.ones(2)]])
    np.testing.assert_allclose(to_numpy(plain), expected["param"], rtol=1e-6)
    assert optimizer.noise_scale(batch_size=8).tensors[1] is None
    surprise, none = optimizer.surprise(grads, [plain, scale])
    assert to_numpy(surprise) > 0
    assert none is None
    with pytest.raises(ValueError, match="variable is p1, which its gradient overwrites, but must be one that is stepped"):
        optimizer.posterior(scale)
    alone = make("VSGD")
    alone.build([scale])
    with pytest.raises(ValueError, match="the optimizer has no variable that is stepped, but must have one"):
        alone.noise_scale(batch_size=8)


@pytest.mark.skipif(BACKEND == "tensorflow", reason="Keras has no stateless_apply on TensorFlow")
@storages
@kinds
def test_stateless_apply_equals_apply_and_assigns_nothing(kind: str, options: dict[str, Any]) -> None:
    variables = variables_of(FLOAT32)
    optimizer = make(kind, **options)
    optimizer.build(variables)
    before = [to_numpy(each) for each in [*variables, *optimizer.variables]]
    values = [keras.ops.convert_to_tensor(each) for each in [*optimizer.variables, *variables]]
    optimizer.stateless_apply(values[:-2], values[-2:], values[-2:])
    for each, value in zip([*variables, *optimizer.variables], before, strict=True):
        np.testing.assert_array_equal(to_numpy(each), value)
    apply, grads = stateless(optimizer, variables), [[grad.astype(np.float32) for grad in grads] for grads in GRADS]
    for each in grads:
        apply(tensors(each))
    expected = run("keras", kind, FLOAT32, grads, **options)
    assert_equal(read(optimizer, variables), expected)
