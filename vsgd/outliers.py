"""Gradients beyond what the state predicts, cut to what it does: a robust Kalman filter.

One corrupted batch with gradients ten thousand times as large would raise the noise estimates by the square of that, and
steps would be tiny for as long as they take to forget it.
"""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from vsgd import core
from vsgd.posterior import predicted_variance


def _extended(plain: type[Any], name: str, *added: str, **defaults: Any) -> type[Any]:
    """A type of named tuples with more fields, the last ones with defaults."""
    values = (*plain._field_defaults.values(), *defaults.values())
    return namedtuple(name, (*plain._fields, *added, *defaults), defaults=values, module=__name__)


#: What a step needs besides.
_LIMITS = ("outlier_threshold", "drift_scale", "noise_scale")

# By name, for what holds one is pickled with it.
RobustHyperparameters = _extended(core.Hyperparameters, "RobustHyperparameters", outlier_threshold=5.0)
RobustConstantHyperparameters = _extended(core.ConstantHyperparameters, "RobustConstantHyperparameters", outlier_threshold=5.0)
RobustCoefficients = _extended(core.Coefficients, "RobustCoefficients", *_LIMITS)
RobustConstantCoefficients = _extended(core.ConstantCoefficients, "RobustConstantCoefficients", *_LIMITS)


def _as_it_is(function: Callable[..., Any]) -> Callable[..., Any]:
    return function


def _robust(rule: core.Rule, hyperparameters: type[Any], coefficients: type[Any]) -> core.Rule:
    """The rule with one more hyperparameter, and what it needs of it in a step."""
    plain = rule.hyperparameters._fields

    def of_rule(hyper: Any) -> Any:
        return rule.hyperparameters(*hyper[: len(plain)])

    def of_step(step: Any, hyper: Any) -> Any:
        scales = rule.variance_scales(of_rule(hyper))
        return coefficients(*rule.coefficients(step, of_rule(hyper)), hyper.outlier_threshold, *scales)

    def make_update(xp: Any) -> core.Update:
        inline = getattr(xp, "inline", _as_it_is)
        update, variance = inline(rule.make_update(xp)), inline(predicted_variance)

        def robust_update(grad: core.Array, state: core.State, c: Any) -> tuple[core.Array, core.State]:
            limit = c.outlier_threshold * xp.sqrt(variance(state, (c.drift_scale, c.noise_scale)))
            grad = xp.minimum(xp.maximum(grad, state[0] - limit), state[0] + limit)
            return update(grad, state, c)

        return robust_update

    return replace(
        rule,
        hyperparameters=hyperparameters,
        initial_state=lambda hyper: rule.initial_state(of_rule(hyper)),
        coefficients=of_step,
        make_update=make_update,
        variance_scales=lambda hyper: rule.variance_scales(of_rule(hyper)),
    )


ROBUST = {
    core.VSGD: _robust(core.VSGD, RobustHyperparameters, RobustCoefficients),
    core.CONSTANT_VSGD: _robust(core.CONSTANT_VSGD, RobustConstantHyperparameters, RobustConstantCoefficients),
}


def guarded(rule: core.Rule, hyper: Any, outlier_threshold: Any) -> tuple[core.Rule, Any]:
    """The rule that runs, and its hyperparameters from the plain rule's: see `rule_of`."""
    rule = rule_of(rule, outlier_threshold)
    return rule, hyper if outlier_threshold is None else rule.hyperparameters(*hyper, outlier_threshold)


def rule_of(rule: core.Rule, outlier_threshold: Any) -> core.Rule:
    """The rule that runs: where there is a threshold, the one that cuts outliers.

    What lies beyond so many predicted standard deviations, element by element, is cut to there before the update. A gradient
    within is used as it is, so that without outliers the trajectory is the plain rule's own. At the first step the prior
    predicts. NaN stays NaN; infinity is cut.

    Args:
        rule: `core.VSGD` or `core.CONSTANT_VSGD`.
        outlier_threshold: a number or an array; None: none.

    Returns:
        The rule itself, or one with the same state and one more hyperparameter, `outlier_threshold`. The array namespace of
        that offers `minimum` and `maximum`, which keep NaN, and `inline` where functions that others call must be made for it.

    Example:
        >>> import numpy as np
        >>> rule = rule_of(core.VSGD, 5.0)
        >>> hyper = rule.hyperparameters(outlier_threshold=5.0)
        >>> update, coefficients = rule.make_update(np), rule.coefficients(1, hyper)
        >>> state = tuple(np.array([value]) for value in rule.initial_state(hyper))
        >>> float(update(np.array([1e4]), state, coefficients)[1][0][0]) < 0.02  # mu_g, of a gain of 1/31
        True

    Source: the innovations' clipping of Masreliez and Martin (1977), with the variances of arXiv 2404.06549's model.
    """
    return rule if outlier_threshold is None else ROBUST[rule]
