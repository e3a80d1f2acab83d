"""A filter of the gradients of any optimizer, which learns its gain element by element and changes no parameters.

VSGD splits the variance of its innovations into drift and noise by a gain that it does not learn from the noise (see
`docs/uncertainty.md`). This filter does: at the Kalman filter's gain successive innovations are uncorrelated, so it moves each
gain against the correlation that is left. That is stochastic gradient descent on the squared innovation, where
`sensitivity` is the derivative of the mean with respect to the gain.

This module imports no framework; its update runs on every array library.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import numpy as np

from vsgd.core import compute_forgetting
from vsgd.ops import Array, ArrayOps
from vsgd.posterior import Posterior
from vsgd.validation import validate_numbers

# A gain at the start of a run: that of Constant VSGD.
_FIRST_GAIN = 0.25
# Keeps quotients by a variance finite. Squares of smaller roots vanish in float32.
_SMALLEST = 1e-30


class ObserverOps(ArrayOps, Protocol):
    """The functions that `make_update` needs besides operators; `numpy`, `torch`, `jax.numpy` and `keras.ops` have them."""

    def abs(self, x: Any, /) -> Any:
        """Return the absolute value of each element."""

    def where(self, condition: Any, x: Any, y: Any, /) -> Any:
        """Return `x` where the condition holds, else `y`."""


class Hyperparameters(NamedTuple):
    """Hyperparameters of the observer.

    Attributes:
        gain_rate: the learning rate of the gains: the most by which the log-odds of a gain change at one step. A larger one
            suits a gradient that the weights' steps do not change: see `docs/uncertainty.md`.
        forgetting_floor: the smallest learning rate of the innovations' variance; at step t it is
            `max(t ** -0.9, forgetting_floor)`, so a long run remembers about `1 / forgetting_floor` steps.
    """

    gain_rate: float = 0.003
    forgetting_floor: float = 0.01


class State(NamedTuple):
    """What the observer stores for each watched element: four arrays of one shape.

    Attributes:
        mean: the estimate of the true gradient, in units of the gradient.
        gain: how far the mean moves towards each new gradient, in (0, 1).
        sensitivity: the derivative of the mean with respect to the gain, in units of the gradient.
        innovation_variance: the running mean of squared innovations, in units of gradient^2.
    """

    mean: Any
    gain: Any
    sensitivity: Any
    innovation_variance: Any


#: The numbers that fill the arrays of a new `State`.
INITIAL_STATE = State(0.0, _FIRST_GAIN, 0.0, 0.0)


class Coefficients(NamedTuple):
    """The scalars of one step, the same for all elements."""

    gain_rate: float
    keep: Any
    rho: Any
    largest: float
    smallest: float


def compute_coefficients(step: Any, hyper: Hyperparameters) -> Coefficients:
    """Return the scalars of step `step`, 1 for the first.

    Args:
        step: the count of the step; a number or a 0-d array.
        hyper: the hyperparameters.
    """
    rho = compute_forgetting(step, 0.9, hyper.forgetting_floor)
    # A square of a larger number overflows in float32.
    return Coefficients(hyper.gain_rate, 1 - rho, rho, largest=1e18, smallest=_SMALLEST)


def make_update(xp: ObserverOps) -> Callable[[Array, State, Coefficients], State]:
    """Return the function that updates a state by a gradient, `update(grad, state, coefficients) -> new_state`.

    The gradient and the state have one shape and one dtype, float32 or float64. A gradient that is not finite or larger than
    1e18 counts as expected: one overflow does not spoil the state.

    Args:
        xp: the operations of the array library.

    Example:
        >>> update, state = make_update(np), State(*(np.full(2, value) for value in INITIAL_STATE))
        >>> for step in range(1, 101):
        ...     state = update(np.array([1.0, np.nan]), state, compute_coefficients(step, Hyperparameters()))
        >>> print(state.mean.round(3))
        [1. 0.]

    Source: `docs/uncertainty.md` derives the rule, a recursive prediction-error method.
    """

    def update(grad: Array, state: State, c: Coefficients) -> State:
        mean, gain, sensitivity, innovation_variance = state
        innovation = grad - mean
        innovation = xp.where(xp.abs(innovation) < c.largest, innovation, 0.0)
        innovation_variance = c.keep * innovation_variance + c.rho * (innovation * innovation)
        correlation = innovation * sensitivity / (innovation_variance + c.smallest)
        bounded = correlation / xp.sqrt(correlation * correlation + 1.0)
        gain = gain + c.gain_rate * (gain * (1.0 - gain) * bounded)
        return State(mean + gain * innovation, gain, sensitivity - gain * sensitivity + innovation, innovation_variance)

    return update


def compute_posterior(state: State) -> Posterior:
    """Return the posterior of the watched elements.

    At the Kalman filter's gain w the innovations' variance S is `R / (1 - w)` for noise of variance R, the mean's error has the
    variance `w R`, and the drift has the variance `w^2 S`.

    Args:
        state: the state, real.

    Returns:
        Arrays of the state's shape and dtype.

    Example:
        >>> posterior = compute_posterior(State(np.array(3.0), np.array(0.5), np.array(0.0), np.array(4.0)))
        >>> posterior.noise_variance.item(), posterior.variance.item(), posterior.drift_variance.item()
        (2.0, 1.0, 1.0)
    """
    noise_variance = (1.0 - state.gain) * state.innovation_variance
    drift_variance = state.gain * state.gain * state.innovation_variance
    variance = state.gain * noise_variance
    return Posterior(state.mean, variance, noise_variance, drift_variance, state.gain, state.mean * state.mean / variance)


class Innovations(NamedTuple):
    """The innovations of one gradient, summed over a tensor.

    Attributes:
        squares: the sum of squared innovations.
        variances: the sum of the variances that the state expects of them.
    """

    squares: Any
    variances: Any

    @property
    def surprise(self) -> Any:
        """Squared innovations over their expected variances: near 1 where the model fits; 0 where all gradients were zero.

        The mean of the elements' own ratios would be arbitrarily large for an element with almost only zero gradients.
        """
        return self.squares / (self.variances + _SMALLEST)


def sum_innovations(grad: Array, state: State, total: Callable[[Any], Any]) -> Innovations:
    """Sum the innovations of a gradient.

    Args:
        grad: a mini-batch gradient, in the state's dtype.
        state: the state before the update by this gradient, after at least one other.
        total: a function that sums an array.

    Example:
        >>> state = State(*(np.array([value, value]) for value in (1.0, 0.5, 0.0, 2.0)))
        >>> float(sum_innovations(np.array([1.0, 5.0]), state, np.sum).surprise)
        4.0
    """
    innovation = grad - state.mean
    return Innovations(total(innovation * innovation), total(state.innovation_variance))


def validate_options(max_elements: Any, seed: Any, hyper: Hyperparameters) -> None:
    """Check the options that all observers share.

    Args:
        max_elements: the largest number of watched elements of one tensor; None: all.
        seed: the seed of the choice of elements.
        hyper: the hyperparameters.

    Raises:
        ValueError: an option is not a number or outside its range.
    """
    validate_numbers(max_elements=max_elements, seed=seed, **hyper._asdict())


def choose_elements(size: int, max_elements: int | None, seed: int, index: int) -> Any:
    """Choose the watched elements of a tensor: a random one from each of `max_elements` equal ranges.

    The choice depends on the arguments alone, so all frameworks, and a resumed run, watch the same elements.

    Args:
        size: the number of real numbers in the tensor.
        max_elements: the largest number of watched elements; None: all.
        seed: the seed.
        index: the index of the tensor.

    Returns:
        Ascending indices, int32 or int64, or None if all elements are watched.

    Example:
        >>> choose_elements(100, 4, seed=0, index=0)
        array([18, 29, 55, 98], dtype=int32)
    """
    if max_elements is None or size <= max_elements:
        return None
    bounds = np.arange(max_elements + 1, dtype=np.int64) * size // max_elements
    # NumPy guarantees the raw stream of a bit generator, not that of `Generator.choice`.
    words = np.random.PCG64([seed, index]).random_raw(max_elements) >> np.uint64(11)
    elements = bounds[:-1] + (words % np.diff(bounds).astype(np.uint64)).astype(np.int64)
    return elements.astype(np.int32) if size <= np.iinfo(np.int32).max else elements
