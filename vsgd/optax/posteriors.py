"""The posterior of the gradients of an optax transformation, from its state or from a larger state that contains it."""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from vsgd import observer
from vsgd.optax.numerics import check_gradient, choose_arithmetic_dtype, join_complex, split_complex
from vsgd.optax.observer import ObserveGradientsState, get_filter_arrays, select_watched
from vsgd.optax.state import RULES, get_arrays
from vsgd.posterior import (
    NoiseScale,
    NoiseScales,
    Posterior,
    Scales,
    compute_posterior,
    compute_surprise,
    estimate_noise_scale,
)
from vsgd.validation import validate_numbers


def posterior(opt_state: Any) -> Any:
    """Return the posterior of each gradient: the uncertainty of the gradient, not of the weights.

    Args:
        opt_state: the state of VSGD, Constant VSGD or `observe_gradients`, or of a chain, mask or wrapper that contains it.
            If a chain contains an observer and VSGD, the result is the observer's.

    Returns:
        A tree shaped like the parameters, with a `vsgd.posterior.Posterior` for each: arrays of the parameter's shape, float64
        for float64 parameters, else float32 (of an observer in the shape of its state, see `ObserveGradientsState`). A
        parameter that is masked out keeps its `optax.MaskedNode`.

    Raises:
        ValueError: there is no state of VSGD or `observe_gradients`.

    Example:
        >>> import jax.numpy as jnp
        >>> from vsgd.optax import posterior, vsgd
        >>> solver = vsgd(0.01)
        >>> params = {"weight": jnp.zeros(2)}
        >>> _, state = solver.update({"weight": jnp.array([1.0, -2.0])}, solver.init(params), params)
        >>> print(posterior(state)["weight"].mean.round(4))
        [ 0.0323 -0.0645]
    """
    if find_observers(opt_state):
        return map_observed(opt_state, lambda watched: observer.compute_posterior(watched.state))

    def describe(param_state: ParamState) -> Posterior:
        parts = [compute_posterior(state, param_state.scales) for state in param_state.get_real_states()]
        return Posterior(*(join_complex(*fields) for fields in zip(*parts, strict=True)))

    return map_states(opt_state, describe)


def noise_scale(opt_state: Any, *, batch_size: jax.typing.ArrayLike) -> NoiseScales:
    """Estimate the gradient noise scale (arXiv 1812.06162) where the weights are held still, at a learning rate of 0.

    While weights move, the estimate is wrong: see `vsgd.posterior.estimate_noise_scale`. To measure the noise scale of a
    training, see `vsgd.monitor.noise_scale`.

    Args:
        opt_state: a state as for `posterior`.
        batch_size: the number of examples that a gradient averages, over all devices and accumulated steps.

    Returns:
        The estimate overall and, in `tensors`, a tree shaped like the parameters.

    Raises:
        ValueError: there is no state of VSGD, or `batch_size`, given as a Python number, is out of its range.

    Example:
        >>> import jax.numpy as jnp
        >>> from vsgd.optax import noise_scale, vsgd
        >>> solver = vsgd(0.01)
        >>> params = jnp.zeros(2)
        >>> _, state = solver.update(jnp.array([1.0, -2.0]), solver.init(params), params)
        >>> bool(noise_scale(state, batch_size=32).overall.trace > 0)
        True
    """
    validate_numbers(jax.Array, batch_size=batch_size)

    def estimate(param_state: ParamState) -> NoiseScale:
        posteriors = (compute_posterior(state, param_state.scales) for state in param_state.get_real_states())
        return functools.reduce(operator.add, (estimate_noise_scale(each, batch_size, jnp.sum) for each in posteriors))

    def is_scale(node: Any) -> bool:
        return isinstance(node, NoiseScale)

    tensors = map_states(opt_state, estimate)
    scales = filter(is_scale, jax.tree.leaves(tensors, is_leaf=is_scale))
    return NoiseScales(functools.reduce(operator.add, scales, NoiseScale(jnp.zeros([]), jnp.zeros([]))), tensors)


def surprise(grads: optax.Updates, opt_state: Any) -> Any:
    """Return how unexpected gradients are given the state before they update it, averaged over each parameter.

    See `vsgd.posterior.compute_surprise`. As in `posterior`, an observer's state takes precedence. From its second step on
    the surprise is the squared innovations over their expected variances, both summed over the watched elements.

    Args:
        grads: gradients, as for `update`.
        opt_state: a state as for `posterior`.

    Returns:
        A tree shaped like the gradients, with the mean of each one's squared standardized innovations, 0-d arrays; near 1 where
        the model fits. A parameter that is masked out keeps its `optax.MaskedNode`.

    Raises:
        ValueError: there is no state of VSGD or `observe_gradients`, or a gradient does not fit the state.
    """
    if find_observers(opt_state):
        watched = map_observed(opt_state, lambda each: each)

        def compute_watched(path: Any, grad: Any, each: Any) -> Any:
            if grad is None or isinstance(each, optax.MaskedNode):
                return each if isinstance(each, optax.MaskedNode) else None
            numbers = select_watched("grads", path, grad, each.elements, each.state)
            return observer.sum_innovations(numbers, each.state, jnp.sum).surprise

        return jax.tree_util.tree_map_with_path(compute_watched, grads, watched, is_leaf=lambda leaf: leaf is None)

    def average(path: Any, grad: Any, param_state: Any) -> Any:
        if grad is None or isinstance(param_state, optax.MaskedNode):
            return param_state if isinstance(param_state, optax.MaskedNode) else None
        check_gradient("grads", path, grad, param_state.arrays)
        dtype = choose_arithmetic_dtype(param_state.arrays[0].dtype)
        pairs = zip(split_complex(jnp.asarray(grad, dtype)), param_state.get_real_states(), strict=True)
        return jnp.mean(jnp.stack([compute_surprise(part, state, param_state.scales).mean() for part, state in pairs]))

    states = map_states(opt_state, lambda param_state: param_state)
    return jax.tree_util.tree_map_with_path(average, grads, states, is_leaf=lambda leaf: leaf is None)


class ParamState:
    """The state of one parameter, a leaf of a tree.

    Attributes:
        index: the index of the transformation's state that holds it.
        arrays: the state arrays, in the rule's order.
        scales: the state's factors, in the dtype of the arithmetic, in a shape that broadcasts with the arrays.
    """

    def __init__(self, index: int, arrays: tuple[jax.Array, ...], scales: Scales) -> None:
        self.index = index
        self.arrays = arrays
        dtype = jnp.finfo(choose_arithmetic_dtype(arrays[0].dtype)).dtype
        # A state that `jax.vmap` made has leading dimensions in its arrays and in its scales.
        shape = scales.drift.shape + (1,) * (arrays[0].ndim - scales.drift.ndim)
        self.scales = Scales(*(scale.astype(dtype).reshape(shape) for scale in scales))

    def get_real_states(self) -> list[tuple[jax.Array, ...]]:
        """Return the state of each real part, widened: two for a complex parameter."""
        wide = (array.astype(choose_arithmetic_dtype(array.dtype)) for array in self.arrays)
        return list(zip(*map(split_complex, wide), strict=True))


class _Result:
    """A parameter's result, which is a leaf even if it is a tuple."""

    def __init__(self, value: Any) -> None:
        self.value = value


class Watched(NamedTuple):
    """What an observer stores for one parameter: see `ObserveGradientsState`."""

    elements: jax.Array | None
    numbers: jax.Array
    state: observer.State


def map_states(opt_state: Any, function: Callable[[ParamState], Any]) -> Any:
    """Return a tree shaped like the parameters, with a function of each parameter's state.

    Raises:
        ValueError: there is no state of VSGD.
    """
    states = _find_states(opt_state, tuple(RULES))
    if not states:
        raise ValueError(f"opt_state is {type(opt_state).__name__} without state of VSGD, but must hold some")

    def map_state(index: int, state: Any) -> Any:
        unit = jnp.ones_like(state.drift_scale)
        if state.gradient_unit is not None:
            unit = jnp.where(state.gradient_unit > 0, state.gradient_unit, unit)
        scales = Scales(state.drift_scale, state.noise_scale, unit)
        return jax.tree.map(lambda *arrays: _Result(function(ParamState(index, arrays, scales))), *get_arrays(state))

    return _merge(list(itertools.starmap(map_state, enumerate(states))))


def map_observed(opt_state: Any, function: Callable[[Watched], Any]) -> Any:
    """Return a tree shaped like the parameters, with a function of what an observer stores for each."""

    def map_state(state: ObserveGradientsState) -> Any:
        def apply(elements: Any, numbers: jax.Array, *arrays: jax.Array) -> _Result:
            return _Result(function(Watched(elements, numbers, observer.State(*arrays))))

        structure: Any = jax.tree.structure(state.mean)
        trees = [structure.flatten_up_to(tree) for tree in (state.elements, state.numbers, *get_filter_arrays(state))]
        return structure.unflatten([apply(*of_leaf) for of_leaf in zip(*trees, strict=True)])

    return _merge([map_state(state) for state in find_observers(opt_state)])


def find_observers(opt_state: Any) -> list[ObserveGradientsState]:
    """Return the states of `observe_gradients` in a larger state."""
    return _find_states(opt_state, (ObserveGradientsState,))


def _find_states(opt_state: Any, types: tuple[type[Any], ...]) -> list[Any]:
    """Return the states of these types in a larger state."""
    nodes = jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, types))
    return [node for node in nodes if isinstance(node, types)]


def _merge(trees: list[Any]) -> Any:
    """Return the one tree of results of several states, each of a part of the parameters."""

    def choose_result(*nodes: Any) -> Any:
        # Masks split the parameters: one state has the result, the others have `MaskedNode`.
        return next((node for node in nodes if isinstance(node, _Result)), nodes[0])

    def is_leaf(node: Any) -> bool:
        return isinstance(node, (_Result, optax.MaskedNode))

    merged = jax.tree.map(choose_result, *trees, is_leaf=is_leaf)
    return jax.tree.map(lambda node: node.value if isinstance(node, _Result) else node, merged, is_leaf=is_leaf)
