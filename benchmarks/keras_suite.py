"""Keras on this process's backend: an optimizer's `apply` alone, and a model's whole `train_on_batch`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops

import vsgd.keras
from benchmarks import machine
from benchmarks.shapes import Shape
from benchmarks.suite import LEARNING_RATE, WEIGHT_DECAY, Arm, Competitor, Suite

BACKEND = keras.backend.backend()
#: Samples of a train step: few, so that the optimizer takes a large share of it.
BATCH = 2
#: Height and width of the images that the first convolution receives.
SIDE = 8


class _KerasProblem:
    def __init__(self, shape: Shape, device: str) -> None:
        if device != "cpu":
            raise ValueError(f"device is {device!r}, but must be 'cpu': the Keras suites measure CPUs only")
        self.shape = shape

    def make_memory(self, size: int) -> machine.Memory:
        return machine.Memory(size)


class ApplyProblem(_KerasProblem):
    """Variables with gradients of normal noise."""

    def __init__(self, shape: Shape, device: str) -> None:
        super().__init__(shape, device)
        rng = np.random.default_rng(0)
        noise = [1e-2 * rng.standard_normal(tensor, np.float32) for tensor in shape.tensors]
        self.variables = [keras.Variable(np.ones(tensor, np.float32)) for tensor in shape.tensors]
        self.grads = [ops.convert_to_tensor(each) for each in noise]
        self.opposite = [ops.convert_to_tensor(-each) for each in noise]

    def flip_gradients(self) -> None:
        self.grads, self.opposite = self.opposite, self.grads


class TrainProblem(_KerasProblem):
    """A network with one layer for each tensor of the shape; each competitor's model shares the weights."""

    def __init__(self, shape: Shape, device: str) -> None:
        super().__init__(shape, device)
        first = shape.tensors[0]
        features = (SIDE, SIDE, first[-2]) if len(first) == 4 else (first[0],)
        self.inputs = keras.Input(features)
        self.outputs = self.inputs
        for number, tensor in enumerate(shape.tensors):
            self.outputs = Weighted(tensor, even=number % 2 == 0)(self.outputs)
        rng = np.random.default_rng(0)
        self.x = rng.standard_normal((BATCH, *features), np.float32)
        self.y = rng.standard_normal((BATCH, *self.outputs.shape[1:]), np.float32)

    def flip_gradients(self) -> None:
        """Do nothing: the gradients of a training change by themselves."""


class Weighted(keras.layers.Layer):
    """A layer with one tensor: by its rank a convolution, a matrix product, a scale or a bias."""

    def __init__(self, tensor: tuple[int, ...], even: bool) -> None:
        super().__init__()
        self.even = even
        self.tensor = tensor

    def build(self, input_shape: Any) -> None:
        scale = 1 / math.sqrt(math.prod(self.tensor[:-1]))
        if len(self.tensor) == 1:
            initializer = "ones" if self.even else "zeros"
        else:
            initializer = keras.initializers.RandomNormal(stddev=scale, seed=0)
        self.weight = self.add_weight(self.tensor, initializer=initializer)

    def call(self, x: Any) -> Any:
        if len(self.tensor) == 4:
            # Halve the image where the number of channels grows.
            stride = 2 if 3 < self.tensor[2] < self.tensor[3] else 1
            return ops.conv(ops.silu(x), self.weight, strides=stride, padding="same", data_format="channels_last")
        if len(self.tensor) == 2:
            if len(x.shape) == 4:
                x = ops.mean(x, axis=(1, 2))
            return ops.matmul(x, self.weight)
        return x * self.weight if self.even else x + self.weight


class _KerasArm:
    def __init__(self, optimizer: keras.optimizers.Optimizer) -> None:
        self.optimizer = optimizer

    def step(self, count: int) -> None:
        raise NotImplementedError

    def measure_state(self) -> list[tuple[int, int]]:
        # Without the iterations and the learning rate. Converted, since a variable may report another dtype than its value.
        return [_measure_array(ops.convert_to_tensor(variable)) for variable in self.optimizer.variables[2:]]

    def measure_transient_bytes(self) -> int | None:
        return machine.measure_peak_growth(lambda: self.step(1))


def _measure_array(array: Any) -> tuple[int, int]:
    elements = math.prod(array.shape)
    bits = int("".join(filter(str.isdigit, keras.backend.standardize_dtype(array.dtype))))
    return elements, elements * bits // 8


class ApplyArm(_KerasArm):
    """An optimizer's `apply`, compiled as the backend's trainer compiles a train step."""

    def __init__(self, problem: ApplyProblem, optimizer: keras.optimizers.Optimizer) -> None:
        super().__init__(optimizer)
        optimizer.build(problem.variables)
        self.problem = problem
        self.run = {"tensorflow": _compile_tensorflow_apply, "jax": _compile_jax_apply, "torch": _make_torch_apply}[BACKEND](
            problem, optimizer
        )

    def step(self, count: int) -> None:
        self.run(count)


def _compile_tensorflow_apply(problem: ApplyProblem, optimizer: Any) -> Callable[[int], None]:
    import tensorflow as tf

    apply = tf.function(lambda grads: optimizer.apply(grads, problem.variables))

    def run(count: int) -> None:
        for _ in range(count):
            apply(problem.grads)

    return run


def _compile_jax_apply(problem: ApplyProblem, optimizer: Any) -> Callable[[int], None]:
    import jax

    apply = jax.jit(optimizer.stateless_apply, donate_argnums=(0, 2))

    def run(count: int) -> None:
        params = [variable.value for variable in problem.variables]
        state = [variable.value for variable in optimizer.variables]
        for _ in range(count):
            params, state = apply(state, problem.grads, params)
        for variable, value in zip((*problem.variables, *optimizer.variables), (*params, *state), strict=True):
            variable.assign(value)
        jax.block_until_ready((params, state))

    return run


def _make_torch_apply(problem: ApplyProblem, optimizer: Any) -> Callable[[int], None]:
    def run(count: int) -> None:
        for _ in range(count):
            optimizer.apply(problem.grads, problem.variables)

    return run


class TrainArm(_KerasArm):
    """A model's `train_on_batch`."""

    def __init__(self, problem: TrainProblem, optimizer: keras.optimizers.Optimizer) -> None:
        super().__init__(optimizer)
        self.problem = problem
        self.model = keras.Model(problem.inputs, problem.outputs)
        self.model.compile(optimizer=optimizer, loss="mean_squared_error")

    def step(self, count: int) -> None:
        for _ in range(count):
            self.model.train_on_batch(self.problem.x, self.problem.y)
        if BACKEND == "jax":
            import jax

            jax.block_until_ready([each.value for each in (*self.model.trainable_variables, *self.optimizer.variables)])


_OPTIMIZERS: dict[str, Callable[[], Any]] = {
    "keras AdamW": lambda: keras.optimizers.AdamW(LEARNING_RATE, weight_decay=WEIGHT_DECAY),
    "keras Lion": lambda: keras.optimizers.Lion(LEARNING_RATE, weight_decay=WEIGHT_DECAY),
    "keras SGD(momentum=0.9)": lambda: keras.optimizers.SGD(LEARNING_RATE, momentum=0.9),
    "VSGD": lambda: vsgd.keras.VSGD(LEARNING_RATE, weight_decay=WEIGHT_DECAY),
    "VSGD, bfloat16 state": lambda: vsgd.keras.VSGD(LEARNING_RATE, weight_decay=WEIGHT_DECAY, state_dtype="bfloat16"),
    "ConstantVSGD": lambda: vsgd.keras.ConstantVSGD(LEARNING_RATE, weight_decay=WEIGHT_DECAY),
}


def _make_suite(title: str, problem: Any, arm: Callable[[Any, Any], Arm]) -> Suite:
    def competitor(optimizer: Callable[[], Any]) -> Competitor:
        return Competitor(lambda problem: arm(problem, optimizer()))

    return Suite(
        title=f"Keras on {BACKEND}, {title}",
        baselines=("keras AdamW",),
        competitors={name: competitor(optimizer) for name, optimizer in _OPTIMIZERS.items()},
        make_problem=problem,
        packages=("keras", BACKEND, f"{BACKEND}-cpu"),
        imports={"vsgd.keras": ("keras",)},
        memory="growth of the process's resident memory",
    )


SUITES = {
    "apply": _make_suite("`optimizer.apply` alone", ApplyProblem, ApplyArm),
    "train": _make_suite(f"a whole `train_on_batch` of {BATCH} samples", TrainProblem, TrainArm),
}
