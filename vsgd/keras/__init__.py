"""VSGD as a `keras.optimizers.Optimizer`, on whichever backend Keras runs: TensorFlow, JAX or PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

try:
    import keras
    from keras import ops  # noqa: F401  # which Keras 2 lacks
except ImportError as error:
    if error.name != "keras":  # Keras is there, and says which backend is missing
        raise
    raise ImportError("vsgd.keras needs Keras 3: pip install 'vsgd[keras]'") from error

from vsgd import core
from vsgd.keras.optimizer import RuleOptimizer
from vsgd.keras.prior import prior_strength_from

__all__ = ["VSGD", "ConstantVSGD", "prior_strength_from"]

LearningRate: TypeAlias = float | keras.optimizers.schedules.LearningRateSchedule | Callable[[], Any]


def _arguments(arguments: dict[str, Any]) -> dict[str, Any]:
    """What a constructor was given, from its `locals()`."""
    named = {name: value for name, value in arguments.items() if name not in ("self", "kwargs", "__class__")}
    return {**named, **arguments["kwargs"]}


@keras.saving.register_keras_serializable(package="vsgd")
class VSGD(RuleOptimizer):
    """Variational stochastic gradient descent (Chen et al., TMLR 2025, arXiv 2404.06549).

    Each element of the gradient is a hidden quantity that a mini-batch shows with noise. Its posterior mean and variance are
    filtered step by step, with both noise levels learned, and the step is E[g] / sqrt(E[g^2]).

    State of each variable, among `variables`: `mu_g`, `b_g`, `b_ghat` (the variable's shape and layout; float64 for float64
    variables, complex for complex ones, else `state_dtype`). The count of steps is the optimizer's `iterations`, also for a
    variable that had no gradient in some of them.

    With `state_dtype="bfloat16"` what would be float32 state is stored as bfloat16, 6 bytes per element instead of 12, by
    stochastic rounding: up or down by chance, so that the mean is kept, and with it changes too small for bfloat16. The
    arithmetic stays float32. The chance is a hash of `seed`, the variable's place among the optimizer's, the step and the
    element's place in the variable: a run can be repeated and continued, and sharding changes nothing. With
    `stochastic_rounding=True` bfloat16 variables are rounded so too: weight decay and step are computed in float32 and rounded
    once, so that a decay by 1e-4, which bfloat16 cannot hold, is not lost.

    Args:
        learning_rate: the paper's eta, the step size: a float, a `keras.optimizers.schedules.LearningRateSchedule`, or a
            callable without arguments. Keras holds a float in its default float dtype: for float64 training,
            `keras.config.set_floatx("float64")` first. The authors' default is 0.1.
        variance_ratio: the paper's K_g, the prior of Var(ghat - g) / Var(g_t - g_{t-1}).
        prior_strength: the paper's gamma, in units of gradient^2: scale it with the square of the loss's scale.
        kappa1: how fast b_g forgets; its learning rate at step t is t ** -kappa1. In (0.5, 1].
        kappa2: the same for b_ghat.
        epsilon: added to the root of the second moment, in units of the gradient.
        weight_decay: decoupled weight decay, as in `keras.optimizers.AdamW`; None: none. On TensorFlow, Keras rounds a Python
            float to float32: for float64 training, give a `numpy.float64`.
        clipnorm: the gradient of each variable is scaled down to this norm.
        clipvalue: each element of the gradients is clipped to this size.
        global_clipnorm: all gradients together are scaled down to this norm.
        use_ema: keep an exponential moving average of the variables.
        ema_momentum: the average's momentum.
        ema_overwrite_frequency: after how many steps the variables become their average; None: at the end of training.
        loss_scale_factor: by what the loss is multiplied, and the gradients divided.
        gradient_accumulation_steps: of how many steps' gradients the mean is taken for one update.
        name: the optimizer's name.
        state_dtype: "float32", or "bfloat16" for state in half the memory.
        seed: an integer, what the noise of the rounding is drawn from.
        stochastic_rounding: whether bfloat16 variables are rounded stochastically.
        outlier_threshold: cut what differs from the predicted gradient by more than so many of its predicted standard
            deviations, element by element; None: use every gradient as it is. See `vsgd.outliers`.
        prior_shape: the shape of the prior on both precisions, without unit; None: `prior_strength`, as in the paper. With 0.0,
            `prior_strength` and `epsilon` can follow the loss's scale exactly: see `docs/tuning.md`.
        **kwargs: passed on to `keras.optimizers.Optimizer`.

    Raises:
        ValueError: a hyperparameter is out of its range, or `state_dtype` is another.

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

    _kind = core.VSGD

    def __init__(
        self,
        learning_rate: LearningRate = 0.01,
        variance_ratio: float = 30.0,
        prior_strength: float = 1e-8,
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
        **kwargs: Any,
    ) -> None:
        super().__init__(**_arguments(locals()))


@keras.saving.register_keras_serializable(package="vsgd")
class ConstantVSGD(RuleOptimizer):
    """VSGD with one precision for drift and noise (arXiv 2404.06549, the paper's second variant): Adam's memory.

    The gain is constant, `1 / (variance_ratio + 1)`, so `mu_g` is Adam's first moment with
    `beta_1 = variance_ratio / (variance_ratio + 1)`.

    State of each variable, among `variables`: `mu_g`, `b` (the variable's shape and layout; float64 for float64 variables,
    complex for complex ones, else `state_dtype`: see `VSGD`). The count of steps is the optimizer's `iterations`, also for a
    variable that had no gradient in some of them.

    Args:
        learning_rate: the paper's eta, the step size: a float, a `keras.optimizers.schedules.LearningRateSchedule`, or a
            callable without arguments. Keras holds a float in its default float dtype: for float64 training,
            `keras.config.set_floatx("float64")` first.
        variance_ratio: the paper's K_g, the fixed ratio Var(ghat - g) / Var(g_t - g_{t-1}).
        prior_strength: the paper's gamma, in units of gradient^2: scale it with the square of the loss's scale.
        kappa: how fast b forgets; its learning rate at step t is t ** -kappa. In (0.5, 1].
        epsilon: added to the root of the second moment, in units of the gradient.
        weight_decay: decoupled weight decay, as in `keras.optimizers.AdamW`; None: none. On TensorFlow, Keras rounds a Python
            float to float32: for float64 training, give a `numpy.float64`.
        clipnorm: the gradient of each variable is scaled down to this norm.
        clipvalue: each element of the gradients is clipped to this size.
        global_clipnorm: all gradients together are scaled down to this norm.
        use_ema: keep an exponential moving average of the variables.
        ema_momentum: the average's momentum.
        ema_overwrite_frequency: after how many steps the variables become their average; None: at the end of training.
        loss_scale_factor: by what the loss is multiplied, and the gradients divided.
        gradient_accumulation_steps: of how many steps' gradients the mean is taken for one update.
        name: the optimizer's name.
        state_dtype: "float32", or "bfloat16" for state in half the memory: see `VSGD`.
        seed: an integer, what the noise of the rounding is drawn from.
        stochastic_rounding: whether bfloat16 variables are rounded stochastically: see `VSGD`.
        outlier_threshold: cut what differs from the predicted gradient by more than so many of its predicted standard
            deviations, element by element; None: use every gradient as it is. See `vsgd.outliers`.
        prior_shape: the shape of the prior on the precision, without unit; None: `prior_strength`, as in the paper. With 0.0,
            `prior_strength` and `epsilon` can follow the loss's scale exactly: see `docs/tuning.md`.
        **kwargs: passed on to `keras.optimizers.Optimizer`.

    Raises:
        ValueError: a hyperparameter is out of its range, or `state_dtype` is another.

    Example:
        >>> import keras
        >>> from vsgd.keras import ConstantVSGD
        >>> weight = keras.Variable([1.0, -2.0], name="weight")
        >>> optimizer = ConstantVSGD(learning_rate=0.1)
        >>> optimizer.apply([2 * weight], [weight])
        >>> [variable.name for variable in optimizer.variables]
        ['iteration', 'learning_rate', 'weight_mu_g', 'weight_b']
    """

    _kind = core.CONSTANT_VSGD

    def __init__(
        self,
        learning_rate: LearningRate = 0.01,
        variance_ratio: float = 3.0,
        prior_strength: float = 1e-8,
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
        **kwargs: Any,
    ) -> None:
        super().__init__(**_arguments(locals()))
