"""The posterior of the gradients of an optax transformation, from its state."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from vsgd import core
from vsgd.optax_numbers import arithmetic_dtype, join, parts
from vsgd.posterior import NoiseScale, NoiseScales, Posterior, noise_scale, posterior, surprise

#: By the type of its state.
Rules = Mapping[type[Any], core.Rule]
Scales = Callable[[core.Rule], tuple[Any, Any]]


def posteriors(rules: Rules, opt_state: Any, scales: Scales) -> Any:
    """A tree with the posterior of each parameter."""

    def of_leaf(rule: core.Rule, arrays: tuple[jax.Array, ...]) -> Posterior:
        known = [posterior(part, scales(rule)) for part in parts_of(arrays)]
        return Posterior(*(join(*each) for each in zip(*known, strict=True)))

    return map_states(rules, opt_state, of_leaf)


def noise_scales(rules: Rules, opt_state: Any, scales: Scales, batch_size: Any) -> NoiseScales:
    """The noise scales of all parameters."""
    core.validate(batch_size=batch_size)

    def of_leaf(rule: core.Rule, arrays: tuple[jax.Array, ...]) -> NoiseScale:
        known = (posterior(part, scales(rule)) for part in parts_of(arrays))
        return functools.reduce(operator.add, (noise_scale(part, batch_size, jnp.sum) for part in known))

    tensors = map_states(rules, opt_state, of_leaf)
    each = [leaf for leaf in jax.tree.leaves(tensors, is_leaf=_is_scale) if _is_scale(leaf)]
    return NoiseScales(functools.reduce(operator.add, each, NoiseScale(jnp.zeros([]), jnp.zeros([]))), tensors)


def surprises(rules: Rules, grads: Any, opt_state: Any, scales: Scales) -> Any:
    """A tree with the mean surprise of each gradient."""

    def of_leaf(rule: core.Rule, arrays: tuple[jax.Array, ...]) -> Callable[[Any], Any]:
        def mean(grad: Any) -> jax.Array:
            pairs = zip(parts(jnp.asarray(grad, arithmetic_dtype(arrays[0].dtype))), parts_of(arrays), strict=True)
            return jnp.mean(jnp.stack([surprise(part, state, scales(rule)).mean() for part, state in pairs]))

        return mean

    means = map_states(rules, opt_state, of_leaf)

    def told(grad: Any, mean: Any) -> Any:
        if isinstance(mean, optax.MaskedNode):
            return mean
        return None if grad is None else mean(grad)

    return jax.tree.map(told, grads, means, is_leaf=lambda leaf: leaf is None)


def _is_scale(node: Any) -> bool:
    return isinstance(node, NoiseScale)


def map_states(rules: Rules, opt_state: Any, of_leaf: Callable[[core.Rule, tuple[jax.Array, ...]], Any]) -> Any:
    """A function of each parameter's state, in a tree like the parameters'."""
    kinds = tuple(rules)
    states = [
        node for node in jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, kinds)) if isinstance(node, kinds)
    ]
    if not states:
        raise ValueError(f"opt_state is {type(opt_state).__name__} without state of VSGD, but must hold some")

    def chosen(*of_states: Any) -> Any:
        return next((each for each in of_states if isinstance(each, _Leaf)), of_states[0])

    def of_state(state: Any) -> Any:
        rule = rules[type(state)]
        return jax.tree.map(lambda *arrays: _Leaf(of_leaf(rule, arrays)), *state[1:])

    def is_leaf(node: Any) -> bool:
        return isinstance(node, (_Leaf, optax.MaskedNode))

    merged = jax.tree.map(chosen, *map(of_state, states), is_leaf=is_leaf)
    return jax.tree.map(lambda node: node.value if isinstance(node, _Leaf) else node, merged, is_leaf=is_leaf)


class _Leaf:
    """What a parameter's state was made into, no tree of its own."""

    def __init__(self, value: Any) -> None:
        self.value = value


def parts_of(arrays: tuple[jax.Array, ...]) -> list[tuple[jax.Array, ...]]:
    """The state of the real arrays: a complex one is two."""
    return list(zip(*(parts(array.astype(arithmetic_dtype(array.dtype))) for array in arrays), strict=True))
