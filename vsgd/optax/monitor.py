"""Summarize the state of an optax transformation: see `vsgd.monitor`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from vsgd.monitor import summaries
from vsgd.monitor.summaries import Block, Description, Look, MonitorOps, compute_digest, describe_observed, describe_state
from vsgd.observer import State
from vsgd.optax.numerics import check_gradient, choose_arithmetic_dtype, split_complex
from vsgd.optax.posteriors import ParamState, Watched, find_observers, map_observed, map_states, surprise
from vsgd.posterior import Scales

__all__ = ["summarize"]

_OPS = MonitorOps(
    jnp.sum,
    lambda table, sizes: jnp.split(table, np.cumsum(sizes)[:-1], axis=1),
    jnp.stack,
    jnp.concatenate,
    jnp.take,
    jax.device_get,
)


def summarize(step: int, opt_state: Any, grads: optax.Updates | None = None, *, batch_size: float = 1) -> Look:
    """Summarize a state, outside of `jax.jit`, with one transfer from the device for all parameters of a dtype.

    Args:
        step: the number of steps so far.
        opt_state: a state as for `vsgd.optax.posterior`, after at least one step.
        grads: the gradients of the next update, for the surprise; None omits the surprise.
        batch_size: the number of examples that a gradient averages, over all devices and accumulated steps; with 1 the noise
            scale counts batches.

    Returns:
        A look, by the parameters' paths in their tree, for `vsgd.monitor.Monitor.record`, which smooths the noise scale.

    Raises:
        ValueError: there is no state of VSGD or `observe_gradients`, `batch_size` is out of its range, or a gradient does not
            fit the state.

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
    observed = find_observers(opt_state)
    list_blocks = _list_observed_blocks if observed else _list_blocks
    return summaries.summarize(step, list_blocks(opt_state, grads, batch_size), batch_size)


def _list_blocks(opt_state: Any, grads: Any, batch_size: float) -> list[Block]:
    blocks = []
    for (_, _, has_grads), members in _group_states(opt_state, grads).items():
        names, states, grads_of = zip(*members, strict=True)
        sizes = tuple(each.arrays[0].size * (2 if jnp.iscomplexobj(each.arrays[0]) else 1) for each in states)
        flat = tuple(_flatten(arrays) for arrays in zip(*(each.arrays for each in states), strict=True))
        vectors = flat, _join_scales(states), _flatten(grads_of) if has_grads else None
        sums = ("noise_trace", "noise_squared_norm", *(["surprise"] if has_grads else []))
        blocks.append(Block(names, sizes, sizes, sums, _make_fetch(describe_state, vectors, sizes, batch_size)))
    return blocks


def _list_observed_blocks(opt_state: Any, grads: Any, batch_size: float) -> list[Block]:
    groups: dict[Any, list[tuple[str, Watched]]] = {}
    tree = map_observed(opt_state, lambda each: each)
    for path, each in jax.tree.leaves_with_path(tree, is_leaf=lambda node: isinstance(node, Watched)):
        if each.state.mean.size:
            groups.setdefault(each.state.mean.dtype, []).append((_name_path(path), each))
    surprises = {} if grads is None else dict(jax.tree.leaves_with_path(surprise(grads, opt_state)))
    by_name = {_name_path(path): each for path, each in surprises.items()}
    blocks = []
    for members in groups.values():
        names, watched = zip(*members, strict=True)
        sizes = tuple(each.state.mean.size for each in watched)
        state = State(*(_flatten(arrays) for arrays in zip(*(each.state for each in watched), strict=True)))
        # Once for each element, because a digest sums over elements and `summarize` divides by their number.
        known = [by_name[name] for name in names if name in by_name]
        spread = _flatten(tuple(map(jnp.full, sizes, known))) if len(known) == len(names) else None
        numbers = tuple(int(np.sum(each)) for each in jax.device_get([each.numbers for each in watched]))
        sums = ("noise_trace", *([] if spread is None else ["surprise"]))
        blocks.append(Block(names, sizes, numbers, sums, _make_fetch(_describe_observed, (state, spread), sizes, batch_size)))
    return blocks


def _describe_observed(state: State, surprise: Any, batch_size: Any) -> Description:
    described = describe_observed(state, batch_size)
    if surprise is not None:
        described.summands["surprise"] = surprise
    return described


def _make_fetch(describe: Any, vectors: Any, sizes: tuple[int, ...], batch_size: float) -> Callable[[Any], Any]:
    return lambda indices: _OPS.fetch(_compute_digest(vectors, indices, batch_size, describe=describe, sizes=sizes))


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
            key = state.index, state.arrays[0].dtype, grad is not None
            groups.setdefault(key, []).append((_name_path(path), state, grad))
    return groups


def _name_path(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".") or "params"


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


@partial(jax.jit, static_argnames=("describe", "sizes"))
def _compute_digest(vectors: Any, indices: Any, batch_size: Any, *, describe: Any, sizes: tuple[int, ...]) -> jax.Array:
    return compute_digest(describe(*vectors, batch_size), sizes, indices, _OPS)
