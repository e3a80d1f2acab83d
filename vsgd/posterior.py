"""The posterior of each gradient element, the gradient noise scale and the surprise, computed from the state.

All of these describe the *gradient*, not the weights. The functions use operators on arrays of any library;
adapters pass their state.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from vsgd import core

#: An array or scalar of any library.
Array = Any


class Posterior(NamedTuple):
    """The posterior of one parameter's gradient, element by element.

    For a complex parameter each field is complex: its real part describes the gradient's real part, its imaginary part the
    gradient's imaginary part.

    Attributes:
        mean: the posterior mean `mu_g`, in units of the gradient.
        variance: the posterior variance sigma^2 that the noise levels of the state give, in units of gradient^2. It is that
            of the next step, because sigma^2 does not depend on the step's gradient.
        noise_variance: the variance of the mini-batch noise, `b_ghat / a`.
        drift_variance: the variance of the gradient's change from step to step, `b_g / a`.
        gain: how far the mean moves towards each new gradient, `b_g / (b_g + b_ghat)`: 0 ignores it, 1 copies it.
        snr: the signal-to-noise ratio, `mean**2 / variance`.
    """

    mean: Array
    variance: Array
    noise_variance: Array
    drift_variance: Array
    gain: Array
    snr: Array

    @property
    def momentum(self) -> Array:
        """The effective momentum, `1 - gain`: Adam's beta1, one for each element."""
        return 1 - self.gain


class Scales(NamedTuple):
    """Factors that turn a state into variances and gradients: numbers, or arrays that broadcast with the state.

    Attributes:
        drift: the factor from the state's first rate to the variance of the drift, as `rule.variance_scales(hyper)` returns
            it.
        noise: the factor from the state's last rate to the variance of the mini-batch noise, likewise.
        unit: the unit of the state, in units of the gradient: see `vsgd.prior`.
    """

    drift: Array
    noise: Array
    unit: Array = 1.0


def compute_posterior(state: core.State, scales: Scales) -> Posterior:
    """Return the posterior of one parameter's gradient.

    Args:
        state: the state arrays of one parameter in the rule's order, real, float32 or float64.
        scales: the factors of its state.

    Returns:
        Arrays of the state's shape and dtype.

    Example:
        >>> import numpy as np
        >>> hyper = core.VSGD.hyperparameters()
        >>> state = tuple(np.array([value]) for value in (0.3, 1e-3, 3e-2))
        >>> posterior = compute_posterior(state, Scales(*core.VSGD.variance_scales(hyper)))
        >>> float(posterior.gain[0].round(4)), float(posterior.snr[0].round(1))
        (0.0323, 46.5)

    Source: arXiv 2404.06549, Algorithm 1 (`vsgd.core` has the constants).
    """
    square = scales.unit * scales.unit
    mean = state[0] * scales.unit
    drift_variance, noise_variance = state[1] * (scales.drift * square), state[-1] * (scales.noise * square)
    gain = drift_variance / (drift_variance + noise_variance)
    variance = gain * noise_variance
    return Posterior(mean, variance, noise_variance, drift_variance, gain, mean * mean / variance)


def predict_variance(state: core.State, scales: Sequence[Array]) -> Array:
    """Return the variance of the next innovation `ghat - mu_g`: the mean's, the drift's and the noise's variance together.

    Args:
        state: the state arrays of one parameter before a step.
        scales: `rule.variance_scales(hyper)`.

    Returns:
        An array of the state's shape and dtype.
    """
    drift_variance, noise_variance = state[1] * scales[0], state[-1] * scales[1]
    # The quotient first: a product of two variances overflows.
    return drift_variance + noise_variance + drift_variance / (drift_variance + noise_variance) * noise_variance


def compute_surprise(grad: Array, state: core.State, scales: Scales) -> Array:
    """Return how unexpected a gradient is: its squared standardized innovation, near 1 on average where the model fits.

    Args:
        grad: a mini-batch gradient, in the state's dtype.
        state: the state arrays of its parameter before the step that takes it.
        scales: the factors of this state.

    Returns:
        An array of the gradient's shape: `(grad - mu_g)**2` over the predicted variance.
    """
    innovation = grad * (1 / scales.unit) - state[0]
    return innovation * innovation / predict_variance(state, scales)


class NoiseScale(NamedTuple):
    """The "simple" gradient noise scale `tr(Sigma) / |G|**2` (McCandlish et al., arXiv 1812.06162).

    You may add or average the trace and the squared norm of several tensors or steps. Do not average `scale`: compute it from
    the sums.

    Attributes:
        trace: an estimate of the trace of the covariance of one example's gradient.
        squared_norm: an estimate of the squared norm of the true gradient; negative estimates occur where noise dominates.
    """

    trace: Array
    squared_norm: Array

    def __add__(self, other: object) -> NoiseScale:
        """Return the estimates of two tensors together."""
        if not isinstance(other, NoiseScale):
            return NotImplemented
        return NoiseScale(self.trace + other.trace, self.squared_norm + other.squared_norm)

    @property
    def scale(self) -> Array:
        """The noise scale, in examples; negative where noise hides the gradient."""
        return self.trace / self.squared_norm


class NoiseScales(NamedTuple):
    """Gradient noise scales.

    Attributes:
        overall: the noise scale of all parameters together.
        tensors: the noise scale of each parameter, in the adapter's structure.
    """

    overall: NoiseScale
    tensors: Any


def estimate_noise_scale(posterior: Posterior, batch_size: Array, total: Callable[[Array], Array]) -> NoiseScale:
    """Estimate the gradient noise scale of one parameter from its posterior, where the weights are held still.

    The estimate is right at a learning rate of 0. While weights move, the noise in the mean has already moved them, and the
    squared norm can be off by any factor, sign included: `docs/uncertainty.md` measures it. `vsgd.monitor.noise_scale` is
    unbiased while weights move.

    With a gain w and a constant gradient, the mean's error has the variance w / (2 - w) R, where R is the variance of
    the mini-batch noise, and the innovations have the variance `2 R / (2 - w)`. The two rates learn this variance, but not
    its split into drift and noise: the gain does not measure noise. So R is computed from both rates together.

    The estimate also needs gradients far above the prior, and more steps than the filter's memory, `1 / gain`.

    Args:
        posterior: the posterior of a real parameter.
        batch_size: the number of examples that a gradient averages, over all processes and accumulated steps.
        total: a function that sums an array.

    Returns:
        Scalars of the array's library.

    Example:
        >>> import numpy as np
        >>> state = (np.array([1.0, 2.0]), np.array([1.0, 1.0]), np.array([3.0, 3.0]))
        >>> estimate_noise_scale(compute_posterior(state, Scales(1.0, 1.0)), batch_size=10, total=np.sum).scale.item()
        17.5

    Source: arXiv 1812.06162, appendix A; `docs/uncertainty.md` derives the correction.
    """
    innovation_variance = posterior.drift_variance + posterior.noise_variance
    mean_variance = posterior.gain * innovation_variance / 2
    trace = batch_size * total(innovation_variance - mean_variance)
    return NoiseScale(trace, total(posterior.mean * posterior.mean - mean_variance))
