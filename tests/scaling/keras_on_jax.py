"""What the process with Keras on jax and several devices says of layouts and of communication."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jax
import keras
from adapters.keras.keras_problems import stateless
from scaling.keras_distributed import loaded, scope, trained
from scaling.keras_network import BATCH, X, Y, apart, arrays, compiled, gradients, network, noise_scale, optimizer_of

Layouts = dict[str, tuple[tuple[int, ...], int]]


def layouts(how: str, path: str | None = None) -> Layouts:
    """For each variable of a trained or loaded model: its shape on one device, and how much of its state is laid alike."""
    with scope(how):
        model = trained("VSGD", how)[0] if path is None else loaded(path)
    return {_last(each.path): (_here(each), _alike(each, model.optimizer)) for each in model.trainable_variables}


def _last(path: str) -> str:
    return "/".join(path.split("/")[-2:])


def _here(variable: Any) -> tuple[int, ...]:
    shape: tuple[int, ...] = variable.value.addressable_shards[0].data.shape
    return shape


def _alike(variable: Any, optimizer: Any) -> int:
    states = [each.value for each in optimizer.variables if f"{variable.path.replace('/', '_')}_" in each.name]
    return sum(state.sharding.is_equivalent_to(variable.value.sharding, state.ndim) for state in states)


def equal_gradients(case: str, how: str) -> tuple[float, float, list[str]]:
    """How far the optimizer strayed by equal gradients, and its noise scale; and how its step communicates."""
    with scope(how):
        many, communication = _stepped(case)
    one, _ = _stepped(case)
    return apart(arrays(many), arrays(one)), apart(noise_scale(many), noise_scale(one)), communication


def _stepped(case: str) -> tuple[Any, list[str]]:
    model = compiled(case)
    variables, optimizer = model.trainable_variables, model.optimizer
    optimizer.build(variables)
    texts: set[str] = set()
    apply = stateless(optimizer, variables, lambda function: _telling(function, texts))
    for grads in gradients():
        like = zip(grads, variables, strict=True)
        apply([jax.device_put(grad.astype(each.value.dtype), each.value.sharding) for grad, each in like])
    return model, [name for text in texts for name in _collectives(text)]


def _telling(function: Callable[..., Any], texts: set[str]) -> Callable[..., Any]:
    """A function, compiled; what it was compiled to is added to the texts."""
    jitted = jax.jit(function)

    def call(*args: Any) -> Any:
        step = jitted.lower(*args).compile()
        texts.add(step.as_text())
        return step(*args)

    return call


def _collectives(text: str) -> list[str]:
    return sorted(re.findall(r" (all-[a-z-]+|reduce-scatter|collective-[a-z-]+)\(", text))


def communication(how: str) -> tuple[list[str], list[str]]:
    """The collectives of a whole training step by VSGD, and of one by Keras' SGD."""
    with scope(how):
        return _of_a_step(optimizer_of("VSGD")), _of_a_step(keras.optimizers.SGD(0.05))


def _of_a_step(optimizer: Any) -> list[str]:
    model = network("VSGD")
    optimizer.build(model.trainable_variables)
    layout = keras.distribution.distribution().get_data_layout((BATCH, 1))
    batch = [keras.distribution.distribute_tensor(each[:BATCH], layout) for each in (X, Y)]

    def loss_of(variables: Any, others: Any, x: Any, y: Any) -> Any:
        outputs, _ = model.stateless_call(variables, others, x)
        return keras.ops.mean(keras.ops.square(outputs - y))

    def step(variables: Any, others: Any, state: Any, x: Any, y: Any) -> Any:
        return optimizer.stateless_apply(state, jax.grad(loss_of)(variables, others, x, y), variables)

    groups = (model.trainable_variables, model.non_trainable_variables, optimizer.variables)
    values = [[each.value for each in group] for group in groups]
    return _collectives(jax.jit(step).lower(*values, *batch).compile().as_text())
