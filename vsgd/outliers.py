"""Rules that clip gradients to what the state predicts: a robust Kalman filter.

Without clipping, one corrupted batch with gradients ten thousand times as large raises the noise estimates by the square of
that, and steps stay tiny until the estimates have forgotten it. A run of large gradients is not an outlier: each one widens
the prediction, so that the filter accepts them after a few steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from operator import attrgetter
from typing import Any, NamedTuple

from vsgd import core
from vsgd.ops import Array, ArrayOps, inline_function
from vsgd.posterior import predict_variance

#: One gradient far beyond the limit widens the predicted variance by at least this share: 49 of them widen it a hundredfold.
_WIDENING = 0.1


class RobustHyperparameters(NamedTuple):
    """`vsgd.core.Hyperparameters` and the outlier threshold."""

    variance_ratio: float = 30.0
    prior_strength: float = 1e-8
    kappa1: float = 0.81
    kappa2: float = 0.9
    eps: float = 1e-8
    prior_shape: float | None = None
    forgetting_floor: float = 0.0
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
    allowed: float
    inverse_allowed: float
    widest: Any
    full: float
    drift_scale: float
    noise_scale: float


class RobustConstantHyperparameters(NamedTuple):
    """`vsgd.core.ConstantHyperparameters` and the outlier threshold."""

    variance_ratio: float = 3.0
    prior_strength: float = 1e-8
    kappa: float = 0.9
    eps: float = 1e-8
    prior_shape: float | None = None
    forgetting_floor: float = 0.0
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
    allowed: float
    inverse_allowed: float
    widest: Any
    full: float
    drift_scale: float
    noise_scale: float


def _make_robust(
    rule: core.Rule, hyperparameters: type[Any], coefficients: type[Any], half_rho: Callable[[Any], Any]
) -> core.Rule:
    """Return the rule with clipped gradients.

    Args:
        rule: the plain rule.
        hyperparameters: its hyperparameters, followed by `outlier_threshold`.
        coefficients: its coefficients, followed by the squared innovation at the limit (in predicted variances), its inverse,
            the largest widening, the largest doubt, which is 1, and the two variance scales.
        half_rho: returns half the forgetting rate of the noise from the rule's coefficients.
    """

    def drop_threshold(hyper: Any) -> Any:
        return rule.hyperparameters(*tuple(hyper)[:-1])

    def compute_coefficients(step: Any, hyper: Any) -> Any:
        plain = drop_threshold(hyper)
        of_step, allowed = rule.coefficients(step, plain), hyper.outlier_threshold * hyper.outlier_threshold
        # Early in a run, where one gradient weighs much in the plain rule, it also widens much.
        widest = _WIDENING + 2 * half_rho(of_step) * allowed
        return coefficients(*of_step, allowed, 1 / allowed, widest, 1.0, *rule.variance_scales(plain))

    def make_update(xp: ArrayOps) -> core.Update:
        update = inline_function(xp, rule.make_update(xp))
        predict = inline_function(xp, predict_variance)
        # A compiler cannot loop over the rates: VSGD has two, Constant VSGD one.
        one_rate = len(rule.state_names) == 2
        join = inline_function(xp, (lambda mu_g, first, last: (mu_g, last)) if one_rate else lambda *state: state)

        def robust_update(grad: Array, state: core.State, c: Any) -> tuple[Any, core.State]:
            mu_g, first, last = state[0], state[1], state[-1]
            variance = predict(state, (c.drift_scale, c.noise_scale))
            # Arrays, because `torch.maximum` rejects numbers. A difference to one is exactly zero within the limit.
            zero = mu_g - mu_g
            allowed = zero + c.allowed
            innovation = grad - mu_g
            excess = (xp.maximum(innovation * innovation / variance, allowed) - allowed) * c.inverse_allowed
            # Both rates widen alike: an outlier carries no information about their ratio, the gain.
            widening = xp.minimum(excess, zero + c.widest)
            first, last = first + first * widening, last + last * widening
            limit = xp.sqrt((allowed + allowed * widening) * variance)
            grad = xp.minimum(xp.maximum(grad, mu_g - limit), mu_g + limit)
            direction, new = update(grad, join(mu_g, first, last), c)
            # The farther a gradient is, the less the rates learn from it.
            doubt = xp.minimum(excess, zero + c.full)
            new_first, new_last = new[1] + doubt * (first - new[1]), new[-1] + doubt * (last - new[-1])
            return direction, join(new[0], new_first, new_last)

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
    core.VSGD: _make_robust(core.VSGD, RobustHyperparameters, RobustCoefficients, attrgetter("half_rho_ghat")),
    core.CONSTANT_VSGD: _make_robust(
        core.CONSTANT_VSGD, RobustConstantHyperparameters, RobustConstantCoefficients, attrgetter("half_rho")
    ),
}


def choose_rule(rule: core.Rule, outlier_threshold: Any) -> core.Rule:
    """Return the rule that runs with this outlier threshold: the plain rule, or the one that clips outliers.

    The robust rule clips each gradient element to `outlier_threshold` predicted standard deviations around the predicted
    gradient. A gradient within the limit is used as it is, so a run without outliers follows the plain rule, bit for bit except
    under XLA, which contracts other products in another program. At the first step the prior predicts. NaN stays NaN; infinity
    is clipped.

    A gradient beyond the limit first widens the predicted variance, and so the limit: by what it exceeds the limit, and at most
    by a factor of `1.1 + outlier_threshold**2 * t**-kappa` at step `t`. Both rates grow by that factor, which keeps the gain.
    Apart from this growth, the rates ignore a gradient whose square is at least twice the limit's. One outlier thus does
    little harm, and a run of them is accepted.

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
        >>> float(update(np.array([1e4]), state, coefficients)[1][0][0]) < 0.1  # mu_g, with a gain of 1/31
        True

    Source: the clipped innovations of Masreliez and Martin (1977), with the variances of arXiv 2404.06549's model.
    """
    return rule if outlier_threshold is None else _ROBUST_RULES[rule]
