"""The Keras adapter's numbers, on the backend of this process; `test_keras_backends.py` runs this file on the others, and
`matrix/` has its trajectories."""

from __future__ import annotations

import dataclasses
import inspect
import json
from typing import Any

import numpy as np
import pytest
from trajectories import Golden, assert_follows, golden, stack

keras = pytest.importorskip("keras")

from keras_problems import (  # noqa: E402
    BACKEND,
    KINDS,
    allow_float64,
    floatx,
    jitted_apply,
    keras_engine,
    make,
    read,
    stateless,
    tensors,
    to_numpy,
    variables_of,
)
from test_extremes import GRADIENTS, assert_sound  # noqa: E402

import vsgd.numpy  # noqa: E402
from vsgd import core  # noqa: E402
from vsgd.keras import VSGD, ConstantVSGD  # noqa: E402

TOLERANCE = {"float64": 1e-10, "float32": 1e-4}
kinds = pytest.mark.parametrize("kind", KINDS)
dtypes = pytest.mark.parametrize("dtype", TOLERANCE)


def follow(case: Golden, dtype: str, learning_rate: Any = None, jitted: bool = False) -> list[dict[str, np.ndarray]]:
    hyper = dict(case.hyper)
    if "weight_decay" in hyper:
        # As float64: the base class takes a Python float through float32 on TensorFlow.
        hyper["weight_decay"] = np.float64(hyper["weight_decay"])
    variables = variables_of([param.astype(dtype) for param in case.params0])
    optimizer = make("VSGD", lr=learning_rate or 1.0, **hyper)
    optimizer.build(variables)
    apply = jitted_apply(optimizer, variables) if jitted else optimizer.apply
    steps = []
    for t, lr in enumerate(case.lr):
        if learning_rate is None:
            optimizer.learning_rate = float(lr)
        apply(tensors([grad[t].astype(dtype) for grad in case.grads]))
        steps.append(read(optimizer, variables))
    return stack(steps)


@pytest.mark.parametrize("case", ["defaults", "weight_decay"])
@dtypes
def test_it_follows_the_authors_code_compiled(case: str, dtype: str) -> None:
    with floatx(dtype):
        run = follow(golden(case), dtype, jitted=True)
    assert_follows(run, golden(case).after, TOLERANCE[dtype])


def test_schedules_and_callables_equal_numbers() -> None:
    case = golden("schedule")
    with floatx("float64"):
        # As float64: the schedule takes Python floats through float32 on TensorFlow.
        schedule = keras.optimizers.schedules.ExponentialDecay(np.float64(0.1), decay_steps=1, decay_rate=np.float64(0.9))
        assert_follows(follow(case, "float64", schedule), case.after, 1e-10)
        rates = iter(case.lr)
        assert_follows(follow(case, "float64", lambda: float(next(rates))), case.after, 1e-10)


def test_float64_variables_keep_their_precision_where_float32_is_keras_default() -> None:
    # With a callable, for Keras holds a number in its default dtype.
    case = golden("defaults")
    assert keras.config.floatx() == "float32"
    with allow_float64():
        run = follow(case, "float64", lambda: 0.1)
    assert run[0]["mu_g"].dtype == np.float64
    assert_follows(run, case.after, 1e-10)


SHAPES = ((), (3,), (2, 1, 3), (0,))
rng = np.random.default_rng(3)
PARAMS = [rng.standard_normal(shape) for shape in SHAPES]
GRADS = [[np.asarray(rng.standard_normal(shape)) for shape in SHAPES] for _ in range(12)]
HYPER: dict[str, dict[str, float]] = {
    "VSGD": {"lr": 0.125, "variance_ratio": 8.0, "prior_strength": 1e-4, "kappa1": 0.7, "kappa2": 0.8, "eps": 1e-3},
    "ConstantVSGD": {"lr": 0.125, "variance_ratio": 8.0, "prior_strength": 1e-4, "kappa": 0.7, "eps": 1e-3},
}


def numpy_run(kind: str, params: list[np.ndarray], grads: list[Any], **hyper: Any) -> list[dict[str, np.ndarray]]:
    arrays = [np.array(param, np.float64) for param in params]
    optimizer = getattr(vsgd.numpy, kind)(arrays, **hyper)
    for each in grads:
        optimizer.step([None if grad is None else np.asarray(grad, np.float64) for grad in each])
    pairs = zip(arrays, optimizer.state, strict=True)
    return [{"param": array, **{name: state[name] for name in KINDS[kind].state_names}} for array, state in pairs]


def assert_equal_runs(ours: list[dict[str, np.ndarray]], theirs: list[dict[str, np.ndarray]], rtol: float) -> None:
    for one, other in zip(ours, theirs, strict=True):
        assert one.keys() == other.keys()
        for name, value in other.items():
            np.testing.assert_allclose(one[name], value, rtol=rtol, atol=rtol, err_msg=name)


def as_dtype(arrays: list[Any], dtype: str) -> list[Any]:
    return [None if array is None else np.asarray(array, dtype) for array in arrays]


@kinds
@dtypes
def test_variables_of_many_shapes_in_one_apply_equal_numpy(kind: str, dtype: str) -> None:
    with floatx(dtype):
        step, state = keras_engine(kind, as_dtype(PARAMS, dtype), **HYPER[kind])
        for grads in GRADS:
            step(as_dtype(grads, dtype))
        assert_equal_runs(state(), numpy_run(kind, PARAMS, GRADS, **HYPER[kind]), {"float64": 1e-12, "float32": 1e-5}[dtype])


@kinds
def test_the_defaults_are_the_other_adapters(kind: str) -> None:
    names = {"learning_rate": "lr", "epsilon": "eps"}
    ours = {
        names.get(name, name): parameter.default
        for name, parameter in inspect.signature({"VSGD": VSGD, "ConstantVSGD": ConstantVSGD}[kind]).parameters.items()
    }
    theirs = inspect.signature(getattr(vsgd.numpy, kind)).parameters
    for name, parameter in theirs.items():
        if name not in ("params", "weight_decay"):
            assert ours[name] == parameter.default
    assert ours["weight_decay"] is None


@kinds
@pytest.mark.parametrize("gradients", GRADIENTS)
def test_state_stays_finite_and_positive_in_float32(kind: str, gradients: str) -> None:
    step, state = keras_engine(kind, [np.ones(9, np.float32)])
    for grad in GRADIENTS[gradients].astype(np.float32):
        step([grad])
    assert_sound(state(), kind)


@kinds
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_shows_in_its_own_element_only(kind: str, bad: float) -> None:
    start = [np.ones(40, np.float32), np.ones(3, np.float32)]
    step, state = keras_engine(kind, start)
    clean_step, clean_state = keras_engine(kind, start)
    for t in range(3):
        grad, other = rng.standard_normal(40).astype(np.float32), rng.standard_normal(3).astype(np.float32)
        clean_step([grad, other])
        step([np.where((np.arange(40) == 17) & (t == 1), np.float32(bad), grad), other])
    (hit, spared), (clean, clean_spared) = state(), clean_state()
    for name, value in hit.items():
        np.testing.assert_array_equal(np.delete(value, 17), np.delete(clean[name], 17))
        np.testing.assert_array_equal(spared[name], clean_spared[name])
    assert not np.isfinite(hit["param"][17])


@kinds
@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_half_precision_variables_have_float32_state(kind: str, name: str) -> None:
    half = np.dtype(getattr(pytest.importorskip("ml_dtypes"), name, name))
    params = [np.asarray([1.0, -2.0, 0.5, 3.0], half)]
    variables = variables_of(params)
    optimizer = make(kind, lr=0.02)
    arrays = [params[0].astype(np.float32)]
    reference = getattr(vsgd.numpy, kind)(arrays, lr=0.02)
    for _ in range(20):
        # Small, so that the rates are less than float16 can hold.
        grad = (1e-4 * rng.standard_normal(4)).astype(half)
        optimizer.apply(tensors([grad]), variables)
        reference.step([grad.astype(np.float32)])
        arrays[0][...] = arrays[0].astype(half).astype(np.float32)
    (ours,) = read(optimizer, variables)
    assert variables[0].dtype == name
    for state_name in KINDS[kind].state_names:
        assert ours[state_name].dtype == np.float32
        np.testing.assert_allclose(ours[state_name], reference.state[0][state_name], rtol=1e-5)
    np.testing.assert_array_equal(ours["param"].astype(np.float32), arrays[0])


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
        step, state = keras_engine("VSGD", params, **clip)
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
        step, state = keras_engine(kind, params, gradient_accumulation_steps=4)
        for t, grads in enumerate(all_grads, start=1):
            step(grads)
            assert_equal_runs(state(), numpy_run(kind, params, means[: t // 4]), 1e-12)


@kinds
def test_scaled_losses_change_no_bit(kind: str) -> None:
    step, state = keras_engine(kind, as_dtype(PARAMS[1:], "float32"), loss_scale_factor=1024.0)
    plain_step, plain_state = keras_engine(kind, as_dtype(PARAMS[1:], "float32"))
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
        step, state = keras_engine("VSGD", params)
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


@kinds
def test_stateless_apply_equals_apply(kind: str) -> None:
    params = as_dtype(PARAMS[1:3], "float32")
    step, state = keras_engine(kind, params)
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


def continued(kind: str, restore: Any) -> None:
    """Train, restore into a new optimizer, train both on: the same bits."""
    params = as_dtype(PARAMS[1:3], "float32")
    variables = variables_of(params)
    optimizer = make(kind, lr=0.125)
    for grads in GRADS[:6]:
        optimizer.apply(tensors(as_dtype(grads[1:3], "float32")), variables)
    new_variables = variables_of([to_numpy(each) for each in variables])
    new = make(kind, lr=0.5)
    new.build(new_variables)
    restore(optimizer, new)
    for grads in GRADS[6:]:
        for each, its in ((optimizer, variables), (new, new_variables)):
            each.apply(tensors(as_dtype(grads[1:3], "float32")), its)
    for ours, theirs in zip(read(new, new_variables), read(optimizer, variables), strict=True):
        for name in theirs:
            np.testing.assert_array_equal(ours[name], theirs[name])
    assert to_numpy(new.iterations) == 12
    assert to_numpy(new.learning_rate) == 0.125


@kinds
def test_set_weights_resumes_bit_by_bit(kind: str) -> None:
    continued(kind, lambda old, new: new.set_weights([to_numpy(each) for each in old.variables]))


@kinds
def test_own_variables_resume_bit_by_bit(kind: str) -> None:
    def through_a_store(old: Any, new: Any) -> None:
        store: dict[str, np.ndarray] = {}
        old.save_own_variables(store)
        new.load_own_variables(store)

    continued(kind, through_a_store)


def test_tf_variables_in_a_gradient_tape_loop() -> None:
    if BACKEND != "tensorflow":
        pytest.skip("TensorFlow's own")
    import tensorflow as tf

    for wrap in (lambda function: function, tf.function):
        variables = [tf.Variable(PARAMS[1], name="a"), tf.Variable(PARAMS[2])]
        optimizer = make("VSGD", lr=lambda: 0.125)

        @wrap
        def step(optimizer: Any = optimizer, variables: list[Any] = variables) -> None:
            with tf.GradientTape() as tape:
                loss = tf.reduce_sum(variables[0] ** 2) + tf.reduce_sum(tf.cos(variables[1]))
            optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables, strict=True))

        arrays = [PARAMS[1].copy(), PARAMS[2].copy()]
        reference = vsgd.numpy.VSGD(arrays, lr=0.125)
        for _ in range(10):
            step()
            reference.step([2 * arrays[0], -np.sin(arrays[1])])
        for each, array in zip(variables, arrays, strict=True):
            np.testing.assert_allclose(each.numpy(), array, rtol=1e-12)
        assert {each.dtype for each in optimizer.variables[2:]} == {"float64"}


def test_sparse_gradients_equal_dense_ones() -> None:
    if BACKEND != "tensorflow":
        pytest.skip("only TensorFlow has sparse gradients of embeddings; test_keras_training.py trains one on each backend")
    import tensorflow as tf

    table = rng.standard_normal((6, 3)).astype(np.float32)
    rows = [[0, 2, 2], [5, 0, 0], [2, 2, 2]]
    values = rng.standard_normal((3, 3, 3)).astype(np.float32)
    for compiled in (False, True):
        (variable,) = variables_of([table])
        optimizer = make("VSGD")
        optimizer.build([variable])
        apply = tf.function(optimizer.apply) if compiled else optimizer.apply
        dense = []
        for row, value in zip(rows, values, strict=True):
            apply([tf.IndexedSlices(tf.constant(value), tf.constant(row), tf.constant([6, 3]))])
            dense.append(np.zeros((6, 3)))
            np.add.at(dense[-1], row, value)
        assert_equal_runs(read(optimizer, [variable]), numpy_run("VSGD", [table], [[grad] for grad in dense]), 1e-5)


def test_the_rule_sees_sparse_gradients_dense() -> None:
    # Today's rules would make them so by themselves, by what they do first.
    if BACKEND != "tensorflow":
        pytest.skip("only TensorFlow has sparse gradients of embeddings")
    import tensorflow as tf

    seen = []

    def make_update(xp: Any) -> Any:
        update = core.VSGD.make_update(xp)
        return lambda grad, state, c: seen.append(grad) or update(grad, state, c)

    class Watched(VSGD):
        _kind = dataclasses.replace(core.VSGD, make_update=make_update)

    variables = variables_of([np.ones((6, 3), np.float32)])
    tf.config.run_functions_eagerly(True)  # for the values
    try:
        Watched().apply([tf.IndexedSlices(tf.ones((2, 3)), tf.constant([4, 4]), tf.constant([6, 3]))], variables)
    finally:
        tf.config.run_functions_eagerly(False)
    assert isinstance(seen[0], tf.Tensor)
    np.testing.assert_array_equal(to_numpy(seen[0]), np.where(np.arange(6) == 4, 2, 0)[:, None] * np.ones(3))


@kinds
def test_the_arithmetic_is_in_the_dtype_of_the_state_whatever_the_gradients(kind: str) -> None:
    with allow_float64():
        step, state = keras_engine(kind, as_dtype(PARAMS[1:], "float32"))
        wide_step, wide_state = keras_engine(kind, as_dtype(PARAMS[1:], "float32"))
        for grads in GRADS:
            step(as_dtype(grads[1:], "float32"))
            wide_step(as_dtype(as_dtype(grads[1:], "float32"), "float64"))
        for ours, theirs in zip(wide_state(), state(), strict=True):
            for name in theirs:
                np.testing.assert_array_equal(ours[name], theirs[name])


OPTIONS: list[dict[str, Any]] = [
    {},
    {"learning_rate": 0.25, "variance_ratio": 7.0, "prior_strength": 1e-6, "epsilon": 1e-6, "weight_decay": 0.125},
    {"clipnorm": 1.0, "use_ema": True, "ema_momentum": 0.5, "ema_overwrite_frequency": 3, "name": "mine"},
    {"global_clipnorm": 1.0, "loss_scale_factor": 8.0, "gradient_accumulation_steps": 2},
    {"clipvalue": 1.0, "learning_rate": "schedule"},
]


def with_schedule(options: dict[str, Any]) -> dict[str, Any]:
    if options.get("learning_rate") != "schedule":
        return options
    return {**options, "learning_rate": keras.optimizers.schedules.CosineDecay(0.1, 10)}


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("cls", [VSGD, ConstantVSGD])
def test_keras_own_serialization_test(cls: type, options: dict[str, Any]) -> None:
    testing = pytest.importorskip("keras.src.testing")
    optimizer = cls(**with_schedule(options))
    revived = testing.TestCase().run_class_serialization_test(optimizer)
    config = optimizer.get_config()
    assert set(config) == set(inspect.signature(cls).parameters) - {"kwargs"}
    assert revived.get_config() == json.loads(json.dumps(config))
    for name, value in options.items():
        if name != "learning_rate":
            assert config[name] == value
            assert getattr(revived, name) == value


@pytest.mark.parametrize("cls", [VSGD, ConstantVSGD])
def test_it_is_found_by_its_registered_name(cls: type) -> None:
    registered = f"vsgd>{cls.__name__}"
    assert keras.saving.get_registered_name(cls) == registered
    assert type(keras.optimizers.get(registered)) is cls
    optimizer = keras.optimizers.get({"class_name": registered, "config": {"variance_ratio": 5.0}})
    assert type(optimizer) is cls
    assert optimizer.variance_ratio == 5.0
    revived = keras.optimizers.deserialize(keras.optimizers.serialize(optimizer))
    assert type(revived) is cls
    assert revived.get_config() == optimizer.get_config()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"learning_rate": -0.5}, "Invalid learning rate: -0.5 (learning_rate must be a finite number >= 0)"),
        ({"epsilon": float("nan")}, "Invalid epsilon value: nan (epsilon must be a finite number >= 0)"),
        ({"weight_decay": -1.0}, "Invalid weight_decay value: -1.0 (weight_decay must be a finite number >= 0)"),
        ({"variance_ratio": 0}, "Invalid variance_ratio value: 0 (variance_ratio must be a finite number > 0)"),
        ({"prior_strength": 0.0}, "Invalid prior_strength value: 0.0 (prior_strength must be a finite number >= 1e-30)"),
        ({"kappa1": 0.5}, "Invalid kappa1 value: 0.5 (kappa1 must be a number in (0.5, 1])"),
        ({"kappa2": "1"}, "Invalid kappa2 value: '1' (kappa2 must be a number in (0.5, 1])"),
        ({"beta_1": 0.9}, "Argument(s) not recognized: {'beta_1': 0.9}"),
    ],
)
def test_a_bad_argument_is_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        VSGD(**arguments)
    assert str(error.value) == message


def test_constant_vsgd_checks_its_own_kappa() -> None:
    with pytest.raises(ValueError, match=r"Invalid kappa value: 2.0 \(kappa must be a number in \(0.5, 1\]\)"):
        ConstantVSGD(kappa=2.0)


@kinds
@pytest.mark.parametrize("dtype", ["complex64", "complex128"])
def test_a_complex_variable_is_two_real_ones(kind: str, dtype: str) -> None:
    real = {"complex64": "float32", "complex128": "float64"}[dtype]
    with floatx(real):
        param, *grads = (rng.standard_normal((2, 3)).astype(real) for _ in range(6))
        (variable,) = variables = variables_of([param[0] + 1j * param[1]])
        assert variable.dtype == dtype
        optimizer = make(kind, lr=0.125)
        step, state = keras_engine(kind, list(param), lr=0.125)
        for grad in grads:
            optimizer.apply(tensors([grad[0] + 1j * grad[1]]), variables)
            step(list(grad))
    (ours,), parts = read(optimizer, variables), state()
    for name, value in ours.items():
        assert value.dtype == dtype
        np.testing.assert_allclose(value.real, parts[0][name], rtol={"float32": 1e-6, "float64": 1e-14}[real], err_msg=name)
        np.testing.assert_allclose(value.imag, parts[1][name], rtol={"float32": 1e-6, "float64": 1e-14}[real], err_msg=name)


def test_on_tensorflow_the_update_of_a_variable_is_one_compiled_call() -> None:
    if BACKEND != "tensorflow":
        pytest.skip("TensorFlow's own")
    import tensorflow as tf

    variables = variables_of([np.ones(2, np.float32)] * 5)
    optimizer = make("VSGD")
    optimizer.build(variables)
    graph = tf.function(optimizer.apply).get_concrete_function(tensors([np.ones(2, np.float32)] * 5)).graph
    operations = graph.get_operations()
    compiled = [each for each in operations if "_XlaMustCompile" in each.node_def.attr]
    assert len(compiled) == 5
    assert not [each for each in operations if each.type in ("RealDiv", "Sqrt") and each.outputs[0].shape.rank]


def powers_in_a_step(count: int) -> int:
    """How many powers an `apply` on so many variables computes: in the graph, the jaxpr or torch's calls."""
    variables = variables_of([np.ones(2, np.float32)] * count)
    optimizer = make("VSGD")
    optimizer.build(variables)
    grads = tensors([np.ones(2, np.float32)] * count)
    if BACKEND == "tensorflow":
        import tensorflow as tf

        graph = tf.function(optimizer.apply).get_concrete_function(grads).graph
        return sum(operation.type == "Pow" for operation in graph.get_operations())
    if BACKEND == "jax":
        import jax

        values = ([each.value for each in some] for some in (optimizer.variables, variables))
        optimizer_values, variable_values = values
        jaxpr = jax.make_jaxpr(optimizer.stateless_apply)(optimizer_values, grads, variable_values)
        return str(jaxpr).count(" pow ")
    from torch.utils._python_dispatch import TorchDispatchMode

    class Powers(TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.seen += "pow" in func.name()
            return func(*args, **(kwargs or {}))

    with Powers() as powers:
        optimizer.apply(grads)
    return powers.seen


def test_the_coefficients_of_a_step_are_computed_once_for_all_variables() -> None:
    expected = {"tensorflow": 2, "jax": 2, "torch": 0}[BACKEND]  # of kappa1 and kappa2; on torch they are Python numbers
    assert powers_in_a_step(1) == powers_in_a_step(5) == expected


def test_on_torch_our_engines_step_all_variables_together(monkeypatch: pytest.MonkeyPatch) -> None:
    if BACKEND != "torch":
        pytest.skip("torch's own")
    pytest.importorskip("numba")
    from vsgd.backends import torch_fused

    sizes = []

    class Batch(torch_fused.Batch):
        def __init__(self, leaves: Any, steps: Any) -> None:
            sizes.append(len(leaves))
            super().__init__(leaves, steps)

    monkeypatch.setattr(torch_fused, "Batch", Batch)
    variables = variables_of([np.ones(shape, np.float32) for shape in [(2, 3), (4,), (), (0,)]])
    make("VSGD").apply(tensors([np.ones(each.shape, np.float32) for each in variables]), variables)
    assert sizes == [4]
