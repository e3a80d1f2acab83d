"""The state of the optax transformations, whose type identifies its rule."""

# Not `from __future__ import annotations`: the types of the fields are to be types, not strings.
from typing import NamedTuple

import jax
import optax

from vsgd import core


class ScaleByVsgdState(NamedTuple):
    """State of VSGD.

    Attributes:
        count: the number of steps so far, int32.
        mu_g: posterior mean of each gradient.
        b_g: rate of the Gamma posterior of the drift's precision.
        b_ghat: rate of the Gamma posterior of the mini-batch noise's precision.
        drift_scale: the factor from `b_g` to the variance of the drift, a 0-d array.
        noise_scale: the factor from `b_ghat` to the variance of the mini-batch noise, a 0-d array.
        gradient_unit: the unit of the arrays, in units of the gradient, a 0-d array, 0 until calibrated; None: 1.
    """

    count: jax.Array  # type: ignore[assignment]  # a tuple has a method of this name
    mu_g: optax.Updates
    b_g: optax.Updates
    b_ghat: optax.Updates
    drift_scale: jax.Array
    noise_scale: jax.Array
    gradient_unit: jax.Array | None = None


class ScaleByConstantVsgdState(NamedTuple):
    """State of Constant VSGD.

    Attributes:
        count: the number of steps so far, int32.
        mu_g: posterior mean of each gradient.
        b: rate of the Gamma posterior of the one precision.
        drift_scale: the factor from `b` to the variance of the drift, a 0-d array.
        noise_scale: the factor from `b` to the variance of the mini-batch noise, a 0-d array.
        gradient_unit: the unit of the arrays, in units of the gradient, a 0-d array, 0 until calibrated; None: 1.
    """

    count: jax.Array  # type: ignore[assignment]  # a tuple has a method of this name
    mu_g: optax.Updates
    b: optax.Updates
    drift_scale: jax.Array
    noise_scale: jax.Array
    gradient_unit: jax.Array | None = None


#: The rule of each type of state.
RULES = {ScaleByVsgdState: core.VSGD, ScaleByConstantVsgdState: core.CONSTANT_VSGD}

# The public name, by which a state is pickled.
for _state in RULES:
    _state.__module__ = "vsgd.optax"


def get_arrays(state: ScaleByVsgdState | ScaleByConstantVsgdState) -> tuple[optax.Updates, ...]:
    """Return the trees of a state's arrays, in the order of `rule.state_names`."""
    return tuple(getattr(state, name) for name in RULES[type(state)].state_names)
