"""Checks of the options that all adapters share, each with one sentence of error, and the documentation of these options."""

from __future__ import annotations

import re
import sys
import textwrap
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any, NamedTuple, TypeVar

_Documented = TypeVar("_Documented")


class _Range(NamedTuple):
    label: str
    allowed: str
    holds: Callable[[Any], bool]


_POSITIVE = ("a finite number > 0", lambda x: 0 < x <= sys.float_info.max)
_NON_NEGATIVE = ("a finite number >= 0", lambda x: 0 <= x <= sys.float_info.max)
_AT_LEAST_TWO = ("an integer >= 2", lambda x: isinstance(x, Integral) and int(x) >= 2)
_FORGETTING = ("a number in (0.5, 1]", lambda x: 0.5 < x <= 1.0)

# Keys are the names in torch and NumPy, and the names in Keras and optax where these differ.
_RANGES = {
    "lr": _Range("learning rate", *_NON_NEGATIVE),
    "learning_rate": _Range("learning rate", *_NON_NEGATIVE),
    "variance_ratio": _Range("variance_ratio value", "a number in [1e-15, 1e15]", lambda x: 1e-15 <= x <= 1e15),
    # A smaller one underflows in float32, and so does b.
    "prior_strength": _Range(
        "prior_strength value", "'auto' or a finite number >= 1e-30", lambda x: 1e-30 <= x <= sys.float_info.max
    ),
    "kappa": _Range("kappa value", *_FORGETTING),
    "kappa1": _Range("kappa1 value", *_FORGETTING),
    "kappa2": _Range("kappa2 value", *_FORGETTING),
    "eps": _Range("epsilon value", *_NON_NEGATIVE),
    "epsilon": _Range("epsilon value", *_NON_NEGATIVE),
    "weight_decay": _Range("weight_decay value", *_NON_NEGATIVE),
    # Its square is finite and positive in float32, even after all factors of `vsgd.outliers`.
    "outlier_threshold": _Range("outlier_threshold value", "a number in [0.001, 1e6]", lambda x: 1e-3 <= x <= 1e6),
    "batch_size": _Range("batch_size value", *_POSITIVE),
    "micro_batch_size": _Range("micro_batch_size value", *_POSITIVE),
    "parts": _Range("parts value", *_AT_LEAST_TWO),
    "window": _Range("window value", *_AT_LEAST_TWO),
    "scale": _Range("scale value", *_POSITIVE),
    "seed": _Range("seed value", "an integer", lambda x: isinstance(x, Integral)),
    "prior_shape": _Range("prior_shape value", "None or a finite number >= 0", _NON_NEGATIVE[1]),
    "forgetting_floor": _Range("forgetting_floor value", "a number in [0, 1)", lambda x: 0 <= x < 1),
    "gain_rate": _Range("gain_rate value", "a number in (0, 1)", lambda x: 0 < x < 1),
    "max_elements": _Range("max_elements value", "None or an integer >= 1", lambda x: isinstance(x, Integral) and int(x) >= 1),
    "gradient_unit": _Range("gradient_unit value", "None or a finite number > 0", _POSITIVE[1]),
}
# Values that are no numbers.
_NAMED = {"prior_shape": None, "prior_strength": "auto", "gradient_unit": None, "max_elements": None}

#: The dtypes in which an optimizer can store what is computed in float32.
STATE_DTYPES = ("float32", "bfloat16")

# Filled in by `document_options`, so that all adapters describe an option in the same words.
_DESCRIPTIONS = {
    "variance_ratio": "the paper's K_g, the prior of Var(ghat - g) / Var(g_t - g_{t-1}), noise over drift.",
    "constant_variance_ratio": "the paper's K_g, the fixed ratio Var(ghat - g) / Var(g_t - g_{t-1}), noise over drift.",
    "prior_strength": (
        "the paper's gamma, in units of gradient^2: multiply it by c^2 if you multiply the loss by c. 'auto': the first "
        "gradient calibrates the run, which then does not depend on the loss's scale; `prior_shape` None is 0, and the prior "
        "and `eps` are in units of that gradient's root mean square. A first gradient that is all zero or not finite changes "
        "nothing, and the next one calibrates."
    ),
    "kappa1": "how fast b_g forgets, in (0.5, 1]: its learning rate at step t is t ** -kappa1.",
    "kappa2": "how fast b_ghat forgets, in (0.5, 1]: its learning rate at step t is t ** -kappa2.",
    "kappa": "how fast b forgets, in (0.5, 1]: its learning rate at step t is t ** -kappa.",
    "eps": "a number added to the root of the second moment, in units of the gradient.",
    "outlier_threshold": (
        "clip each gradient element to this many predicted standard deviations around its prediction; None: use every "
        "gradient as it is. See `vsgd.outliers`."
    ),
    "prior_shape": (
        "the shape of the prior, a number without unit; None: `prior_strength`, as in the paper. With 0.0 a run can be "
        "independent of the loss's scale: see `docs/calibration.md`."
    ),
    "forgetting_floor": (
        "the smallest learning rate of b, b_g and b_ghat, in [0, 1), used where t ** -kappa is below it. With 0.01 they "
        "remember one or two hundred steps of a long run, so that the noise estimates follow noise that falls."
    ),
    "state_dtype": (
        '"float32", or "bfloat16" for state in half the memory, stochastically rounded; the arithmetic stays float32. float64 '
        "and complex parameters keep state of their own precision."
    ),
    "stochastic_rounding": (
        "round bfloat16 parameters stochastically, once per step after weight decay and update, so that steps too small for "
        "bfloat16 still count on average."
    ),
    "scale": (
        "the variance at the start of a run, divided by the mean squared gradient. With a larger one, training starts slower. "
        "With a far smaller one, training can fail."
    ),
    "seed": (
        "an integer, the seed of stochastic rounding. The random bits are a hash of the seed, the parameter's index, the step "
        "and the element's index, so a resumed or sharded run draws the same bits."
    ),
}


def document_options(**descriptions: str) -> Callable[[_Documented], _Documented]:
    """Return a decorator that replaces each argument's `{name}` in a docstring by the description of that option.

    Args:
        **descriptions: descriptions of an adapter's own options, by name; those of shared options are built in.
    """

    def describe(match: re.Match[str]) -> str:
        indent, argument, option = match.groups()
        text = {**_DESCRIPTIONS, **descriptions}[option]
        return textwrap.fill(text, 120, initial_indent=f"{indent}{argument}: ", subsequent_indent=f"{indent}    ")

    def decorate(documented: _Documented) -> _Documented:
        documented.__doc__ = re.sub(r"(?m)^( *)(\w+): \{(\w+)\}$", describe, documented.__doc__ or "")
        return documented

    return decorate


def validate_numbers(array_type: Any = None, /, **values: Any) -> None:
    """Check hyperparameters: Python's and NumPy's numbers, and an adapter's arrays of no dimension.

    Args:
        array_type: the type of arrays that pass whatever their value, which may not be known yet; None: arrays are refused.
        **values: hyperparameters by name: `lr` or `learning_rate`, `weight_decay`, `seed`, `outlier_threshold`, `batch_size`,
            `micro_batch_size`, `parts`, `window`, `scale`, and the fields of `vsgd.core.Hyperparameters` and
            `ConstantHyperparameters`, where `epsilon` may replace `eps`.

    Raises:
        KeyError: a name is unknown.
        ValueError: a value is not a number or lies outside its range.

    Example:
        >>> validate_numbers(lr=0.01, kappa1=0.81)
        >>> validate_numbers(lr=-1)
        Traceback (most recent call last):
        ValueError: Invalid learning rate: -1 (lr must be a finite number >= 0)
    """
    for name, value in values.items():
        if name in _NAMED and (value is None or isinstance(value, str)) and value == _NAMED[name]:
            continue
        label, allowed, holds = _RANGES[name]
        # NumPy's numbers have a dtype. Other kinds, such as fractions, are no numbers to the frameworks.
        if isinstance(value, int | float) or (isinstance(value, Real) and hasattr(value, "dtype")):
            # NumPy's float32 overflows when it is compared with Python's largest float.
            is_numpy_float = hasattr(value, "dtype") and not isinstance(value, Integral)
            valid = holds(float(value) if is_numpy_float else value)
        elif array_type is not None and isinstance(value, array_type):
            # Complex too: `optax.inject_hyperparams` makes all numbers complex if a parameter is.
            kinds = ["int"] if name == "seed" else ["float", "int", "complex"]
            valid = any(kind in str(value.dtype) for kind in kinds) and not value.shape
        else:
            valid = False
        if not valid:
            raise ValueError(f"Invalid {label}: {_quote(value)} ({name} must be {allowed})")


def validate_flags(**flags: Any) -> None:
    """Check switches that may be True, False or None.

    Args:
        **flags: switches by name.

    Raises:
        ValueError: a value is neither True, False nor None.

    Example:
        >>> validate_flags(foreach=None, maximize=True)
        >>> validate_flags(foreach="no")
        Traceback (most recent call last):
        ValueError: Invalid foreach value: 'no' (foreach must be True, False or None)
    """
    for name, value in flags.items():
        is_number = isinstance(value, int) or (str(getattr(value, "dtype", "")) == "bool" and not value.shape)
        if value is not None and not (is_number and value in (0, 1)):
            raise ValueError(f"Invalid {name} value: {_quote(value)} ({name} must be True, False or None)")


def validate_state_dtype(state_dtype: Any) -> None:
    """Check the dtype in which the state is stored.

    Args:
        state_dtype: one of `STATE_DTYPES`.

    Raises:
        ValueError: it is another value.

    Example:
        >>> validate_state_dtype("float16")
        Traceback (most recent call last):
        ValueError: Invalid state_dtype value: 'float16' (state_dtype must be 'float32' or 'bfloat16')
    """
    if not isinstance(state_dtype, str) or state_dtype not in STATE_DTYPES:
        allowed = " or ".join(map(repr, STATE_DTYPES))
        raise ValueError(f"Invalid state_dtype value: {_quote(state_dtype)} (state_dtype must be {allowed})")


def _quote(value: Any) -> str:
    """Return a value for an error, on one line."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 100 else f"{text[:97]}..."
