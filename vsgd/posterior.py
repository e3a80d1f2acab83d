"""What the state says of each gradient: a posterior, its noise, and how large a batch that noise asks for.

It is the uncertainty of the *gradient*, not of the weights. Everything is computed from the state after a step, by operators
on arrays of any library; adapters say where the state is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from vsgd import core

#: An array or scalar of any library.
Array = Any


class Posterior(NamedTuple):
    """What is known of the gradient of one parameter, element by element.

    Of a complex parameter each field holds the numbers of the two parts, as complex numbers do.

    Attributes:
        mean: the posterior mean, `mu_g`, in units of the gradient.
        variance: the posterior variance sigma^2 that the noise levels of the state give, in units of gradient^2; the next
            step's, for sigma^2 does not depend on the gradient that the step sees.
        noise_variance: the variance of the mini-batch noise, `b_ghat / a`.
        drift_variance: the variance of the gradient's change from step to step, `b_g / a`.
        gain: the share of an innovation by which the mean moves, `b_g / (b_g + b_ghat)`, between 0 and 1.
        snr: signal to noise, `mean**2 / variance`.
    """

    mean: Array
    variance: Array
    noise_variance: Array
    drift_variance: Array
    gain: Array
    snr: Array

    @property
    def momentum(self) -> Array:
        """The effective momentum, `1 - gain`: Adam's beta1, for each element its own."""
        return 1 - self.gain


def posterior(state: core.State, scales: Sequence[Array]) -> Posterior:
    """The posterior of one parameter's gradient.

    Args:
        state: the state arrays of one parameter in the rule's order, of real numbers, float32 or float64.
        scales: `rule.variance_scales(hyper)`.

    Returns:
        Arrays of the state's shape and dtype.

    Example:
        >>> import numpy as np
        >>> hyper = core.VSGD.hyperparameters()
        >>> state = tuple(np.array([value]) for value in (0.3, 1e-3, 3e-2))
        >>> known = posterior(state, core.VSGD.variance_scales(hyper))
        >>> float(known.gain[0].round(4)), float(known.snr[0].round(1))
        (0.0323, 46.5)

    Source: arXiv 2404.06549, Algorithm 1 (`vsgd.core` has the constants).
    """
    mean, *rates = state
    drift_variance, noise_variance = rates[0] * scales[0], rates[-1] * scales[1]
    gain = drift_variance / (drift_variance + noise_variance)
    variance = gain * noise_variance
    return Posterior(mean, variance, noise_variance, drift_variance, gain, mean * mean / variance)


def predicted_variance(state: core.State, scales: Sequence[Array]) -> Array:
    """The variance of the next innovation, `ghat - mu_g`: of the mean, the drift and the noise together.

    Args:
        state: the state arrays of one parameter before a step.
        scales: `rule.variance_scales(hyper)`.

    Returns:
        An array of the state's shape and dtype.
    """
    drift_variance, noise_variance = state[1] * scales[0], state[-1] * scales[1]
    # The quotient first, for a product of variances overflows.
    return drift_variance + noise_variance + drift_variance / (drift_variance + noise_variance) * noise_variance


def surprise(grad: Array, state: core.State, scales: Sequence[Array]) -> Array:
    """How unexpected a gradient is: the square of its standardized innovation, near 1 on average where the model fits.

    Args:
        grad: a mini-batch gradient, in the state's dtype.
        state: the state arrays of its parameter before the step that takes it.
        scales: `rule.variance_scales(hyper)`.

    Returns:
        An array of the gradient's shape: `(grad - mu_g)**2` over the variance that was predicted for it.
    """
    innovation = grad - state[0]
    return innovation * innovation / predicted_variance(state, scales)


class NoiseScale(NamedTuple):
    """The "simple" gradient noise scale `tr(Sigma) / |G|**2` (McCandlish et al., arXiv 1812.06162).

    The trace and the squared norm of several tensors, or of several steps, may be added or averaged, the scale may not: `scale`
    is to be computed from the sums.

    Attributes:
        trace: an estimate of the trace of the covariance of one example's gradient.
        squared_norm: an estimate of the squared norm of the true gradient; where there is nothing but noise it may be negative.
    """

    trace: Array
    squared_norm: Array

    def __add__(self, other: object) -> NoiseScale:
        """The estimates of two tensors together."""
        if not isinstance(other, NoiseScale):
            return NotImplemented
        return NoiseScale(self.trace + other.trace, self.squared_norm + other.squared_norm)

    @property
    def scale(self) -> Array:
        """The noise scale, in examples; negative where no gradient was found in the noise."""
        return self.trace / self.squared_norm


class NoiseScales(NamedTuple):
    """Gradient noise scales.

    Attributes:
        overall: of all parameters together.
        tensors: of each parameter, as the adapter names them.
    """

    overall: NoiseScale
    tensors: Any


def noise_scale(known: Posterior, batch_size: Array, total: Callable[[Array], Array]) -> NoiseScale:
    """The gradient noise scale of one parameter, estimated from its posterior.

    With a gain w, the mean of a gradient that stands still errs by w / (2 - w) of the noise's variance R, and the innovations'
    variance is their sum, `2 R / (2 - w)`. That sum is what the two rates learn; how they share it is not (the gain is no
    measure of noise). So R is taken from both together.

    The estimate holds where the gradient moves little within the filter's memory, `1 / gain` steps, and is far above the prior.
    While weights train at usual learning rates, the squared norm is not to be relied on: `docs/uncertainty.md` measures it, and
    tells how to measure the noise scale on weights that are held still.

    Args:
        known: the posterior, of real numbers.
        batch_size: how many examples a gradient is the mean of, in all processes and accumulated steps together.
        total: the sum of an array.

    Returns:
        Scalars of the array's library.

    Example:
        >>> import numpy as np
        >>> state = (np.array([1.0, 2.0]), np.array([1.0, 1.0]), np.array([3.0, 3.0]))
        >>> noise_scale(posterior(state, (1.0, 1.0)), batch_size=10, total=np.sum).scale.item()
        17.5

    Source: arXiv 1812.06162, appendix A; `docs/uncertainty.md` derives the correction.
    """
    innovation_variance = known.drift_variance + known.noise_variance
    of_mean = known.gain * innovation_variance / 2
    trace = batch_size * total(innovation_variance - of_mean)
    return NoiseScale(trace, total(known.mean * known.mean - of_mean))
