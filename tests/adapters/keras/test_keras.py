"""The Keras adapter's numbers, on the backend of this process; `test_keras_backends.py` runs this file on the others, and
`matrix/` has its trajectories."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import numpy as np
import pytest
from drivers import start
from drivers.trajectories import Golden, assert_follows, golden, stack

keras = pytest.importorskip("keras")

from adapters.keras.keras_problems import (  # noqa: E402
    BACKEND,
    GRADS,
    PARAMS,
    allow_float64,
    as_dtype,
    assert_equal_runs,
    floatx,
    jitted_apply,
    make,
    numpy_run,
    read,
    tensors,
    to_numpy,
    variables_of,
)
from drivers.rules import RULES  # noqa: E402

import vsgd.numpy  # noqa: E402
from vsgd import core  # noqa: E402
from vsgd.keras import VSGD, ConstantVSGD  # noqa: E402

TOLERANCE = {"float64": 1e-10, "float32": 1e-4}
kinds = pytest.mark.parametrize("kind", RULES)
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


rng = np.random.default_rng(3)


HYPER: dict[str, dict[str, float]] = {
    "VSGD": {"lr": 0.125, "variance_ratio": 8.0, "prior_strength": 1e-4, "kappa1": 0.7, "kappa2": 0.8, "eps": 1e-3},
    "ConstantVSGD": {"lr": 0.125, "variance_ratio": 8.0, "prior_strength": 1e-4, "kappa": 0.7, "eps": 1e-3},
}


@kinds
@dtypes
def test_variables_of_many_shapes_in_one_apply_equal_numpy(kind: str, dtype: str) -> None:
    with floatx(dtype):
        step, state = start("keras", kind, as_dtype(PARAMS, dtype), **HYPER[kind])
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


def test_gradients_may_be_lists_or_sparse() -> None:
    dense = np.zeros((3, 2), np.float32)
    dense[1] = 1, 2
    forms: list[Any] = [dense, dense.tolist()]
    if BACKEND == "tensorflow":
        import tensorflow as tf

        forms.append(tf.IndexedSlices(tf.constant(dense[1:2]), tf.constant([1]), (3, 2)))
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
    for run in runs[1:]:
        assert_equal_runs(run, runs[0], 1e-6)


def test_a_variable_of_integers_is_refused() -> None:
    variable = keras.Variable(np.ones(3), dtype="int32", trainable=False, name="p0")
    optimizer = make("VSGD")
    with pytest.raises(ValueError, match="variable p0 is of int32, but must be of floating or complex numbers"):
        optimizer.build([variable])
    assert not optimizer.built


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
        _plain_rule = dataclasses.replace(core.VSGD, make_update=make_update)

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
        step, state = start("keras", kind, as_dtype(PARAMS[1:], "float32"))
        wide_step, wide_state = start("keras", kind, as_dtype(PARAMS[1:], "float32"))
        for grads in GRADS:
            step(as_dtype(grads[1:], "float32"))
            wide_step(as_dtype(as_dtype(grads[1:], "float32"), "float64"))
        for ours, theirs in zip(wide_state(), state(), strict=True):
            for name in theirs:
                np.testing.assert_array_equal(ours[name], theirs[name])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"learning_rate": -0.5}, "Invalid learning rate: -0.5 (learning_rate must be a finite number >= 0)"),
        ({"epsilon": float("nan")}, "Invalid epsilon value: nan (epsilon must be a finite number >= 0)"),
        ({"weight_decay": -1.0}, "Invalid weight_decay value: -1.0 (weight_decay must be a finite number >= 0)"),
        ({"variance_ratio": 0}, "Invalid variance_ratio value: 0 (variance_ratio must be a number in [1e-15, 1e15])"),
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
