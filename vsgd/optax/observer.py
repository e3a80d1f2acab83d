"""Watch gradients in an optax chain: see `vsgd.observer`."""

# Not `from __future__ import annotations`: the types of the state's fields are to be types, not strings.
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from vsgd import observer
from vsgd.observer import Hyperparameters, State
from vsgd.optax.numerics import check_gradient, choose_arithmetic_dtype, get_dtype, split_complex

_update = observer.make_update(jnp)


class ObserveGradientsState(NamedTuple):
    """State of `observe_gradients`: trees shaped like the parameters.

    An array has the shape of its parameter if all elements are watched, with a last axis of 2 for complex numbers; else it is
    1-D, in the order of `elements`.

    Attributes:
        count: the number of steps so far, int32.
        mean: the estimates of the true gradients.
        gain: how far each mean moves towards a new gradient.
        sensitivity: the derivatives of the means by the gains.
        innovation_variance: the running means of squared innovations.
        elements: the indices of the watched numbers of each flattened parameter (real and imaginary parts alternate), or None
            where all are watched.
        numbers: how many numbers each parameter has, 0-d, float32.
    """

    count: jax.Array  # type: ignore[assignment]  # a tuple has a method of this name
    mean: optax.Updates
    gain: optax.Updates
    sensitivity: optax.Updates
    innovation_variance: optax.Updates
    elements: Any
    numbers: optax.Updates


ObserveGradientsState.__module__ = "vsgd.optax"  # the public name, by which a state is pickled


def observe_gradients(
    max_elements: int | None = 16384, gain_rate: float = 0.003, forgetting_floor: float = 0.01, *, seed: int = 0
) -> optax.GradientTransformationExtraArgs:
    """Estimate each gradient element's mean, noise and drift, and pass the gradients on unchanged.

    Put it before any optimizer in a chain; `vsgd.optax.posterior` and `vsgd.optax.surprise` find its state. It learns its
    gain from the gradients, so that noise and intervals are right where gradients change slowly; read them after a few
    hundred steps. `docs/uncertainty.md` measures how far to trust them. Gradients that are not finite change nothing.

    In `jax.shard_map` each device watches its shard. With automatic sharding a sample of a sharded tensor is gathered.

    Args:
        max_elements: the largest number of watched elements of one tensor, a fixed random choice; None: all. The memory is 20
            bytes for each watched element, 16 where all are watched.
        gain_rate: the learning rate of the gains, in (0, 1): see `vsgd.observer.Hyperparameters`.
        forgetting_floor: the smallest learning rate of the innovations' variance, in [0, 1).
        seed: an integer, the seed of the choice of elements.

    Returns:
        A gradient transformation. Its arithmetic is float32, or float64 for float64 parameters.

    Raises:
        ValueError: an option is out of its range.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> from vsgd.optax import observe_gradients, posterior
        >>> solver = optax.chain(observe_gradients(), optax.adamw(0.0))
        >>> params = jnp.zeros(2)
        >>> def step(state, noise):
        ...     return solver.update(jnp.array([3.0, 0.0]) + noise, state, params)[1], None
        >>> state, _ = jax.lax.scan(step, solver.init(params), jax.random.normal(jax.random.key(0), (500, 2)))
        >>> print(posterior(state).noise_variance.round())
        [1. 1.]
    """
    hyper = Hyperparameters(gain_rate, forgetting_floor)
    observer.validate_options(max_elements, seed, hyper)

    def init(params: optax.Params) -> ObserveGradientsState:
        structure: Any
        leaves, structure = jax.tree.flatten(params)
        elements, sizes, states = [], [], []
        for index, param in enumerate(leaves):
            if not jnp.issubdtype(get_dtype(param), jnp.inexact):
                raise ValueError(f"params has an array of {get_dtype(param)}, but must have floating or complex numbers")
            numbers = _get_numbers(jnp.asarray(param))
            chosen = observer.choose_elements(numbers.size, max_elements, seed, index)
            elements.append(None if chosen is None else jnp.asarray(chosen))
            sizes.append(jnp.asarray(numbers.size, jnp.float32))  # as int32 it could overflow
            watched = numbers if chosen is None else numbers.ravel()[: len(chosen)]
            states.append(State(*(jnp.full_like(watched, value) for value in observer.INITIAL_STATE)))
        arrays = (structure.unflatten([getattr(each, name) for each in states]) for name in State._fields)
        count, chosen_trees = jnp.zeros([], jnp.int32), map(structure.unflatten, (elements, sizes))
        return ObserveGradientsState(count, *arrays, *chosen_trees)

    def update(updates: optax.Updates, state: Any, params: Any = None, **extra_args: Any) -> tuple[optax.Updates, Any]:
        del params, extra_args
        if not isinstance(state, ObserveGradientsState):
            raise ValueError(f"state is {type(state).__name__}, but must be ObserveGradientsState")
        count = optax.safe_increment(state.count)

        def observe(path: Any, grad: Any, elements: Any, *arrays: jax.Array) -> State:
            if grad is None:
                return State(*arrays)
            old = State(*arrays)
            coefficients = observer.compute_coefficients(count.astype(old.mean.dtype), hyper)
            return _update(select_watched("updates", path, grad, elements, old), old, coefficients)

        structure: Any
        grads, structure = jax.tree_util.tree_flatten_with_path(updates, is_leaf=lambda leaf: leaf is None)
        trees = [structure.flatten_up_to(tree) for tree in (state.elements, *get_filter_arrays(state))]
        new = [observe(path, grad, *of_leaf) for (path, grad), *of_leaf in zip(grads, *trees, strict=True)]
        arrays = {name: structure.unflatten([getattr(each, name) for each in new]) for name in State._fields}
        return updates, state._replace(count=count, **arrays)

    return optax.GradientTransformationExtraArgs(init, update)


def get_filter_arrays(state: ObserveGradientsState) -> tuple[optax.Updates, ...]:
    """Return the trees of a state's arrays, in the order of `State`."""
    return tuple(getattr(state, name) for name in State._fields)


def select_watched(name: str, path: Any, grad: Any, elements: Any, state: State) -> jax.Array:
    """Return the watched numbers of a gradient in the argument `name`, in the shape and dtype of their state.

    Raises:
        ValueError: its shape or dtype does not fit.
    """
    numbers = _get_numbers(jnp.asarray(grad))
    if elements is not None:
        return numbers.ravel()[elements].astype(state.mean.dtype)
    check_gradient(name, path, numbers, state)
    return numbers.astype(state.mean.dtype)


def _get_numbers(array: jax.Array) -> jax.Array:
    """Return the real numbers of an array in the dtype of the arithmetic, a complex one's along a last axis."""
    parts = split_complex(array.astype(choose_arithmetic_dtype(array.dtype)))
    return jnp.stack(parts, axis=-1) if len(parts) == 2 else parts[0]
