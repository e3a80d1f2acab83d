"""The state of the optax transformations, and the rule that each type of it is of."""

# Not `from __future__ import annotations`: the types of the fields are to be types, not strings.
from typing import NamedTuple

import jax
import optax

from vsgd import core


class ScaleByVsgdState(NamedTuple):
    """State of VSGD.

    Attributes:
        count: how many steps were taken, int32.
        mu_g: posterior mean of each gradient.
        b_g: rate of the Gamma posterior of the drift's precision.
        b_ghat: rate of the Gamma posterior of the mini-batch noise's precision.
    """

    count: jax.Array  # type: ignore[assignment]  # a tuple has a method of this name
    mu_g: optax.Updates
    b_g: optax.Updates
    b_ghat: optax.Updates


class ScaleByConstantVsgdState(NamedTuple):
    """State of Constant VSGD.

    Attributes:
        count: how many steps were taken, int32.
        mu_g: posterior mean of each gradient.
        b: rate of the Gamma posterior of the one precision.
    """

    count: jax.Array  # type: ignore[assignment]  # a tuple has a method of this name
    mu_g: optax.Updates
    b: optax.Updates


RULES = {ScaleByVsgdState: core.VSGD, ScaleByConstantVsgdState: core.CONSTANT_VSGD}

# By this name they are imported, and so pickled.
for _state in RULES:
    _state.__module__ = "vsgd.optax"
