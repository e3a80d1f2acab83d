"""What Keras' base class does around the update, on the backend of this process, as `test_keras.py`: clipping, decay, averages,
accumulation, loss scaling, `stateless_apply`."""

from __future__ import annotations

import numpy as np
import pytest
from drivers import start

keras = pytest.importorskip("keras")

from adapters.keras.keras_problems import (  # noqa: E402
    BACKEND,
    GRADS,
    PARAMS,
    as_dtype,
    assert_equal_runs,
    floatx,
    make,
    numpy_run,
    read,
    stateless,
    tensors,
    to_numpy,
    variables_of,
)
from drivers.rules import RULES  # noqa: E402

import vsgd.numpy  # noqa: E402
from vsgd import core  # noqa: E402

kinds = pytest.mark.parametrize("kind", RULES)


@pytest.mark.parametrize("clip", [{"clipnorm": 0.5}, {"clipvalue": 0.3}, {"global_clipnorm": 0.7}], ids=str)
def test_clipped_gradients_equal_those_clipped_by_hand(clip: dict[str, float]) -> None:
    ((name, bound),) = clip.items()
    params, all_grads = PARAMS[1:3], [grads[1:3] for grads in GRADS]

    def clipped(grads: list[np.ndarray]) -> list[np.ndarray]:
        norms = [np.sqrt((grad**2).sum()) for grad in grads]
        if name == "clipvalue":
            return [np.clip(grad, -bound, bound) for grad in grads]
        if name == "global_clipnorm":
            norms = [np.sqrt(sum(norm**2 for norm in norms))] * len(norms)
        return [grad * min(1, bound / norm) for grad, norm in zip(grads, norms, strict=True)]

    with floatx("float64"):
        step, state = start("keras", "VSGD", params, **clip)
        for grads in all_grads:
            step(grads)
        expected = numpy_run("VSGD", params, [clipped(grads) for grads in all_grads])
        # float32's rounding: TensorFlow and JAX take the norm's bound through float32.
        assert_equal_runs(state(), expected, 1e-6)


@pytest.mark.parametrize("how", ["var_list", "var_names"])
def test_weight_decay_spares_what_is_excluded(how: str) -> None:
    params, all_grads = PARAMS[1:3], [grads[1:3] for grads in GRADS]
    with floatx("float64"):
        variables = variables_of(params)
        optimizer = make("VSGD", lr=0.125, weight_decay=0.25)
        optimizer.exclude_from_weight_decay(**{how: variables[1:] if how == "var_list" else ["p1"]})
        for grads in all_grads:
            optimizer.apply(tensors(grads), variables)
        decayed, _ = numpy_run("VSGD", params, all_grads, lr=0.125, weight_decay=0.25)
        _, spared = numpy_run("VSGD", params, all_grads, lr=0.125)
        assert_equal_runs(read(optimizer, variables), [decayed, spared], 1e-12)


def test_ema_overwrites_the_variables_with_their_average() -> None:
    with floatx("float64"):
        variables = variables_of(PARAMS[1:2])
        optimizer = make("VSGD", lr=0.125, use_ema=True, ema_momentum=0.75, ema_overwrite_frequency=3)
        arrays = [PARAMS[1].copy()]
        reference = vsgd.numpy.VSGD(arrays, lr=0.125)
        average = np.zeros_like(arrays[0])
        for t, grads in enumerate(GRADS, start=1):
            optimizer.apply(tensors(grads[1:2]), variables)
            reference.step(grads[1:2])
            # At the first step the average is the variable.
            momentum = 0.75 if t > 1 else 0.0
            average = momentum * average + (1 - momentum) * arrays[0]
            if t % 3 == 0:
                arrays[0][...] = average
            np.testing.assert_allclose(to_numpy(variables[0]), arrays[0], rtol=1e-12)
        assert_equal_runs(read(optimizer, variables)[:1], [{"param": arrays[0], **named_state(reference)}], 1e-12)


def named_state(reference: vsgd.numpy.VSGD) -> dict[str, np.ndarray]:
    return {name: reference.state[0][name] for name in core.VSGD.state_names}


def test_finalizing_leaves_the_average_in_the_variables() -> None:
    variables = variables_of([np.ones(2, np.float32)])
    optimizer = make("VSGD", use_ema=True, ema_momentum=0.5)
    seen = []
    for _ in range(3):
        optimizer.apply(tensors([np.ones(2, np.float32)]), variables)
        seen.append(to_numpy(variables[0]))
    optimizer.finalize_variable_values(variables)
    np.testing.assert_allclose(to_numpy(variables[0]), 0.25 * seen[0] + 0.25 * seen[1] + 0.5 * seen[2], rtol=1e-6)


@kinds
def test_accumulated_gradients_equal_their_mean(kind: str) -> None:
    params, all_grads = PARAMS[1:3], [grads[1:3] for grads in GRADS]
    means = [[np.mean(grads, axis=0) for grads in zip(*all_grads[i : i + 4], strict=True)] for i in range(0, 12, 4)]
    with floatx("float64"):
        step, state = start("keras", kind, params, gradient_accumulation_steps=4)
        for t, grads in enumerate(all_grads, start=1):
            step(grads)
            assert_equal_runs(state(), numpy_run(kind, params, means[: t // 4]), 1e-12)


@kinds
def test_scaled_losses_change_no_bit(kind: str) -> None:
    step, state = start("keras", kind, as_dtype(PARAMS[1:], "float32"), loss_scale_factor=1024.0)
    plain_step, plain_state = start("keras", kind, as_dtype(PARAMS[1:], "float32"))
    for grads in GRADS:
        plain_step(as_dtype(grads[1:], "float32"))
        step([grad * np.float32(1024) for grad in as_dtype(grads[1:], "float32")])
    for ours, plain in zip(state(), plain_state(), strict=True):
        for name in plain:
            np.testing.assert_array_equal(ours[name], plain[name])


@pytest.mark.filterwarnings("ignore:Gradients do not exist:UserWarning")
def test_a_variable_without_gradient_is_untouched_and_counts_the_common_steps() -> None:
    params = PARAMS[1:3]
    with floatx("float64"):
        step, state = start("keras", "VSGD", params)
        before = None
        for grads in GRADS[:3]:
            step([grads[1], None])
            _, silent = state()
            before = before or silent
            for name, value in silent.items():
                np.testing.assert_array_equal(value, before[name])
        np.testing.assert_array_equal(before["param"], params[1])
        step(GRADS[3][1:3])
        _, late = state()
    hyper = core.Hyperparameters()
    expected_state = tuple(np.full(params[1].shape, value) for value in core.VSGD.initial_state(hyper))
    update = core.VSGD.make_update(np)
    direction, expected_state = update(GRADS[3][2], expected_state, core.VSGD.coefficients(4, hyper))
    expected = {
        "param": params[1] - 0.01 * direction,
        **dict(zip(core.VSGD.state_names, expected_state, strict=True)),
    }
    assert_equal_runs([late], [expected], 1e-12)


def test_a_variable_that_its_gradient_overwrites_has_no_state() -> None:
    plain, scale = variables_of([np.ones(2, np.float32), np.ones((), np.float32)])
    scale.overwrite_with_gradient = True
    optimizer = make("VSGD")
    optimizer.apply(tensors([np.ones(2, np.float32), np.asarray(5.0, np.float32)]), [plain, scale])
    assert to_numpy(scale) == 5
    assert [each.name for each in optimizer.variables] == ["iteration", "learning_rate", "p0_mu_g", "p0_b_g", "p0_b_ghat"]
    np.testing.assert_allclose(to_numpy(plain), numpy_run("VSGD", [np.ones(2)], [[np.ones(2)]])[0]["param"], rtol=1e-6)
    assert optimizer.noise_scale(batch_size=8).tensors[1] is None
    surprise, none = optimizer.surprise(tensors([np.ones(2, np.float32), np.asarray(5.0, np.float32)]), [plain, scale])
    assert to_numpy(surprise) > 0
    assert none is None
    with pytest.raises(ValueError, match="variable is p1, which its gradient overwrites, but must be one that is stepped"):
        optimizer.posterior(scale)


def test_without_a_variable_that_is_stepped_there_is_no_noise_scale() -> None:
    (scale,) = variables_of([np.ones((), np.float32)])
    scale.overwrite_with_gradient = True
    optimizer = make("VSGD")
    optimizer.build([scale])
    with pytest.raises(ValueError, match="the optimizer has no variable that is stepped, but must have one"):
        optimizer.noise_scale(batch_size=8)


@kinds
def test_stateless_apply_equals_apply(kind: str) -> None:
    params = as_dtype(PARAMS[1:3], "float32")
    step, state = start("keras", kind, params)
    variables = variables_of(params)
    optimizer = make(kind)
    optimizer.build(variables)
    if BACKEND == "tensorflow":
        with pytest.raises(ValueError, match="stateless_apply is not supported"):
            optimizer.stateless_apply(optimizer.variables, variables, variables)
        return
    stateless_step = stateless(optimizer, variables)
    for grads in GRADS:
        step(as_dtype(grads[1:3], "float32"))
        stateless_step(tensors(as_dtype(grads[1:3], "float32")))
    for ours, theirs in zip(read(optimizer, variables), state(), strict=True):
        for name in theirs:
            np.testing.assert_array_equal(ours[name], theirs[name])


def test_stateless_apply_assigns_nothing() -> None:
    if BACKEND == "tensorflow":
        pytest.skip("Keras has no stateless_apply on TensorFlow")
    variables = variables_of(as_dtype(PARAMS[1:3], "float32"))
    optimizer = make("VSGD")
    optimizer.build(variables)
    before = [to_numpy(each) for each in [*variables, *optimizer.variables]]
    values = [keras.ops.convert_to_tensor(each) for each in [*optimizer.variables, *variables]]
    optimizer.stateless_apply(values[:-2], values[-2:], values[-2:])
    for each, value in zip([*variables, *optimizer.variables], before, strict=True):
        np.testing.assert_array_equal(to_numpy(each), value)
