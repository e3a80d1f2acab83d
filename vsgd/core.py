"""The VSGD update, stated once, for every array library.

VSGD (Chen, Kuzina, Esmaeili, Tomczak, "Variational Stochastic Gradient Descent for Deep Neural Networks", TMLR 2025,
arXiv 2404.06549) treats the gradient of each parameter as a hidden quantity `g_t` that drifts from step to step and that a
mini-batch shows with noise, `ghat_t`. Its posterior mean `mu_g` and the Gamma rates `b_g`, `b_ghat` of the two precisions are
filtered by stochastic variational inference: a scalar Kalman filter whose two noise levels are learned online.

A `Rule` is all that an adapter needs: hyperparameters, state names, initial state, the coefficients of a step, and
`make_update(xp)`, which builds the update for an array namespace `xp`. `xp` offers `sqrt` (and for `vsgd.outliers` `minimum`
and `maximum`); its arrays offer operators. No framework is imported here, and `update` holds no numeric literal, so that dtypes
stay those of the arrays.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, NamedTuple

#: An array, scalar or list of arrays of any library, with arithmetic operators.
Array = Any
#: The state of one parameter, in the order of `Rule.state_names`.
State = tuple[Array, ...]
#: `update(grad, state, coefficients) -> (direction, state)`.
Update = Callable[[Array, State, Any], tuple[Array, State]]

# The authors' code has 2a = 2 gamma + 1 + 1e-4, where Algorithm 1 has 2 gamma + 1; we match the code.
_SHAPE_OFFSET = 1e-4


class _Range(NamedTuple):
    label: str
    allowed: str
    holds: Callable[[Any], bool]


_POSITIVE = ("a finite number > 0", lambda x: 0 < x <= sys.float_info.max)
_NON_NEGATIVE = ("a finite number >= 0", lambda x: 0 <= x <= sys.float_info.max)
# Below, the prior's share of b underflows in float32, and with it b.
_ABOVE_UNDERFLOW = ("a finite number >= 1e-30", lambda x: 1e-30 <= x <= sys.float_info.max)
_FORGETTING = ("a number in (0.5, 1]", lambda x: 0.5 < x <= 1.0)

# By the names of torch and NumPy, and where Keras and optax have others by theirs.
_RANGES = {
    "lr": _Range("learning rate", *_NON_NEGATIVE),
    "learning_rate": _Range("learning rate", *_NON_NEGATIVE),
    "variance_ratio": _Range("variance_ratio value", *_POSITIVE),
    "prior_strength": _Range("prior_strength value", *_ABOVE_UNDERFLOW),
    "kappa": _Range("kappa value", *_FORGETTING),
    "kappa1": _Range("kappa1 value", *_FORGETTING),
    "kappa2": _Range("kappa2 value", *_FORGETTING),
    "eps": _Range("epsilon value", *_NON_NEGATIVE),
    "epsilon": _Range("epsilon value", *_NON_NEGATIVE),
    "weight_decay": _Range("weight_decay value", *_NON_NEGATIVE),
    "outlier_threshold": _Range("outlier_threshold value", *_POSITIVE),
    "batch_size": _Range("batch_size value", *_POSITIVE),
    "scale": _Range("scale value", *_POSITIVE),
    "seed": _Range("seed value", "an integer", lambda x: isinstance(x, Integral)),
    "prior_shape": _Range("prior_shape value", "None or a finite number >= 0", _NON_NEGATIVE[1]),
}
_MAY_BE_NONE = {"prior_shape"}

#: What state may be stored as, where the arithmetic is float32.
STATE_DTYPES = ("float32", "bfloat16")


def validate(**values: Any) -> None:
    """Check hyperparameters given as Python numbers.

    Arrays, tensors and tracers of one number pass, since their value may not be known yet.

    Args:
        **values: hyperparameters by name: `lr` or `learning_rate`, `weight_decay`, `seed`, and those of `Hyperparameters`
            and `ConstantHyperparameters`, where `epsilon` may stand for `eps`; `outlier_threshold`; `batch_size`; `scale`.

    Raises:
        KeyError: a name is none of these.
        ValueError: a value is no number or lies outside its range.

    Example:
        >>> validate(lr=0.01, kappa1=0.81)
        >>> validate(lr=-1)
        Traceback (most recent call last):
        ValueError: Invalid learning rate: -1 (lr must be a finite number >= 0)
    """
    for name, value in values.items():
        if value is None and name in _MAY_BE_NONE:
            continue
        label, allowed, holds = _RANGES[name]
        if not (_holds(holds, value) if isinstance(value, Real) else _is_one_number(value)):
            raise ValueError(f"Invalid {label}: {value!r} ({name} must be {allowed})")


def _holds(holds: Callable[[Any], bool], value: Any) -> bool:
    # NumPy's float32 would overflow on comparing it with Python's largest number.
    return holds(float(value) if hasattr(value, "dtype") and not isinstance(value, Integral) else value)


def _is_one_number(array: Any) -> bool:
    # Complex too: `optax.inject_hyperparams` makes all numbers so, where there are complex parameters.
    is_number = any(kind in str(getattr(array, "dtype", "")) for kind in ("float", "int", "complex"))
    return is_number and {*getattr(array, "shape", ())} <= {1}


def validate_flags(**flags: Any) -> None:
    """Check switches, for which None may stand.

    Args:
        **flags: switches by name.

    Raises:
        ValueError: a value is none of True, False and None.

    Example:
        >>> validate_flags(foreach=None, maximize=True)
        >>> validate_flags(foreach="no")
        Traceback (most recent call last):
        ValueError: Invalid foreach value: 'no' (foreach must be True, False or None)
    """
    for name, value in flags.items():
        # By equality, so that NumPy's booleans are some too.
        if getattr(value, "shape", ()) != () or (value is not None and value not in (True, False)):
            raise ValueError(f"Invalid {name} value: {value!r} ({name} must be True, False or None)")


def validate_state_dtype(state_dtype: Any) -> None:
    """Check what the state is to be stored as.

    Args:
        state_dtype: one of `STATE_DTYPES`.

    Raises:
        ValueError: it is none of them.

    Example:
        >>> validate_state_dtype("float16")
        Traceback (most recent call last):
        ValueError: Invalid state_dtype value: 'float16' (state_dtype must be 'float32' or 'bfloat16')
    """
    if not isinstance(state_dtype, str) or state_dtype not in STATE_DTYPES:
        allowed = " or ".join(map(repr, STATE_DTYPES))
        raise ValueError(f"Invalid state_dtype value: {state_dtype!r} (state_dtype must be {allowed})")


class Hyperparameters(NamedTuple):
    """Hyperparameters of VSGD, but for the step size and weight decay.

    Attributes:
        variance_ratio: the paper's `K_g`, the prior of Var(ghat - g) / Var(g_t - g_{t-1}).
        prior_strength: the paper's `gamma`, the strength of the prior on both precisions, in units of gradient^2.
        kappa1: how fast `b_g` forgets: its learning rate at step t is `t ** -kappa1`.
        kappa2: the same for `b_ghat`.
        eps: added to the root of the second moment, in units of the gradient.
        prior_shape: the shape of the prior on both precisions, a number without unit; None: `prior_strength`, as in the paper.
    """

    variance_ratio: float = 30.0
    prior_strength: float = 1e-8
    kappa1: float = 0.81
    kappa2: float = 0.9
    eps: float = 1e-8
    prior_shape: float | None = None


class Coefficients(NamedTuple):
    """The scalars of one step of VSGD, computed once for all elements."""

    keep_g: Array
    prior_g: Array
    half_rho_g: Array
    keep_ghat: Array
    prior_ghat: Array
    half_rho_ghat: Array
    inverse_shape: float
    eps: float


def _prior_shape(hyper: Hyperparameters | ConstantHyperparameters) -> float:
    # The paper's prior is Gamma(gamma, gamma): one number for the shape, which has no unit, and for the rate, which has one.
    return hyper.prior_strength if hyper.prior_shape is None else hyper.prior_shape


def shape(hyper: Hyperparameters) -> float:
    """The shape `a` of both Gamma posteriors: a variance is its rate `b` over `a`.

    Args:
        hyper: of VSGD; numbers or 0-d arrays.

    Returns:
        A number without unit, or a 0-d array.
    """
    return _prior_shape(hyper) + 0.5 + _SHAPE_OFFSET / 2


def _variance_scales(hyper: Hyperparameters) -> tuple[float, float]:
    return 1 / shape(hyper), 1 / shape(hyper)


def _initial_state(hyper: Hyperparameters) -> tuple[float, float, float]:
    # 2 gamma + 1e-4 in closed form: the authors' 2a - 1 cancels in low precision.
    b_g = shape(hyper) * (2 * hyper.prior_strength) / (2 * _prior_shape(hyper) + _SHAPE_OFFSET)
    return 0.0, b_g, hyper.variance_ratio * b_g


def _coefficients(step: Array, hyper: Hyperparameters) -> Coefficients:
    rho_1 = step**-hyper.kappa1
    rho_2 = step**-hyper.kappa2
    return Coefficients(
        keep_g=1 - rho_1,
        prior_g=rho_1 * hyper.prior_strength,
        half_rho_g=rho_1 / 2,
        keep_ghat=1 - rho_2,
        prior_ghat=rho_2 * (hyper.variance_ratio * hyper.prior_strength),
        half_rho_ghat=rho_2 / 2,
        inverse_shape=1 / shape(hyper),
        eps=hyper.eps,
    )


def _make_update(xp: Any) -> Update:
    def update(grad: Array, state: State, c: Coefficients) -> tuple[Array, State]:
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


class ConstantHyperparameters(NamedTuple):
    """Hyperparameters of Constant VSGD, but for the step size and weight decay.

    Attributes:
        variance_ratio: the paper's `K_g`, the fixed ratio Var(ghat - g) / Var(g_t - g_{t-1}); the gain is `1 / (K_g + 1)`.
        prior_strength: the paper's `gamma`, the strength of the prior on the precision, in units of gradient^2.
        kappa: how fast `b` forgets: its learning rate at step t is `t ** -kappa`.
        eps: added to the root of the second moment, in units of the gradient.
        prior_shape: the shape of the prior on the precision, a number without unit; None: `prior_strength`, as in the paper.
    """

    variance_ratio: float = 3.0
    prior_strength: float = 1e-8
    kappa: float = 0.9
    eps: float = 1e-8
    prior_shape: float | None = None


class ConstantCoefficients(NamedTuple):
    """The scalars of one step of Constant VSGD, computed once for all elements."""

    gain: float
    keep: Array
    prior: Array
    half_rho: Array
    half_rho_over_ratio: Array
    sigma2_per_b: float
    eps: float


def constant_shape(hyper: ConstantHyperparameters) -> float:
    """The shape `a` of the Gamma posterior of Constant VSGD's one precision.

    Args:
        hyper: of Constant VSGD; numbers or 0-d arrays.

    Returns:
        A number without unit, or a 0-d array.
    """
    return _prior_shape(hyper) + 1 + _SHAPE_OFFSET


def _constant_variance_scales(hyper: ConstantHyperparameters) -> tuple[float, float]:
    return 1 / constant_shape(hyper), hyper.variance_ratio / constant_shape(hyper)


def _constant_initial_state(hyper: ConstantHyperparameters) -> tuple[float, float]:
    return 0.0, constant_shape(hyper) * (2 * hyper.prior_strength) / (2 * _prior_shape(hyper) + _SHAPE_OFFSET)


def _constant_coefficients(step: Array, hyper: ConstantHyperparameters) -> ConstantCoefficients:
    rho = step**-hyper.kappa
    ratio = hyper.variance_ratio
    return ConstantCoefficients(
        gain=1 / (ratio + 1),
        keep=1 - rho,
        prior=rho * hyper.prior_strength,
        half_rho=rho / 2,
        half_rho_over_ratio=rho / (2 * ratio),
        sigma2_per_b=ratio / (ratio + 1) / constant_shape(hyper),
        eps=hyper.eps,
    )


def _make_constant_update(xp: Any) -> Update:
    def update(grad: Array, state: State, c: ConstantCoefficients) -> tuple[Array, State]:
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


def descend(param: Array, direction: Array, lr: Array, decay: Array) -> Array:
    """Step a parameter: `theta' = theta * decay - lr * direction`.

    Args:
        param: of real numbers, in the dtype of the arithmetic.
        direction: what the update gave, of the parameter's shape and dtype.
        lr: the step size; a number or a 0-d array.
        decay: `1 - lr * weight_decay`, as in AdamW; likewise.

    Returns:
        The new parameter.
    """
    return param * decay - lr * direction


@dataclass(frozen=True)
class Rule:
    """One variant of the optimizer, in all that an adapter needs to run it.

    Attributes:
        hyperparameters: the NamedTuple type of its hyperparameters, with their defaults.
        state_names: names of the state arrays of a parameter, each of the parameter's shape, in the order of `State`.
        initial_state: `initial_state(hyper)` gives the scalar that fills each state array.
        coefficients: `coefficients(step, hyper)` gives the scalars of step `step` (1 at the first), computed with
            operators only: a number, a 0-d array or a list of them.
        make_update: `make_update(xp)` gives `update(grad, state, coefficients) -> (direction, state)`.
        variance_scales: `variance_scales(hyper)` gives what the first rate of the state, times it, makes the variance of the
            drift, and the last rate that of the mini-batch noise.

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
    coefficients: Callable[[Array, Any], Any]
    make_update: Callable[[Any], Update]
    variance_scales: Callable[[Any], tuple[Any, Any]]


#: The rule of VSGD, with both noise levels learned and three arrays of state (paper, section 3; residual form of Algorithm 1).
VSGD = Rule(Hyperparameters, ("mu_g", "b_g", "b_ghat"), _initial_state, _coefficients, _make_update, _variance_scales)

#: The rule of Constant VSGD, with one noise level learned, a fixed gain and two arrays of state (paper, section 4).
CONSTANT_VSGD = Rule(
    ConstantHyperparameters,
    ("mu_g", "b"),
    _constant_initial_state,
    _constant_coefficients,
    _make_constant_update,
    _constant_variance_scales,
)
