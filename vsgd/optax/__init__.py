"""VSGD as optax gradient transformations, and an observer of the gradients of any optimizer."""

# Not `from __future__ import annotations`: optax's tests check that `learning_rate` is annotated as a schedule.
from typing import Any

try:
    import jax
    import optax
except ImportError as error:
    raise ImportError("vsgd.optax needs JAX and optax: run pip install '.[optax]' in a clone of vsgd") from error

from vsgd import core
from vsgd.optax.observer import ObserveGradientsState, observe_gradients
from vsgd.optax.posteriors import noise_scale, posterior, surprise
from vsgd.optax.prior import prior_strength_from
from vsgd.optax.state import ScaleByConstantVsgdState, ScaleByVsgdState
from vsgd.optax.transform import Mask, descend, round_steps, scale_by_rule
from vsgd.prior import is_auto
from vsgd.validation import document_options, validate_flags

__all__ = [
    "ObserveGradientsState",
    "ScaleByConstantVsgdState",
    "ScaleByVsgdState",
    "constant_vsgd",
    "noise_scale",
    "observe_gradients",
    "posterior",
    "prior_strength_from",
    "scale_by_constant_vsgd",
    "scale_by_vsgd",
    "surprise",
    "vsgd",
]


@document_options()
def scale_by_vsgd(
    variance_ratio: jax.typing.ArrayLike = 30.0,
    prior_strength: jax.typing.ArrayLike | str = 1e-8,
    kappa1: jax.typing.ArrayLike = 0.81,
    kappa2: jax.typing.ArrayLike = 0.9,
    eps: jax.typing.ArrayLike = 1e-8,
    *,
    state_dtype: str = "float32",
    seed: jax.typing.ArrayLike = 0,
    outlier_threshold: jax.typing.ArrayLike | None = None,
    prior_shape: jax.typing.ArrayLike | None = None,
    forgetting_floor: jax.typing.ArrayLike = 0.0,
) -> optax.GradientTransformationExtraArgs:
    """Replace gradients by VSGD's directions, E[g] / sqrt(E[g^2]).

    See `vsgd.optax.vsgd` for the update and its dtypes.

    Args:
        variance_ratio: {variance_ratio}
        prior_strength: {prior_strength}
        kappa1: {kappa1}
        kappa2: {kappa2}
        eps: {eps}
        state_dtype: {state_dtype}
        seed: {seed}
        outlier_threshold: {outlier_threshold}
        prior_shape: {prior_shape}
        forgetting_floor: {forgetting_floor}

    Returns:
        A gradient transformation with a `ScaleByVsgdState`. It ignores extra arguments and needs no `params`.

    Raises:
        ValueError: a hyperparameter, given as a Python number, is out of its range, or `state_dtype` has another value.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> from vsgd.optax import scale_by_vsgd
        >>> transformation = optax.chain(optax.clip_by_global_norm(1.0), scale_by_vsgd(), optax.scale(-0.01))
        >>> state = transformation.init(jnp.zeros(2))
        >>> updates, state = transformation.update(jnp.array([1.0, -2.0]), state)
        >>> print(updates.round(4))
        [-0.0072  0.009 ]
    """
    return scale_by_rule(
        core.VSGD,
        ScaleByVsgdState,
        state_dtype,
        seed,
        variance_ratio=variance_ratio,
        prior_strength=prior_strength,
        kappa1=kappa1,
        kappa2=kappa2,
        eps=eps,
        outlier_threshold=outlier_threshold,
        prior_shape=prior_shape,
        forgetting_floor=forgetting_floor,
    )


@document_options()
def scale_by_constant_vsgd(
    variance_ratio: jax.typing.ArrayLike = 3.0,
    prior_strength: jax.typing.ArrayLike | str = 1e-8,
    kappa: jax.typing.ArrayLike = 0.9,
    eps: jax.typing.ArrayLike = 1e-8,
    *,
    state_dtype: str = "float32",
    seed: jax.typing.ArrayLike = 0,
    outlier_threshold: jax.typing.ArrayLike | None = None,
    prior_shape: jax.typing.ArrayLike | None = None,
    forgetting_floor: jax.typing.ArrayLike = 0.0,
) -> optax.GradientTransformationExtraArgs:
    """Replace gradients by Constant VSGD's directions, E[g] / sqrt(E[g^2]).

    See `vsgd.optax.constant_vsgd` for the update, and `vsgd.optax.vsgd` for its dtypes.

    Args:
        variance_ratio: {constant_variance_ratio}
        prior_strength: {prior_strength}
        kappa: {kappa}
        eps: {eps}
        state_dtype: {state_dtype}
        seed: {seed}
        outlier_threshold: {outlier_threshold}
        prior_shape: {prior_shape}
        forgetting_floor: {forgetting_floor}

    Returns:
        A gradient transformation with a `ScaleByConstantVsgdState`. It ignores extra arguments and needs no `params`.

    Raises:
        ValueError: a hyperparameter, given as a Python number, is out of its range, or `state_dtype` has another value.

    Example:
        >>> import jax.numpy as jnp
        >>> from vsgd.optax import scale_by_constant_vsgd
        >>> transformation = scale_by_constant_vsgd()
        >>> directions, state = transformation.update(jnp.array([1.0, -2.0]), transformation.init(jnp.zeros(2)))
        >>> state._fields
        ('count', 'mu_g', 'b', 'drift_scale', 'noise_scale', 'gradient_unit')
    """
    return scale_by_rule(
        core.CONSTANT_VSGD,
        ScaleByConstantVsgdState,
        state_dtype,
        seed,
        variance_ratio=variance_ratio,
        prior_strength=prior_strength,
        kappa=kappa,
        eps=eps,
        outlier_threshold=outlier_threshold,
        prior_shape=prior_shape,
        forgetting_floor=forgetting_floor,
    )


@document_options()
def vsgd(
    learning_rate: optax.ScalarOrSchedule,
    variance_ratio: jax.typing.ArrayLike = 30.0,
    prior_strength: jax.typing.ArrayLike | str = 1e-8,
    kappa1: jax.typing.ArrayLike = 0.81,
    kappa2: jax.typing.ArrayLike = 0.9,
    eps: jax.typing.ArrayLike = 1e-8,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Mask = None,
    *,
    state_dtype: str = "float32",
    seed: jax.typing.ArrayLike = 0,
    stochastic_rounding: bool = False,
    outlier_threshold: jax.typing.ArrayLike | None = None,
    prior_shape: jax.typing.ArrayLike | None = None,
    forgetting_floor: jax.typing.ArrayLike = 0.0,
) -> optax.GradientTransformationExtraArgs:
    r"""Variational stochastic gradient descent.

    VSGD models each gradient element as a hidden quantity :math:`g_t` that drifts from step to step and that a mini-batch
    observes with noise, as :math:`\hat{g}_t`. It filters the posterior mean :math:`\mu_t` and variance :math:`\sigma_t^2`,
    learns both noise levels, and steps by :math:`E[g_t] / \sqrt{E[g_t^2]}`. With :math:`\eta_t` for ``learning_rate``,
    :math:`\gamma` for ``prior_strength``, :math:`K_g` for ``variance_ratio``, :math:`\lambda` for ``weight_decay`` and
    :math:`a = \gamma + 1/2 + 5 \cdot 10^{-5}` (with ``prior_shape`` instead of :math:`\gamma` if you set it),

    .. math::

        \begin{align*}
        w_t &\leftarrow b_{g,t-1} / (b_{g,t-1} + b_{\hat{g},t-1}) \\
        d_t &\leftarrow w_t \cdot (\hat{g}_t - \mu_{t-1}), \quad
        r_t \leftarrow (\hat{g}_t - \mu_{t-1}) - d_t \\
        \mu_t &\leftarrow \mu_{t-1} + d_t, \quad
        \sigma_t^2 \leftarrow w_t \cdot b_{\hat{g},t-1} / a \\
        b_{g,t} &\leftarrow (1 - t^{-\kappa_1}) \cdot b_{g,t-1}
            + t^{-\kappa_1} \cdot (\gamma + (\sigma_t^2 + d_t^2) / 2) \\
        b_{\hat{g},t} &\leftarrow (1 - t^{-\kappa_2}) \cdot b_{\hat{g},t-1}
            + t^{-\kappa_2} \cdot (K_g \gamma + (\sigma_t^2 + r_t^2) / 2) \\
        u_t &\leftarrow -\eta_t \cdot \left( \mu_t / \left( \sqrt{\mu_t^2 + \sigma_t^2} + \varepsilon \right)
            + \lambda \theta_t \right)
        \end{align*}

    The state has the shape and sharding of the parameters. State and arithmetic are float32 for bfloat16, float16 and float32
    parameters, and float64 for float64 ones: b_g falls to 1e-8, which float16 cannot represent and at which bfloat16,
    rounded to the nearest, freezes. A complex number counts as two real ones, in its state too (complex64 or complex128).
    Updates have the gradient's dtype. All parameters share one step count. A gradient of None leaves its state unchanged,
    and its update is None.

    With ``state_dtype="bfloat16"`` the float32 state is stored as bfloat16, in 6 bytes per parameter instead of 12. It is
    rounded stochastically: up or down at random, which keeps the mean, and so also changes too small for bfloat16. The
    arithmetic stays float32, and complex and float64 state keeps its precision. The random bits are a hash of ``seed``, the
    parameter's index in the tree, the step and the element's index in the whole array: you can repeat and continue a run, and
    sharding changes nothing. (In `jax.shard_map` and `jax.vmap` the whole array is the one that the function sees.)

    With ``stochastic_rounding=True`` bfloat16 parameters are rounded stochastically too. Decay and step are computed in float32
    and rounded once, so that a decay by 1e-4, which bfloat16 cannot represent, is not lost. The updates of these parameters
    are float32, and `optax.apply_updates` adds them to exactly the rounded number. Nothing may change them in between: put
    this transformation last in an `optax.chain`.

    A step is at most ``learning_rate`` in each element: try 0.01 where you would use 0.001 with Adam.

    Note:
        `optax.inject_hyperparams` rounds hyperparameters to the widest dtype of the parameters: kappa1 = 0.81 becomes 0.8086 in
        bfloat16. prior_strength = 1e-8 becomes 0 in float16, which is replaced by the smallest positive float16, 6e-8.
        `inject_hyperparams(vsgd, hyperparam_dtype=jnp.float32)` keeps all digits (and, as with other optax optimizers, makes
        the updates float32, which `optax.apply_updates` rounds at the end). Injected hyperparameters are arrays: their range is
        not checked. Pass it ``static_args="mask"`` if mask is a callable.

    Args:
        learning_rate: the paper's eta, the step size: a number, or a schedule; the authors' default is 0.1.
        variance_ratio: {variance_ratio}
        prior_strength: {prior_strength}
        kappa1: {kappa1}
        kappa2: {kappa2}
        eps: {eps}
        weight_decay: decoupled weight decay, multiplied by the learning rate, as in `optax.adamw`.
        mask: which parameters decay: a tree of booleans shaped like the parameters or a prefix of them, or a callable that
            returns one given the parameters.
        state_dtype: {state_dtype}
        seed: {seed}
        stochastic_rounding: {stochastic_rounding}
        outlier_threshold: {outlier_threshold}
        prior_shape: {prior_shape}
        forgetting_floor: {forgetting_floor}

    Returns:
        A gradient transformation. As with `optax.adamw`, its `update` needs `params`.

    Raises:
        ValueError: a hyperparameter, given as a Python number, is out of its range, or `state_dtype` has another value.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> from vsgd.optax import vsgd
        >>> def loss(x):
        ...     return (x**2).sum()
        >>> params = jnp.array([1.0, -2.0])
        >>> solver = vsgd(learning_rate=0.05)
        >>> state = solver.init(params)
        >>> for _ in range(100):
        ...     updates, state = solver.update(jax.grad(loss)(params), state, params)
        ...     params = optax.apply_updates(params, updates)
        >>> bool(loss(params) < 1)  # from 5
        True

    References:
        Chen, Kuzina, Esmaeili, Tomczak, `Variational Stochastic Gradient Descent for Deep Neural Networks
        <https://arxiv.org/abs/2404.06549>`_, TMLR 2025
    """
    validate_flags(stochastic_rounding=stochastic_rounding)
    options: dict[str, Any] = {
        "state_dtype": state_dtype,
        "seed": seed,
        "outlier_threshold": outlier_threshold,
        "prior_shape": prior_shape,
        "forgetting_floor": forgetting_floor,
    }
    scaling = scale_by_vsgd(variance_ratio, prior_strength, kappa1, kappa2, eps, **options)
    solver = descend(scaling, learning_rate, weight_decay, mask, is_auto(prior_strength))
    return round_steps(solver, core.VSGD, seed) if stochastic_rounding else solver


@document_options()
def constant_vsgd(
    learning_rate: optax.ScalarOrSchedule,
    variance_ratio: jax.typing.ArrayLike = 3.0,
    prior_strength: jax.typing.ArrayLike | str = 1e-8,
    kappa: jax.typing.ArrayLike = 0.9,
    eps: jax.typing.ArrayLike = 1e-8,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Mask = None,
    *,
    state_dtype: str = "float32",
    seed: jax.typing.ArrayLike = 0,
    stochastic_rounding: bool = False,
    outlier_threshold: jax.typing.ArrayLike | None = None,
    prior_shape: jax.typing.ArrayLike | None = None,
    forgetting_floor: jax.typing.ArrayLike = 0.0,
) -> optax.GradientTransformationExtraArgs:
    r"""Constant VSGD, with one precision for drift and noise, and as much memory as Adam.

    The gain is constant, so mu_g is Adam's first moment without bias correction, with beta1 = K_g / (K_g + 1). In the
    notation of `vsgd.optax.vsgd`, with :math:`a = \gamma + 1 + 10^{-4}` (with ``prior_shape`` instead of :math:`\gamma` if you
    set it),

    .. math::

        \begin{align*}
        d_t &\leftarrow (\hat{g}_t - \mu_{t-1}) / (K_g + 1), \quad
        r_t \leftarrow (\hat{g}_t - \mu_{t-1}) - d_t \\
        \mu_t &\leftarrow \mu_{t-1} + d_t, \quad
        \sigma_t^2 \leftarrow K_g / (K_g + 1) \cdot b_{t-1} / a \\
        b_t &\leftarrow (1 - t^{-\kappa}) \cdot b_{t-1} + t^{-\kappa} \cdot
            (\gamma + (\sigma_t^2 + d_t^2) / 2 + (\sigma_t^2 + r_t^2) / (2 K_g)) \\
        u_t &\leftarrow -\eta_t \cdot \left( \mu_t / \left( \sqrt{\mu_t^2 + \sigma_t^2} + \varepsilon \right)
            + \lambda \theta_t \right)
        \end{align*}

    Args:
        learning_rate: the paper's eta, the step size: a number, or a schedule.
        variance_ratio: {constant_variance_ratio}
        prior_strength: {prior_strength}
        kappa: {kappa}
        eps: {eps}
        weight_decay: decoupled weight decay, multiplied by the learning rate, as in `optax.adamw`.
        mask: which parameters decay: a tree of booleans shaped like the parameters or a prefix of them, or a callable that
            returns one given the parameters.
        state_dtype: {state_dtype}
        seed: {seed}
        stochastic_rounding: {stochastic_rounding}
        outlier_threshold: {outlier_threshold}
        prior_shape: {prior_shape}
        forgetting_floor: {forgetting_floor}

    Returns:
        A gradient transformation. As with `optax.adamw`, its `update` needs `params`.

    Raises:
        ValueError: a hyperparameter, given as a Python number, is out of its range, or `state_dtype` has another value.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> from vsgd.optax import constant_vsgd
        >>> params = jnp.array([1.0, -2.0])
        >>> solver = constant_vsgd(optax.cosine_decay_schedule(0.1, decay_steps=100))
        >>> updates, state = solver.update(2 * params, solver.init(params), params)
        >>> print(optax.apply_updates(params, updates).round(4))
        [ 0.9 -1.9]

    References:
        Chen, Kuzina, Esmaeili, Tomczak, `Variational Stochastic Gradient Descent for Deep Neural Networks
        <https://arxiv.org/abs/2404.06549>`_, TMLR 2025
    """
    validate_flags(stochastic_rounding=stochastic_rounding)
    options: dict[str, Any] = {
        "state_dtype": state_dtype,
        "seed": seed,
        "outlier_threshold": outlier_threshold,
        "prior_shape": prior_shape,
        "forgetting_floor": forgetting_floor,
    }
    scaling = scale_by_constant_vsgd(variance_ratio, prior_strength, kappa, eps, **options)
    solver = descend(scaling, learning_rate, weight_decay, mask, is_auto(prior_strength))
    return round_steps(solver, core.CONSTANT_VSGD, seed) if stochastic_rounding else solver
