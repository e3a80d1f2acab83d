"""The posterior of a Keras optimizer's gradients, from the state of its variables."""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from vsgd.backends.keras import arithmetic_dtype, parts, whole
from vsgd.posterior import NoiseScale, NoiseScales, Posterior, noise_scale, posterior, surprise

#: The state of a variable, in the rule's order.
State = Sequence[Any]
#: `rule.variance_scales` of the optimizer's hyperparameters.
Scales = tuple[Any, Any]


def posterior_of(state: State, scales: Scales) -> Posterior:
    """The posterior of one variable's gradient."""
    known = [posterior(part, scales) for part in real_states(state)]
    joined = Posterior(*map(whole, zip(*known, strict=True)))
    # The torch engines overwrite the state.
    return joined._replace(mean=ops.copy(joined.mean))


def noise_scales(states: Sequence[State | None], scales: Scales, batch_size: float) -> NoiseScales:
    """The noise scales of all variables that have state."""
    tensors = [None if state is None else _noise_scale(state, scales, batch_size) for state in states]
    return NoiseScales(functools.reduce(operator.add, filter(None, tensors)), tensors)


def _noise_scale(state: State, scales: Scales, batch_size: float) -> NoiseScale:
    known = (posterior(part, scales) for part in real_states(state))
    return functools.reduce(operator.add, (noise_scale(part, batch_size, ops.sum) for part in known))


def mean_surprise(grad: Any, state: State, scales: Scales) -> Any:
    """The surprise of one variable's gradient, averaged over its elements."""
    states = real_states(state)
    dtype = keras.backend.standardize_dtype(states[0][0].dtype)
    grads = (ops.cast(part, dtype) for part in parts(ops.convert_to_tensor(grad)))
    each = [ops.mean(surprise(part, of_part, scales)) for part, of_part in zip(grads, states, strict=True)]
    return sum(each) / len(each)


def real_states(state: State) -> list[tuple[Any, ...]]:
    """The state of a variable, in its arithmetic's dtype, for each of its real parts."""
    tensors = [ops.stop_gradient(ops.convert_to_tensor(each)) for each in state]
    wide = (ops.cast(each, arithmetic_dtype(keras.backend.standardize_dtype(each.dtype))) for each in tensors)
    return list(zip(*map(parts, wide), strict=True))
