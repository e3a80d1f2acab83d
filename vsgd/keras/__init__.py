"""VSGD as a `keras.optimizers.Optimizer`, and an observer of the gradients of any optimizer.

Both run on any Keras backend: TensorFlow, JAX or PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

try:
    import keras
    from keras import ops  # noqa: F401  # Keras 2 lacks it
except ImportError as error:
    if error.name != "keras":  # Keras is installed, and its error names the missing backend
        raise
    raise ImportError("vsgd.keras needs Keras 3: run pip install '.[keras]' in a clone of vsgd") from error

from vsgd import core
from vsgd.keras.observer import GradientObserver
from vsgd.keras.prior import prior_strength_from
from vsgd.validation import document_options

if keras.backend.backend() == "torch":
    from vsgd.keras.torch_optimizer import TorchRuleOptimizer as RuleOptimizer
else:
    from vsgd.keras.optimizer import RuleOptimizer

__all__ = ["VSGD", "ConstantVSGD", "GradientObserver", "prior_strength_from"]

LearningRate: TypeAlias = float | keras.optimizers.schedules.LearningRateSchedule | Callable[[], Any]

_document = document_options(
    learning_rate=(
        "the paper's eta, the step size: a float, a `keras.optimizers.schedules.LearningRateSchedule`, or a callable without "
        "arguments. Keras stores a float in its default float dtype: for float64 training, call "
        '`keras.config.set_floatx("float64")` first. The authors\' default is 0.1.'
    ),
    weight_decay=(
        "decoupled weight decay, as in `keras.optimizers.AdamW`; None: none. On TensorFlow, Keras rounds a Python float to "
        "float32: for float64 training, pass a `numpy.float64`."
    ),
    clipnorm="scale the gradient of each variable down to this norm.",
    clipvalue="clip each gradient element to this absolute value.",
    global_clipnorm="scale all gradients together down to this norm.",
    use_ema="keep an exponential moving average of the variables.",
    ema_momentum="the momentum of that average.",
    ema_overwrite_frequency="overwrite the variables by their average every so many steps; None: at the end of training.",
    loss_scale_factor="multiply the loss by this factor, and divide the gradients by it.",
    gradient_accumulation_steps="average the gradients of this many steps for one update.",
    name="the optimizer's name.",
)


def _collect_arguments(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return a constructor's arguments from its `locals()`."""
    named = {name: value for name, value in arguments.items() if name not in ("self", "kwargs", "__class__")}
    return {**named, **arguments["kwargs"]}


@_document
@keras.saving.register_keras_serializable(package="vsgd")
class VSGD(RuleOptimizer):
    """Variational stochastic gradient descent (Chen et al., TMLR 2025, arXiv 2404.06549).

    VSGD models each gradient element as a hidden quantity that a mini-batch observes with noise. It filters the posterior mean
    and variance of that quantity, learns both noise levels, and steps by E[g] / sqrt(E[g^2]).

    `variables` contains for each variable `mu_g`, `b_g` and `b_ghat` (of the variable's shape and layout; float64 for float64
    variables, complex for complex ones, else `state_dtype`). All variables share the step count `iterations`, even a
    variable that had no gradient in some steps.

    With `state_dtype="bfloat16"` the float32 state is stored as bfloat16, in 6 bytes per element instead of 12. It is rounded
    stochastically: up or down at random, which keeps the mean, and so also changes too small for bfloat16. The arithmetic stays
    float32. With `stochastic_rounding=True` bfloat16 variables are rounded stochastically too: weight decay and step are
    computed in float32 and rounded once, so that a decay by 1e-4, which bfloat16 cannot represent, is not lost.

    Args:
        learning_rate: {learning_rate}
        variance_ratio: {variance_ratio}
        prior_strength: {prior_strength}
        kappa1: {kappa1}
        kappa2: {kappa2}
        epsilon: {eps}
        weight_decay: {weight_decay}
        clipnorm: {clipnorm}
        clipvalue: {clipvalue}
        global_clipnorm: {global_clipnorm}
        use_ema: {use_ema}
        ema_momentum: {ema_momentum}
        ema_overwrite_frequency: {ema_overwrite_frequency}
        loss_scale_factor: {loss_scale_factor}
        gradient_accumulation_steps: {gradient_accumulation_steps}
        name: {name}
        state_dtype: {state_dtype}
        seed: {seed}
        stochastic_rounding: {stochastic_rounding}
        outlier_threshold: {outlier_threshold}
        prior_shape: {prior_shape}
        forgetting_floor: {forgetting_floor}
        **kwargs: further arguments of `keras.optimizers.Optimizer`.

    Raises:
        ValueError: a hyperparameter is out of its range, or `state_dtype` has another value.

    Example:
        >>> import keras
        >>> from vsgd.keras import VSGD
        >>> weight = keras.Variable([1.0, -2.0])
        >>> optimizer = VSGD(learning_rate=0.05)
        >>> for _ in range(100):
        ...     optimizer.apply([2 * weight], [weight])  # the gradient of sum(weight ** 2)
        >>> bool((weight.numpy() ** 2).sum() < 1)  # from 5
        True
    """

    _plain_rule = core.VSGD

    def __init__(
        self,
        learning_rate: LearningRate = 0.01,
        variance_ratio: float = 30.0,
        prior_strength: float | str = 1e-8,
        kappa1: float = 0.81,
        kappa2: float = 0.9,
        epsilon: float = 1e-8,
        weight_decay: float | None = None,
        clipnorm: float | None = None,
        clipvalue: float | None = None,
        global_clipnorm: float | None = None,
        use_ema: bool = False,
        ema_momentum: float = 0.99,
        ema_overwrite_frequency: int | None = None,
        loss_scale_factor: float | None = None,
        gradient_accumulation_steps: int | None = None,
        name: str = "vsgd",
        *,
        state_dtype: str = "float32",
        seed: int = 0,
        stochastic_rounding: bool = False,
        outlier_threshold: float | None = None,
        prior_shape: float | None = None,
        forgetting_floor: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**_collect_arguments(locals()))


@_document
@keras.saving.register_keras_serializable(package="vsgd")
class ConstantVSGD(RuleOptimizer):
    """Constant VSGD (arXiv 2404.06549, section 4): one precision for drift and noise, and as much memory as Adam.

    The gain is constant, `1 / (variance_ratio + 1)`, so `mu_g` is Adam's first moment with
    `beta_1 = variance_ratio / (variance_ratio + 1)`.

    `variables` contains for each variable `mu_g` and `b` (of the variable's shape and layout; float64 for float64 variables,
    complex for complex ones, else `state_dtype`: see `VSGD`). All variables share the step count `iterations`, even a
    variable that had no gradient in some steps.

    Args:
        learning_rate: {learning_rate}
        variance_ratio: {constant_variance_ratio}
        prior_strength: {prior_strength}
        kappa: {kappa}
        epsilon: {eps}
        weight_decay: {weight_decay}
        clipnorm: {clipnorm}
        clipvalue: {clipvalue}
        global_clipnorm: {global_clipnorm}
        use_ema: {use_ema}
        ema_momentum: {ema_momentum}
        ema_overwrite_frequency: {ema_overwrite_frequency}
        loss_scale_factor: {loss_scale_factor}
        gradient_accumulation_steps: {gradient_accumulation_steps}
        name: {name}
        state_dtype: {state_dtype}
        seed: {seed}
        stochastic_rounding: {stochastic_rounding}
        outlier_threshold: {outlier_threshold}
        prior_shape: {prior_shape}
        forgetting_floor: {forgetting_floor}
        **kwargs: further arguments of `keras.optimizers.Optimizer`.

    Raises:
        ValueError: a hyperparameter is out of its range, or `state_dtype` has another value.

    Example:
        >>> import keras
        >>> from vsgd.keras import ConstantVSGD
        >>> weight = keras.Variable([1.0, -2.0], name="weight")
        >>> optimizer = ConstantVSGD(learning_rate=0.1)
        >>> optimizer.apply([2 * weight], [weight])
        >>> [variable.name for variable in optimizer.variables]
        ['iteration', 'learning_rate', 'weight_mu_g', 'weight_b']
    """

    _plain_rule = core.CONSTANT_VSGD

    def __init__(
        self,
        learning_rate: LearningRate = 0.01,
        variance_ratio: float = 3.0,
        prior_strength: float | str = 1e-8,
        kappa: float = 0.9,
        epsilon: float = 1e-8,
        weight_decay: float | None = None,
        clipnorm: float | None = None,
        clipvalue: float | None = None,
        global_clipnorm: float | None = None,
        use_ema: bool = False,
        ema_momentum: float = 0.99,
        ema_overwrite_frequency: int | None = None,
        loss_scale_factor: float | None = None,
        gradient_accumulation_steps: int | None = None,
        name: str = "constant_vsgd",
        *,
        state_dtype: str = "float32",
        seed: int = 0,
        stochastic_rounding: bool = False,
        outlier_threshold: float | None = None,
        prior_shape: float | None = None,
        forgetting_floor: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**_collect_arguments(locals()))
