"""The gradient noise scale without bias while weights move, from the squared norms of a batch's parts and of the whole.

The parts are the micro-batches of an accumulation or the ranks of data parallelism. `vsgd.torch.noise_scale` measures them in
a torch training. With other frameworks, compute the norms in your own step: `docs/uncertainty.md` has a recipe for optax.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from vsgd.posterior import Array, NoiseScale
from vsgd.validation import validate_numbers

__all__ = ["MeasuredNoiseScale", "average_estimates", "estimate_from_parts"]


class MeasuredNoiseScale(NamedTuple):
    """The gradient noise scale of some steps, with its standard error.

    Attributes:
        trace: the trace of the covariance of one example's gradient, averaged over the steps.
        squared_norm: the squared norm of the true gradient, averaged over the steps.
        error: the standard error of `scale`.
        steps: the number of steps.
    """

    trace: float
    squared_norm: float
    error: float
    steps: int

    @property
    def scale(self) -> float:
        """The noise scale, in examples; negative or infinite where noise hides the gradient."""
        return self.trace / self.squared_norm if self.squared_norm else math.inf


def estimate_from_parts(part_square: Array, whole_square: Array, *, parts: int, micro_batch_size: float) -> NoiseScale:
    """Estimate the noise scale of one step without bias.

    A mean over b examples has the expected squared norm `|G|**2 + trace / b`. The parts and the whole differ in b, which gives
    two equations for `|G|**2` and the trace. One step's estimates are noisy: average many steps by `average_estimates`.

    The parts must be of equal size and drawn independently. If they are drawn without replacement from N examples,
    `squared_norm` is too small by `trace / N`, and a scale of B too large by a factor of about `1 + B / N`.

    Args:
        part_square: the squared norm of a part's mean gradient, averaged over the parts.
        whole_square: the squared norm of the mean gradient of all parts together.
        parts: the number of parts.
        micro_batch_size: the number of examples in a part.

    Returns:
        The estimates, in the shape of the arguments: numbers for one step, arrays for several.

    Raises:
        ValueError: `parts` or `micro_batch_size` is out of its range.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> examples = 1 + 2 * rng.standard_normal((5000, 4, 8, 3))  # steps, parts, examples, elements
        >>> part_square = (examples.mean(2) ** 2).sum(-1).mean(1)
        >>> whole_square = (examples.mean((1, 2)) ** 2).sum(-1)
        >>> estimates = estimate_from_parts(part_square, whole_square, parts=4, micro_batch_size=8)
        >>> [round(float(each.mean()), 1) for each in estimates]
        [12.0, 3.0]

    Source: arXiv 1812.06162, appendix A.1.
    """
    validate_numbers(parts=parts, micro_batch_size=micro_batch_size)
    excess = (part_square - whole_square) / (parts - 1)
    return NoiseScale(excess * (parts * micro_batch_size), whole_square - excess)


def average_estimates(estimates: NoiseScale) -> MeasuredNoiseScale:
    """Average the estimates of several steps, traces and squared norms separately.

    The standard error is that of a ratio of two means, to first order (delta method). It assumes that the estimates of
    different steps are independent, as the batches are, and that the mean squared norm is well above its own standard error.
    Otherwise the standard error is a large part of the scale, and the scale's distribution is skewed to high values.

    Args:
        estimates: vectors with an element for each step. Steps that are not finite are left out.

    Returns:
        The average. Without a finite step it is NaN. The standard error of a single step, or of gradients that are all zero, is
        NaN.

    Example:
        >>> average_estimates(NoiseScale(np.array([8.0, 10.0, 12.0]), np.array([1.0, 3.0, 2.0])))
        MeasuredNoiseScale(trace=10.0, squared_norm=2.0, error=1.2583057392117918, steps=3)
    """
    pairs = np.stack([np.asarray(each, np.float64) for each in estimates])
    pairs = pairs[:, np.isfinite(pairs).all(axis=0)]
    steps = pairs.shape[1]
    if not steps:
        return MeasuredNoiseScale(math.nan, math.nan, math.nan, 0)
    trace, squared_norm = pairs.mean(axis=1).tolist()
    measured = MeasuredNoiseScale(trace, squared_norm, math.nan, steps)
    if steps == 1 or not squared_norm:
        return measured
    residuals = pairs[0] - measured.scale * pairs[1]
    return measured._replace(error=float(residuals.std(ddof=1)) / math.sqrt(steps) / abs(squared_norm))
