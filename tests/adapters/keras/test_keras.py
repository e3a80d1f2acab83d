"""Test what no driver covers in the Keras adapter, and what Keras' base class does around the update.

The base class does clipping, decay, averages, accumulation, `stateless_apply`, and variables that are not stepped. All tests
run on the backend of this process. `test_keras_backends.py` runs this file on the other backends, and `matrix/` tests the
adapter's trajectories.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from drivers import assert_equal, make_driver, run
from drivers.trajectories import assert_follows, golden, stack

keras = pytest.importorskip("keras")

from adapters.keras.keras_problems import (  # noqa: E402
    BACKEND,
    COMPACT,
    FLOAT32,
    GRADS,
    PARAMS,
    allow_float64,
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

tensorflow_only = pytest.mark.skipif(BACKEND != "tensorflow", reason="TensorFlow's own")


def assert_follows_the_authors(name: str, dtype: str, tolerance: float, engine: str = "keras", **rate: Any) -> None:
    """Assert that the authors' gradients, at their rates by default, give the authors' trajectory."""
    case = golden(name)
    # As float64: the base class takes a Python float through float32 on TensorFlow.
    hyper = {name: np.float64(value) for name, value in case.hyper.items()}
    rate = rate or {"rates": case.lr}
    driver = make_driver(engine, "VSGD", [param.astype(dtype) for param in case.params0], **rate, **hyper)
    steps = []
    for t in range(len(case.lr)):
        driver.step([grad[t].astype(dtype) for grad in case.grads])
        steps.append(driver.read())
    assert {array.dtype for each in steps[-1] for array in each.values()} == {np.dtype(dtype)}
    assert_follows(stack(steps), case.after, tolerance)


@pytest.mark.parametrize("case", ["defaults", "weight_decay"])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-10), ("float32", 1e-4)])
def test_it_follows_the_authors_code_compiled(case: str, dtype: str, tolerance: float) -> None:
    with floatx(dtype):
        assert_follows_the_authors(case, dtype, tolerance, "keras-jit")


def test_schedules_and_callables_equal_numbers() -> None:
    with floatx("float64"):
        # As float64: the schedule takes Python floats through float32 on TensorFlow.
        schedule = keras.optimizers.schedules.ExponentialDecay(np.float64(0.1), decay_steps=1, decay_rate=np.float64(0.9))
        assert_follows_the_authors("schedule", "float64", 1e-10, lr=schedule)
        rates = iter(golden("schedule").lr)
        assert_follows_the_authors("schedule", "float64", 1e-10, lr=lambda: float(next(rates)))


def test_float64_variables_keep_their_precision_where_float32_is_keras_default() -> None:
    assert keras.config.floatx() == "float32"
    # Use a callable, because Keras stores a number in its default dtype.
    assert_follows_the_authors("defaults", "float64", 1e-10, lr=lambda: 0.1)


@tensorflow_only
def test_tf_variables_in_a_gradient_tape_loop() -> None:
    import tensorflow as tf

    for wrap in (lambda function: function, tf.function):
        variables = [tf.Variable(param, name=name) for name, param in zip("ab", PARAMS, strict=True)]
        optimizer = make("VSGD", lr=lambda: 0.125)

        @wrap
        def step(optimizer: Any = optimizer, variables: list[Any] = variables) -> None:
            with tf.GradientTape() as tape:
                loss = tf.reduce_sum(variables[0] ** 2) + tf.reduce_sum(tf.cos(variables[1]))
            optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables, strict=True))

        arrays = [param.copy() for param in PARAMS]
        reference = vsgd.numpy.VSGD(arrays, lr=0.125)
        for _ in range(10):
            step()
            reference.step([2 * arrays[0], -np.sin(arrays[1])])
        for each, array in zip(variables, arrays, strict=True):
            np.testing.assert_allclose(each.numpy(), array, rtol=1e-12)
        assert {each.dtype for each in optimizer.variables[2:]} == {"float64"}


@tensorflow_only
@storages
def test_sparse_gradients_equal_dense_ones(options: dict[str, Any]) -> None:
    import tensorflow as tf

    # Rows without a gradient follow their state as with gradients of zero.
    values = np.random.default_rng(3).standard_normal((3, 3, 3)).astype(np.float32)
    grads = [
        tf.IndexedSlices(tf.constant(value), tf.constant(rows), tf.constant([6, 3]))
        for value, rows in zip(values, ([0, 2, 2], [5, 0, 0], [2, 2, 2]), strict=True)
    ]
    for wrap in (lambda function: function, tf.function):
        runs = []
        for convert in (lambda grad: grad, tf.convert_to_tensor):
            (variable,) = variables_of([np.ones((6, 3), np.float32)])
            optimizer = make("VSGD", **options)
            optimizer.build([variable])
            apply = wrap(optimizer.apply)
            for grad in grads:
                apply([convert(grad)])
            runs.append(read(optimizer, [variable]))
        assert_equal(*runs, rtol=0 if options else 1e-6)


def test_gradients_may_be_lists_or_sparse() -> None:
    dense = np.zeros((3, 2), np.float32)
    dense[1] = 1, 2
    forms: list[Any] = [dense, dense.tolist()]
    if BACKEND == "jax":
        from jax.experimental import sparse

        forms.append(sparse.BCOO.fromdense(dense))
    runs = []
    for form in forms:
        variables = variables_of([np.ones((3, 2), np.float32)])
        optimizer = make("VSGD")
        for _ in range(2):
            optimizer.apply([form], variables)
        runs.append(read(optimizer, variables))
    for other in runs[1:]:
        assert_equal(other, runs[0], 1e-6)


def test_a_variable_of_integers_is_refused() -> None:
    variable = keras.Variable(np.ones(3), dtype="int32", trainable=False, name="p0")
    optimizer = make("VSGD")
    with pytest.raises(ValueError, match="variable p0 is of int32, but must be of floating or complex numbers"):
        optimizer.build([variable])
    assert not optimizer.built


@storages
@kinds
def test_the_arithmetic_is_in_the_dtype_of_the_state_whatever_the_gradients(kind: str, options: dict[str, Any]) -> None:
    runs = []
    with allow_float64():
        for dtype in ("float64", "float32"):
            variables, optimizer = variables_of(FLOAT32), make(kind, **options)
            for grads in GRADS:
                optimizer.apply(tensors([grad.astype(np.float32).astype(dtype) for grad in grads]), variables)
            runs.append(read(optimizer, variables))
    assert_equal(*runs)


def test_rounded_variables_may_be_spared_weight_decay() -> None:
    start = np.linspace(1.0, 1.9, 4096, dtype=np.float32)
    variables = [keras.Variable(start, dtype="bfloat16", name=f"p{i}") for i in range(2)]
    before = [to_numpy(each).astype(float) for each in variables]
    optimizer = make("VSGD", lr=0.01, weight_decay=0.01, **COMPACT)
    optimizer.exclude_from_weight_decay(var_names=["p1"])
    for _ in range(100):
        optimizer.apply([keras.ops.zeros(4096, "bfloat16")] * 2, variables)  # the gradient moves nothing
    decayed, spared = (to_numpy(each).astype(float) / old for each, old in zip(variables, before, strict=True))
    # Each of the 4096 averaged elements is off by about 0.03, from at most 100 roundings of 2**-7.
    assert decayed.mean() == pytest.approx((1 - 1e-4) ** 100, abs=0.002)
    assert (spared == 1).all()


def powers_in_a_step(count: int) -> int:
    """Return how many powers an `apply` on this many variables computes, in the graph or the jaxpr."""
    variables = variables_of([np.ones(2, np.float32)] * count)
    optimizer = make("VSGD")
    optimizer.build(variables)
    grads = tensors([np.ones(2, np.float32)] * count)
    if BACKEND == "tensorflow":
        import tensorflow as tf

        operations = tf.function(optimizer.apply).get_concrete_function(grads).graph.get_operations()
        # The update of a variable is one compiled call.
        assert sum("_XlaMustCompile" in each.node_def.attr for each in operations) == count
        assert not [each for each in operations if each.type in ("RealDiv", "Sqrt") and each.outputs[0].shape.rank]
        return sum(each.type == "Pow" for each in operations)
    import jax

    values = [[each.value for each in some] for some in (optimizer.variables, variables)]
    return str(jax.make_jaxpr(optimizer.stateless_apply)(values[0], grads, values[1])).count(" pow ")


@pytest.mark.skipif(BACKEND == "torch", reason="on torch they are Python numbers")
def test_the_coefficients_of_a_step_are_computed_once_for_all_variables() -> None:
    assert powers_in_a_step(1) == powers_in_a_step(5) == 2  # of kappa1 and kappa2


@pytest.mark.skipif(BACKEND != "torch", reason="torch's own")
def test_on_torch_our_engines_step_all_variables_together(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("numba")
    from vsgd.backends.torch import fused_cpu

    sizes = []

    class Batch(fused_cpu.Batch):
        def __init__(self, leaves: Any) -> None:
            sizes.append(len(leaves))
            super().__init__(leaves)

    monkeypatch.setattr(fused_cpu, "Batch", Batch)
    variables = variables_of([np.ones(shape, np.float32) for shape in [(2, 3), (4,), (), (0,)]])
    make("VSGD").apply(tensors([np.ones(each.shape, np.float32) for each in variables]), variables)
    assert sizes == [4]


# What Keras' base class does around the update.


def test_clipped_gradients_equal_those_clipped_by_hand() -> None:
    norms = [np.sqrt(sum((grad**2).sum() for grad in grads)) for grads in GRADS]
    clipped = [[grad * min(1, 0.7 / norm) for grad in grads] for grads, norm in zip(GRADS, norms, strict=True)]
    with floatx("float64"):
        # The tolerance is float32's rounding: TensorFlow and JAX take the norm's bound through float32.
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


@pytest.mark.parametrize("options", [{}, {"prior_strength": "auto", "weight_decay": 0.1}], ids=["number", "auto"])
@kinds
def test_accumulated_gradients_equal_their_mean(kind: str, options: dict[str, Any]) -> None:
    means = [[np.mean(grads, axis=0) for grads in zip(*GRADS[i : i + 4], strict=True)] for i in range(0, 12, 4)]
    with floatx("float64"):
        for t in range(1, 13):
            accumulated = run("keras", kind, PARAMS, GRADS[:t], gradient_accumulation_steps=4, **options)
            assert_equal(accumulated, run("numpy", kind, PARAMS, means[: t // 4], **options), 1e-12)


@kinds
def test_the_unscaled_gradient_calibrates(kind: str) -> None:
    optimizer = make(kind, prior_strength="auto")
    scaling = keras.optimizers.LossScaleOptimizer(optimizer, initial_scale=2.0**10)
    variables = variables_of(FLOAT32)
    scaling.build(variables)
    # Keras cannot assign in a branch on JAX.
    apply = stateless(scaling, variables) if BACKEND == "jax" else lambda grads: scaling.apply(grads, variables)
    grads = [[grad.astype(np.float32) for grad in each] for each in GRADS]
    apply(tensors([grad * np.float32(np.inf) for grad in grads[0]]))  # skipped, and halves the scale
    for each in grads:
        apply(tensors([grad * np.float32(2.0**9) for grad in each]))
    assert_equal(read(optimizer, variables), run("keras", kind, FLOAT32, grads, prior_strength="auto"), 1e-6)


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
@pytest.mark.parametrize("options", [{}, COMPACT, {"prior_strength": "auto"}], ids=["float32", "compact", "auto"])
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
