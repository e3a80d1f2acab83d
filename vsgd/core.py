"""The VSGD update, written once for all array libraries.

VSGD (Chen, Kuzina, Esmaeili, Tomczak, "Variational Stochastic Gradient Descent for Deep Neural Networks", TMLR 2025, arXiv
2404.06549) models the gradient of each parameter element as a hidden quantity `g_t` that drifts from step to step. The
mini-batch gradient `ghat_t` observes it with noise:

    g_t    ~ N(mu_{t-1}, 1/tau_g)     tau_g    ~ Gamma(gamma, gamma)
    ghat_t ~ N(g_t, 1/tau_ghat)       tau_ghat ~ Gamma(gamma, K_g gamma)

Stochastic variational inference tracks the posterior mean `mu_g` and the Gamma rates `b_g` and `b_ghat` of both precisions: a
scalar Kalman filter that learns its two noise levels online. The parameter steps by `E[g] / sqrt(E[g^2])`.

A `Rule` collects what an adapter needs to run one variant. This module imports no framework, and an update contains no
numeric literal, so that results keep the dtype of the arrays.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any, NamedTuple

from vsgd.ops import Array, ArrayOps
from vsgd.prior import resolve_prior

#: The state arrays of one parameter, in the order of `Rule.state_names`.
State = tuple[Any, ...]
#: `update(grad, state, coefficients) -> (direction, new_state)`.
Update = Callable[[Any, State, Any], tuple[Any, State]]

# The authors' code has 2a = 2 gamma + 1 + 1e-4 where Algorithm 1 has 2 gamma + 1. This package follows the code.
_SHAPE_OFFSET = 1e-4


@dataclass(frozen=True)
class Rule:
    """One variant of the optimizer.

    Attributes:
        hyperparameters: the NamedTuple class of its hyperparameters, with their defaults.
        state_names: the names of a parameter's state arrays, which all have the parameter's shape.
        initial_state: `initial_state(hyper)` returns the number that fills each state array.
        coefficients: `coefficients(step, hyper)` returns the scalars of step `step`, 1 for the first. It uses operators only,
            so a step may be a number, a 0-d array or a list of 0-d arrays.
        make_update: `make_update(xp)` returns `update(grad, state, coefficients) -> (direction, new_state)`.
        variance_scales: `variance_scales(hyper)` returns two factors: the state's first rate times the first factor is the
            variance of the drift, the last rate times the second one is the variance of the mini-batch noise.

    Example:
        >>> import numpy as np
        >>> hyper = VSGD.hyperparameters()
        >>> state = tuple(np.full(2, value) for value in VSGD.initial_state(hyper))
        >>> update = VSGD.make_update(np)
        >>> direction, state = update(np.array([1.0, -2.0]), state, VSGD.coefficients(1, hyper))
        >>> param = descend(np.zeros(2), direction, lr=0.01, decay=1.0)
        >>> print(param.round(4))
        [-0.0092  0.0098]
    """

    hyperparameters: type[Any]
    state_names: tuple[str, ...]
    initial_state: Callable[[Any], tuple[float, ...]]
    coefficients: Callable[[Any, Any], Any]
    make_update: Callable[[ArrayOps], Update]
    variance_scales: Callable[[Any], tuple[Any, Any]]

    def select_hyperparameters(self, options: Mapping[str, Any]) -> Any:
        """Return the rule's hyperparameters from a mapping that holds at least these, with numbers in place of "auto".

        Numbers become Python floats: NumPy's would compute in their own precision, and backends take an integer as 32 bits.
        """
        resolved = resolve_prior(options)
        values = (resolved[name] for name in self.hyperparameters._fields)
        return self.hyperparameters(*(float(value) if isinstance(value, Real) else value for value in values))


def descend(param: Array, direction: Array, lr: Array, decay: Array) -> Any:
    """Return the parameter after one step, `param * decay - lr * direction`.

    Args:
        param: real numbers, in the dtype of the arithmetic.
        direction: the update's direction, of the parameter's shape and dtype.
        lr: the step size; a number or a 0-d array.
        decay: `1 - lr * weight_decay`, as in AdamW; a number or a 0-d array.
    """
    return param * decay - lr * direction


def _select_prior_shape(hyper: Hyperparameters | ConstantHyperparameters) -> float:
    # The paper's prior is Gamma(gamma, gamma): one number is both the shape, without unit, and the rate, in gradient^2.
    return hyper.prior_strength if hyper.prior_shape is None else hyper.prior_shape


def compute_forgetting(step: Any, kappa: Any, floor: Any) -> Any:
    """Return the learning rate of step `step` of a running mean, `max(step ** -kappa, floor)`.

    Args:
        step: the count of the step, 1 for the first; a number, a 0-d array or a list of 0-d arrays.
        kappa: how fast the running mean forgets at first.
        floor: the smallest learning rate.
    """
    rho = step**-kappa
    # The larger of two numbers by operators alone; exactly the first one where the floor is 0.
    return (rho + floor + abs(rho - floor)) / 2


# VSGD (paper, section 3; the residual form of Algorithm 1)


class Hyperparameters(NamedTuple):
    """Hyperparameters of VSGD, without step size and weight decay.

    Attributes:
        variance_ratio: the paper's `K_g`, the prior of Var(ghat - g) / Var(g_t - g_{t-1}).
        prior_strength: the paper's `gamma`, the strength of the prior on both precisions, in units of gradient^2.
        kappa1: how fast `b_g` forgets: its learning rate at step t is `t ** -kappa1`.
        kappa2: how fast `b_ghat` forgets: its learning rate at step t is `t ** -kappa2`.
        eps: a number added to the root of the second moment, in units of the gradient.
        prior_shape: the shape of the prior on both precisions, without unit; None: `prior_strength`, as in the paper.
        forgetting_floor: the smallest learning rate of `b_g` and `b_ghat`; 0: no floor, as in the paper.
    """

    variance_ratio: float = 30.0
    prior_strength: float = 1e-8
    kappa1: float = 0.81
    kappa2: float = 0.9
    eps: float = 1e-8
    prior_shape: float | None = None
    forgetting_floor: float = 0.0


def compute_shape(hyper: Hyperparameters) -> float:
    """Return the shape `a` of both Gamma posteriors: a variance is its rate `b` over `a`.

    Args:
        hyper: hyperparameters of VSGD; numbers or 0-d arrays.
    """
    return _select_prior_shape(hyper) + 0.5 + _SHAPE_OFFSET / 2


def _compute_variance_scales(hyper: Hyperparameters) -> tuple[float, float]:
    return 1 / compute_shape(hyper), 1 / compute_shape(hyper)


def _compute_initial_state(hyper: Hyperparameters) -> tuple[float, float, float]:
    # The denominator is 2a - 1 in closed form: the authors' subtraction cancels in low precision.
    b_g = compute_shape(hyper) * (2 * hyper.prior_strength) / (2 * _select_prior_shape(hyper) + _SHAPE_OFFSET)
    return 0.0, b_g, hyper.variance_ratio * b_g


class Coefficients(NamedTuple):
    """The scalars of one step of VSGD, the same for all elements."""

    keep_g: Any
    prior_g: Any
    half_rho_g: Any
    keep_ghat: Any
    prior_ghat: Any
    half_rho_ghat: Any
    inverse_shape: float
    eps: float


def _compute_coefficients(step: Any, hyper: Hyperparameters) -> Coefficients:
    rho_1 = compute_forgetting(step, hyper.kappa1, hyper.forgetting_floor)
    rho_2 = compute_forgetting(step, hyper.kappa2, hyper.forgetting_floor)
    return Coefficients(
        keep_g=1 - rho_1,
        prior_g=rho_1 * hyper.prior_strength,
        half_rho_g=rho_1 / 2,
        keep_ghat=1 - rho_2,
        prior_ghat=rho_2 * (hyper.variance_ratio * hyper.prior_strength),
        half_rho_ghat=rho_2 / 2,
        inverse_shape=1 / compute_shape(hyper),
        eps=hyper.eps,
    )


def _make_update(xp: ArrayOps) -> Update:
    def update(grad: Array, state: State, c: Coefficients) -> tuple[Any, State]:
        mu_g, b_g, b_ghat = state
        gain = b_g / (b_g + b_ghat)
        innovation = grad - mu_g
        drift = gain * innovation
        residual = innovation - drift
        mu_g = mu_g + drift
        sigma2 = gain * b_ghat * c.inverse_shape
        b_g = c.keep_g * b_g + (c.half_rho_g * (sigma2 + drift * drift) + c.prior_g)
        b_ghat = c.keep_ghat * b_ghat + (c.half_rho_ghat * (sigma2 + residual * residual) + c.prior_ghat)
        direction = mu_g / (xp.sqrt(mu_g * mu_g + sigma2) + c.eps)
        return direction, (mu_g, b_g, b_ghat)

    return update


#: The rule of VSGD, which learns both noise levels and has three state arrays.
VSGD = Rule(
    Hyperparameters,
    ("mu_g", "b_g", "b_ghat"),
    _compute_initial_state,
    _compute_coefficients,
    _make_update,
    _compute_variance_scales,
)


# Constant VSGD (paper, section 4)


class ConstantHyperparameters(NamedTuple):
    """Hyperparameters of Constant VSGD, without step size and weight decay.

    Attributes:
        variance_ratio: the paper's `K_g`, the fixed ratio Var(ghat - g) / Var(g_t - g_{t-1}); the gain is `1 / (K_g + 1)`.
        prior_strength: the paper's `gamma`, the strength of the prior on the precision, in units of gradient^2.
        kappa: how fast `b` forgets: its learning rate at step t is `t ** -kappa`.
        eps: a number added to the root of the second moment, in units of the gradient.
        prior_shape: the shape of the prior on the precision, without unit; None: `prior_strength`, as in the paper.
        forgetting_floor: the smallest learning rate of `b`; 0: no floor, as in the paper.
    """

    variance_ratio: float = 3.0
    prior_strength: float = 1e-8
    kappa: float = 0.9
    eps: float = 1e-8
    prior_shape: float | None = None
    forgetting_floor: float = 0.0


def compute_constant_shape(hyper: ConstantHyperparameters) -> float:
    """Return the shape `a` of the Gamma posterior of Constant VSGD's precision.

    Args:
        hyper: hyperparameters of Constant VSGD; numbers or 0-d arrays.
    """
    return _select_prior_shape(hyper) + 1 + _SHAPE_OFFSET


def _compute_constant_variance_scales(hyper: ConstantHyperparameters) -> tuple[float, float]:
    return 1 / compute_constant_shape(hyper), hyper.variance_ratio / compute_constant_shape(hyper)


def _compute_constant_initial_state(hyper: ConstantHyperparameters) -> tuple[float, float]:
    shape = compute_constant_shape(hyper)
    return 0.0, shape * (2 * hyper.prior_strength) / (2 * _select_prior_shape(hyper) + _SHAPE_OFFSET)


class ConstantCoefficients(NamedTuple):
    """The scalars of one step of Constant VSGD, the same for all elements."""

    gain: float
    keep: Any
    prior: Any
    half_rho: Any
    half_rho_over_ratio: Any
    sigma2_per_b: float
    eps: float


def _compute_constant_coefficients(step: Any, hyper: ConstantHyperparameters) -> ConstantCoefficients:
    rho = compute_forgetting(step, hyper.kappa, hyper.forgetting_floor)
    ratio = hyper.variance_ratio
    return ConstantCoefficients(
        gain=1 / (ratio + 1),
        keep=1 - rho,
        prior=rho * hyper.prior_strength,
        half_rho=rho / 2,
        half_rho_over_ratio=rho / (2 * ratio),
        sigma2_per_b=ratio / (ratio + 1) / compute_constant_shape(hyper),
        eps=hyper.eps,
    )


def _make_constant_update(xp: ArrayOps) -> Update:
    def update(grad: Array, state: State, c: ConstantCoefficients) -> tuple[Any, State]:
        mu_g, b = state
        innovation = grad - mu_g
        drift = c.gain * innovation
        residual = innovation - drift
        mu_g = mu_g + drift
        sigma2 = c.sigma2_per_b * b
        b = c.keep * b + (
            c.half_rho * (sigma2 + drift * drift) + c.half_rho_over_ratio * (sigma2 + residual * residual) + c.prior
        )
        direction = mu_g / (xp.sqrt(mu_g * mu_g + sigma2) + c.eps)
        return direction, (mu_g, b)

    return update


#: The rule of Constant VSGD, which learns one noise level, has a fixed gain and two state arrays.
CONSTANT_VSGD = Rule(
    ConstantHyperparameters,
    ("mu_g", "b"),
    _compute_constant_initial_state,
    _compute_constant_coefficients,
    _make_constant_update,
    _compute_constant_variance_scales,
)
