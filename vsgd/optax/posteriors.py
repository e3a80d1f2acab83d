"""The posterior of the gradients of an optax transformation, from its state."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import vsgd.posterior
from vsgd import core
from vsgd.optax.numerics import arithmetic_dtype, check_gradient, join, parts
from vsgd.optax.state import RULES
from vsgd.posterior import NoiseScale, NoiseScales, Posterior


def posterior(
    opt_state: Any,
    *,
    prior_strength: jax.typing.ArrayLike = 1e-8,
    variance_ratio: jax.typing.ArrayLike = 3.0,
    prior_shape: jax.typing.ArrayLike | None = None,
) -> Any:
    """What is known of each gradient, from the state: the uncertainty of the gradient, not of the weights.

    Args:
        opt_state: the state of VSGD or Constant VSGD, or of a chain, mask or wrapper that holds it.
        prior_strength: as the optimizer was given it.
        variance_ratio: as Constant VSGD was given it; VSGD needs none here.
        prior_shape: as the optimizer was given it.

    Returns:
        A tree like the parameters', with a `vsgd.posterior.Posterior` in the place of each: arrays of its shape, float64 for
        float64 parameters, else float32. A parameter that is masked out keeps its `optax.MaskedNode`.

    Raises:
        ValueError: there is no state of VSGD, or a hyperparameter, given as a Python number, is out of its range.

    Example:
        >>> import jax.numpy as jnp
        >>> from vsgd.optax import posterior, vsgd
        >>> solver = vsgd(0.01)
        >>> params = {"weight": jnp.zeros(2)}
        >>> _, state = solver.update({"weight": jnp.array([1.0, -2.0])}, solver.init(params), params)
        >>> print(posterior(state)["weight"].mean.round(4))
        [ 0.0323 -0.0645]
    """
    scales = scales_of(prior_strength, variance_ratio, prior_shape)

    def of_leaf(rule: core.Rule, arrays: tuple[jax.Array, ...]) -> Posterior:
        known = [vsgd.posterior.posterior(part, scales(rule)) for part in parts_of(arrays)]
        return Posterior(*(join(*each) for each in zip(*known, strict=True)))

    return map_states(opt_state, of_leaf)


def noise_scale(
    opt_state: Any,
    *,
    batch_size: jax.typing.ArrayLike,
    prior_strength: jax.typing.ArrayLike = 1e-8,
    variance_ratio: jax.typing.ArrayLike = 3.0,
    prior_shape: jax.typing.ArrayLike | None = None,
) -> NoiseScales:
    """The gradient noise scale (arXiv 1812.06162), from the state; see `vsgd.posterior.noise_scale` for how.

    Args:
        opt_state: as for `posterior`.
        batch_size: how many examples a gradient is the mean of, on all devices and in accumulated steps together.
        prior_strength: as for `posterior`.
        variance_ratio: as for `posterior`.
        prior_shape: as for `posterior`.

    Returns:
        The estimates overall and, in `tensors`, in a tree like the parameters'.

    Raises:
        ValueError: there is no state of VSGD; or `batch_size` or a hyperparameter, given as a Python number, is out of its
            range.

    Example:
        >>> import jax.numpy as jnp
        >>> from vsgd.optax import noise_scale, vsgd
        >>> solver = vsgd(0.01)
        >>> params = jnp.zeros(2)
        >>> _, state = solver.update(jnp.array([1.0, -2.0]), solver.init(params), params)
        >>> bool(noise_scale(state, batch_size=32).overall.trace > 0)
        True
    """
    scales = scales_of(prior_strength, variance_ratio, prior_shape)
    core.validate(batch_size=batch_size)

    def of_leaf(rule: core.Rule, arrays: tuple[jax.Array, ...]) -> NoiseScale:
        known = (vsgd.posterior.posterior(part, scales(rule)) for part in parts_of(arrays))
        return functools.reduce(operator.add, (vsgd.posterior.noise_scale(part, batch_size, jnp.sum) for part in known))

    tensors = map_states(opt_state, of_leaf)
    each = [leaf for leaf in jax.tree.leaves(tensors, is_leaf=_is_scale) if _is_scale(leaf)]
    return NoiseScales(functools.reduce(operator.add, each, NoiseScale(jnp.zeros([]), jnp.zeros([]))), tensors)


def surprise(
    grads: optax.Updates,
    opt_state: Any,
    *,
    prior_strength: jax.typing.ArrayLike = 1e-8,
    variance_ratio: jax.typing.ArrayLike = 3.0,
    prior_shape: jax.typing.ArrayLike | None = None,
) -> Any:
    """How unexpected gradients are to the state before they update it, averaged over each parameter: see `vsgd.posterior`.

    Args:
        grads: gradients, as for `update`.
        opt_state: as for `posterior`.
        prior_strength: as for `posterior`.
        variance_ratio: as for `posterior`.
        prior_shape: as for `posterior`.

    Returns:
        A tree like the gradients' with the mean of each one's squared standardized innovations, 0-d arrays; near 1 where the
        model fits. Of a parameter that is masked out it has the `optax.MaskedNode`.

    Raises:
        ValueError: there is no state of VSGD, a hyperparameter, given as a Python number, is out of its range, or a gradient
            does not fit the state.
    """
    scales = scales_of(prior_strength, variance_ratio, prior_shape)

    def of_leaf(rule: core.Rule, arrays: tuple[jax.Array, ...]) -> Callable[[Any, Any], Any]:
        def mean(path: Any, grad: Any) -> jax.Array:
            check_gradient("grads", path, grad, arrays)
            pairs = zip(parts(jnp.asarray(grad, arithmetic_dtype(arrays[0].dtype))), parts_of(arrays), strict=True)
            return jnp.mean(jnp.stack([vsgd.posterior.surprise(part, state, scales(rule)).mean() for part, state in pairs]))

        return mean

    means = map_states(opt_state, of_leaf)

    def told(path: Any, grad: Any, mean: Any) -> Any:
        if isinstance(mean, optax.MaskedNode):
            return mean
        return None if grad is None else mean(path, grad)

    return jax.tree_util.tree_map_with_path(told, grads, means, is_leaf=lambda leaf: leaf is None)


def scales_of(prior_strength: Any, variance_ratio: Any, prior_shape: Any) -> Callable[[core.Rule], tuple[Any, Any]]:
    """`rule.variance_scales` of these hyperparameters."""
    given = {"prior_strength": prior_strength, "variance_ratio": variance_ratio, "prior_shape": prior_shape}
    core.validate(**given)

    def scales(rule: core.Rule) -> tuple[Any, Any]:
        return rule.variance_scales(rule.hyperparameters(**given))

    return scales


def _is_scale(node: Any) -> bool:
    return isinstance(node, NoiseScale)


def map_states(opt_state: Any, of_leaf: Callable[[core.Rule, tuple[jax.Array, ...]], Any]) -> Any:
    """A function of each parameter's state, in a tree like the parameters'."""
    kinds = tuple(RULES)
    states = [
        node for node in jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, kinds)) if isinstance(node, kinds)
    ]
    if not states:
        raise ValueError(f"opt_state is {type(opt_state).__name__} without state of VSGD, but must hold some")

    def chosen(*of_states: Any) -> Any:
        return next((each for each in of_states if isinstance(each, _Leaf)), of_states[0])

    def of_state(state: Any) -> Any:
        rule = RULES[type(state)]
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
