"""Looking at the state of an optax transformation: see `vsgd.monitor`."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from vsgd import core
from vsgd.monitor.summaries import Arrays, Block, Look, digest
from vsgd.monitor.summaries import summarize as _summarize
from vsgd.optax.numerics import arithmetic_dtype, check_gradient, parts
from vsgd.optax.posteriors import map_states, scales_of

__all__ = ["summarize"]

_ARRAYS = Arrays(
    jnp.sum, lambda table, sizes: jnp.split(table, np.cumsum(sizes)[:-1], axis=1), jnp.stack, jnp.concatenate, jnp.take
)


class _State(NamedTuple):
    """Of one parameter."""

    rule: core.Rule
    arrays: tuple[jax.Array, ...]


def summarize(
    step: int,
    opt_state: Any,
    grads: optax.Updates | None = None,
    *,
    batch_size: float = 1,
    prior_strength: jax.typing.ArrayLike = 1e-8,
    variance_ratio: jax.typing.ArrayLike = 3.0,
    prior_shape: jax.typing.ArrayLike | None = None,
) -> Look:
    """Look at a state, outside of `jax.jit`: one transfer from the device for all parameters of a dtype.

    Args:
        step: how many steps were taken.
        opt_state: as for `vsgd.optax.posterior`, after at least one step.
        grads: the gradients that the next update will take, to tell how unexpected they are; None: not known.
        batch_size: how many examples a gradient is the mean of, on all devices and in accumulated steps together; at 1 the
            noise scale counts batches.
        prior_strength: as the optimizer was given it.
        variance_ratio: as Constant VSGD was given it.
        prior_shape: as the optimizer was given it.

    Returns:
        What is seen, by the parameters' places in their tree, for `vsgd.monitor.Monitor.record`, which smooths the noise scale.

    Raises:
        ValueError: there is no state of VSGD; `batch_size` or a hyperparameter, given as a Python number, is out of its
            range; or a gradient does not fit the state.

    Example:
        >>> from vsgd.monitor import Monitor
        >>> from vsgd.optax import vsgd
        >>> solver, params = vsgd(0.01), {"weight": jnp.zeros(2)}
        >>> state, grads, looks = solver.init(params), {"weight": jnp.array([1.0, -2.0])}, []
        >>> monitor = Monitor(looks, every=2)
        >>> for step in range(5):
        ...     if monitor.due(step):
        ...         _ = monitor.record(summarize(step, state, grads, batch_size=32))
        ...     _, state = solver.update(grads, state, params)
        >>> [look.step for look in looks], list(looks[0].tensors)
        ([2, 4], ['weight'])
    """
    scales = scales_of(prior_strength, variance_ratio, prior_shape)
    blocks = [
        Block(
            names=[name for name, _, _ in members],
            sizes=tuple(state.arrays[0].size * (2 if jnp.iscomplexobj(state.arrays[0]) else 1) for _, state, _ in members),
            state=tuple(_flat(arrays) for arrays in zip(*(state.arrays for _, state, _ in members), strict=True)),
            scales=scales(rule),
            grads=_flat(tuple(grad for _, _, grad in members)) if known else None,
        )
        for (rule, _, known), members in _kinds(opt_state, grads).items()
    ]

    def look(block: Block, places: Any) -> Any:
        return jax.device_get(_digest(block.state, block.scales, block.grads, places, batch_size, sizes=block.sizes))

    return _summarize(step, blocks, look, batch_size)


def _kinds(opt_state: Any, grads: Any) -> dict[Any, list[tuple[str, _State, Any]]]:
    """The parameters by rule, dtype, and whether they have a gradient: names, states and gradients."""
    states = map_states(opt_state, lambda rule, arrays: _State(rule, arrays))
    of_path = dict(jax.tree.leaves_with_path(grads))
    kinds: dict[Any, list[tuple[str, _State, Any]]] = {}
    for path, state in jax.tree.leaves_with_path(states, is_leaf=lambda node: isinstance(node, _State)):
        if state.arrays[0].size:
            grad = of_path.get(path)
            if grad is not None:
                check_gradient("grads", path, grad, state.arrays)
                grad = jnp.asarray(grad, arithmetic_dtype(state.arrays[0].dtype))
            name = jax.tree_util.keystr(path, simple=True, separator=".") or "params"
            kinds.setdefault((state.rule, state.arrays[0].dtype, grad is not None), []).append((name, state, grad))
    return kinds


@jax.jit
def _flat(arrays: tuple[jax.Array, ...]) -> jax.Array:
    """One vector of real numbers."""
    return jnp.concatenate([jnp.ravel(part) for array in arrays for part in parts(array.astype(arithmetic_dtype(array.dtype)))])


@partial(jax.jit, static_argnames="sizes")
def _digest(state: Any, scales: Any, grads: Any, places: Any, batch_size: Any, *, sizes: tuple[int, ...]) -> jax.Array:
    return digest(Block((), sizes, state, scales, grads), places, _ARRAYS, batch_size)
