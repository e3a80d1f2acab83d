"""Look at the state of an optax transformation: see `vsgd.monitor`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from vsgd.monitor import summaries
from vsgd.monitor.summaries import Block, Look, MonitorOps, compute_digest
from vsgd.optax.numerics import check_gradient, choose_arithmetic_dtype, split_complex
from vsgd.optax.posteriors import ParamState, map_states
from vsgd.posterior import Scales

__all__ = ["summarize"]

_OPS = MonitorOps(
    jnp.sum, lambda table, sizes: jnp.split(table, np.cumsum(sizes)[:-1], axis=1), jnp.stack, jnp.concatenate, jnp.take
)


def summarize(step: int, opt_state: Any, grads: optax.Updates | None = None, *, batch_size: float = 1) -> Look:
    """Look at a state outside of `jax.jit`, with one transfer from the device for all parameters of a dtype.

    Args:
        step: the number of steps so far.
        opt_state: a state as for `vsgd.optax.posterior`, after at least one step.
        grads: the gradients of the next update, for the surprise; None omits the surprise.
        batch_size: the number of examples that a gradient averages, over all devices and accumulated steps; with 1 the noise
            scale counts batches.

    Returns:
        A look, by the parameters' paths in their tree, for `vsgd.monitor.Monitor.record`, which smooths the noise scale.

    Raises:
        ValueError: there is no state of VSGD; `batch_size` is out of its range; or a gradient does not fit the state.

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
    blocks = [
        Block(
            names=[name for name, _, _ in members],
            sizes=tuple(state.arrays[0].size * (2 if jnp.iscomplexobj(state.arrays[0]) else 1) for _, state, _ in members),
            state=tuple(_flatten(arrays) for arrays in zip(*(state.arrays for _, state, _ in members), strict=True)),
            scales=_join_scales([state for _, state, _ in members]),
            grads=_flatten(tuple(grad for _, _, grad in members)) if has_grads else None,
        )
        for (_, _, has_grads), members in _group_states(opt_state, grads).items()
    ]

    def fetch_digest(block: Block, indices: Any) -> Any:
        digest = _compute_digest(block.state, block.scales, block.grads, indices, batch_size, sizes=block.sizes)
        return jax.device_get(digest)

    return summaries.summarize(step, blocks, fetch_digest, batch_size)


def _group_states(opt_state: Any, grads: Any) -> dict[Any, list[tuple[str, ParamState, Any]]]:
    """Return names, states and gradients of the parameters, by transformation, dtype and whether there is a gradient."""
    states = map_states(opt_state, lambda param_state: param_state)
    grads_by_path = dict(jax.tree.leaves_with_path(grads))
    groups: dict[Any, list[tuple[str, ParamState, Any]]] = {}
    for path, state in jax.tree.leaves_with_path(states, is_leaf=lambda node: isinstance(node, ParamState)):
        if state.arrays[0].size:
            grad = grads_by_path.get(path)
            if grad is not None:
                check_gradient("grads", path, grad, state.arrays)
                grad = jnp.asarray(grad, choose_arithmetic_dtype(state.arrays[0].dtype))
            name = jax.tree_util.keystr(path, simple=True, separator=".") or "params"
            groups.setdefault((state.index, state.arrays[0].dtype, grad is not None), []).append((name, state, grad))
    return groups


def _join_scales(states: Sequence[ParamState]) -> Scales:
    """Return the scales of one transformation: numbers, or vectors for a state that `jax.vmap` made."""
    if all(scale.size == 1 for scale in states[0].scales):
        return Scales(*(scale.reshape(()) for scale in states[0].scales))
    columns = zip(*(each.scales for each in states), strict=True)
    shapes = [each.arrays[0].shape for each in states]
    whole = ([jnp.broadcast_to(*pair).ravel() for pair in zip(column, shapes, strict=True)] for column in columns)
    return Scales(*map(jnp.concatenate, whole))


@jax.jit
def _flatten(arrays: tuple[jax.Array, ...]) -> jax.Array:
    """Return one vector of real numbers."""
    wide = (array.astype(choose_arithmetic_dtype(array.dtype)) for array in arrays)
    return jnp.concatenate([jnp.ravel(part) for array in wide for part in split_complex(array)])


@partial(jax.jit, static_argnames="sizes")
def _compute_digest(state: Any, scales: Any, grads: Any, indices: Any, batch_size: Any, *, sizes: tuple[int, ...]) -> jax.Array:
    return compute_digest(Block((), sizes, state, scales, grads), indices, _OPS, batch_size)
