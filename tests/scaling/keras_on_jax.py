"""Check layouts and communication in the process with Keras on jax and several devices."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jax
from adapters.keras.keras_problems import stateless
from scaling.keras_distributed import loaded, scope
from scaling.keras_network import compiled, fit, gradients, stepped_apart


def sharded(how: str, path: str | None = None) -> list[str]:
    """Return the sharded variables of a trained or loaded model, and assert that the state is sharded like them."""
    with scope(how):
        model = fit(compiled("VSGD") if path is None else loaded(path))
    for variable, states in zip(model.trainable_variables, model.optimizer._states, strict=True):
        for state in states:
            assert state.value.sharding.is_equivalent_to(variable.value.sharding, state.value.ndim)
    parts = [each for each in model.trainable_variables if not each.value.sharding.is_fully_replicated]
    return ["/".join(each.path.split("/")[-2:]) for each in parts]


def equal_gradients(case: str, how: str) -> tuple[float, float]:
    """Return the deviations of optimizer and noise scale with equal gradients; assert that the step communicates nothing."""
    with scope(how):
        many = _stepped(case)
    return stepped_apart(many, _stepped(case))


def _stepped(case: str) -> Any:
    model = compiled(case)
    variables, optimizer = model.trainable_variables, model.optimizer
    optimizer.build(variables)
    apply = stateless(optimizer, variables, _jitted)
    for grads in gradients(model):
        like = zip(grads, variables, strict=True)
        apply([jax.device_put(grad.astype(each.value.dtype), each.value.sharding) for grad, each in like])
    return model


def _jitted(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function, and assert that it contains no collective."""
    jitted = jax.jit(function)

    def call(*args: Any) -> Any:
        step = jitted.lower(*args).compile()
        assert not re.findall(r" (all-[a-z-]+|reduce-scatter|collective-[a-z-]+)\(", step.as_text())
        return step(*args)

    return call
