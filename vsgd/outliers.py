"""Rules that clip gradients to what the state predicts: a robust Kalman filter.

Without clipping, one corrupted batch with gradients ten thousand times as large raises the noise estimates by the square of
that, and steps stay tiny until the estimates have forgotten it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

from vsgd import core
from vsgd.ops import Array, ArrayOps, inline_function
from vsgd.posterior import predict_variance


class RobustHyperparameters(NamedTuple):
    """`vsgd.core.Hyperparameters` and the outlier threshold."""

    variance_ratio: float = 30.0
    prior_strength: float = 1e-8
    kappa1: float = 0.81
    kappa2: float = 0.9
    eps: float = 1e-8
    prior_shape: float | None = None
    outlier_threshold: float = 5.0


class RobustCoefficients(NamedTuple):
    """`vsgd.core.Coefficients`, and what the limit of a step needs."""

    keep_g: Any
    prior_g: Any
    half_rho_g: Any
    keep_ghat: Any
    prior_ghat: Any
    half_rho_ghat: Any
    inverse_shape: float
    eps: float
    outlier_threshold: float
    drift_scale: float
    noise_scale: float


class RobustConstantHyperparameters(NamedTuple):
    """`vsgd.core.ConstantHyperparameters` and the outlier threshold."""

    variance_ratio: float = 3.0
    prior_strength: float = 1e-8
    kappa: float = 0.9
    eps: float = 1e-8
    prior_shape: float | None = None
    outlier_threshold: float = 5.0


class RobustConstantCoefficients(NamedTuple):
    """`vsgd.core.ConstantCoefficients`, and what the limit of a step needs."""

    gain: float
    keep: Any
    prior: Any
    half_rho: Any
    half_rho_over_ratio: Any
    sigma2_per_b: float
    eps: float
    outlier_threshold: float
    drift_scale: float
    noise_scale: float


def _make_robust(rule: core.Rule, hyperparameters: type[Any], coefficients: type[Any]) -> core.Rule:
    """Return the rule with clipped gradients.

    Args:
        rule: the plain rule.
        hyperparameters: its hyperparameters, followed by `outlier_threshold`.
        coefficients: its coefficients, followed by `outlier_threshold` and the two variance scales.
    """

    def drop_threshold(hyper: Any) -> Any:
        return rule.hyperparameters(*hyper[:-1])

    def compute_coefficients(step: Any, hyper: Any) -> Any:
        plain = drop_threshold(hyper)
        return coefficients(*rule.coefficients(step, plain), hyper.outlier_threshold, *rule.variance_scales(plain))

    def make_update(xp: ArrayOps) -> core.Update:
        update = inline_function(xp, rule.make_update(xp))
        variance = inline_function(xp, predict_variance)

        def robust_update(grad: Array, state: core.State, c: Any) -> tuple[Any, core.State]:
            limit = c.outlier_threshold * xp.sqrt(variance(state, (c.drift_scale, c.noise_scale)))
            grad = xp.minimum(xp.maximum(grad, state[0] - limit), state[0] + limit)
            return update(grad, state, c)

        return robust_update

    return replace(
        rule,
        hyperparameters=hyperparameters,
        initial_state=lambda hyper: rule.initial_state(drop_threshold(hyper)),
        coefficients=compute_coefficients,
        make_update=make_update,
        variance_scales=lambda hyper: rule.variance_scales(drop_threshold(hyper)),
    )


_ROBUST_RULES = {
    core.VSGD: _make_robust(core.VSGD, RobustHyperparameters, RobustCoefficients),
    core.CONSTANT_VSGD: _make_robust(core.CONSTANT_VSGD, RobustConstantHyperparameters, RobustConstantCoefficients),
}


def choose_rule(rule: core.Rule, outlier_threshold: Any) -> core.Rule:
    """Return the rule that runs with this outlier threshold: the plain rule, or the one that clips outliers.

    The robust rule clips each gradient element to `outlier_threshold` predicted standard deviations around the predicted
    gradient. A gradient within the limit is used as it is, so a run without outliers follows the plain rule bit for bit. At the
    first step the prior predicts. NaN stays NaN; infinity is clipped.

    Args:
        rule: `core.VSGD` or `core.CONSTANT_VSGD`.
        outlier_threshold: a number or an array; None for the plain rule.

    Returns:
        The rule itself, or one with the same state and one more hyperparameter, `outlier_threshold`, whose update needs
        `minimum` and `maximum`.

    Example:
        >>> import numpy as np
        >>> rule = choose_rule(core.VSGD, 5.0)
        >>> hyper = rule.hyperparameters(outlier_threshold=5.0)
        >>> update, coefficients = rule.make_update(np), rule.coefficients(1, hyper)
        >>> state = tuple(np.array([value]) for value in rule.initial_state(hyper))
        >>> float(update(np.array([1e4]), state, coefficients)[1][0][0]) < 0.02  # mu_g, with a gain of 1/31
        True

    Source: the clipped innovations of Masreliez and Martin (1977), with the variances of arXiv 2404.06549's model.
    """
    return rule if outlier_threshold is None else _ROBUST_RULES[rule]
