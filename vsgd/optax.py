"""VSGD as optax gradient transformations."""

# Not `from __future__ import annotations`: optax's own tests look whether `learning_rate` is annotated as a schedule.
import functools
import sys
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any, NamedTuple

try:
    import jax
    import jax.numpy as jnp
    import optax
except ImportError as error:
    raise ImportError("vsgd.optax needs JAX and optax: pip install 'vsgd[optax]'") from error

from vsgd import core, optax_posterior, rounding
from vsgd.optax_numbers import arithmetic_dtype, join, parts
from vsgd.optax_prior import prior_strength_from
from vsgd.outliers import guarded
from vsgd.posterior import NoiseScales

__all__ = [
    "ScaleByConstantVsgdState",
    "ScaleByVsgdState",
    "constant_vsgd",
    "noise_scale",
    "posterior",
    "prior_strength_from",
    "scale_by_constant_vsgd",
    "scale_by_vsgd",
    "surprise",
    "vsgd",
]

Mask = Any | Callable[[optax.Params], Any] | None


class ScaleByVsgdState(NamedTuple):
    """State of VSGD.

    Attributes:
        count: how many steps were taken, int32.
        mu_g: posterior mean of each gradient.
        b_g: rate of the Gamma posterior of the drift's precision.
        b_ghat: rate of the Gamma posterior of the mini-batch noise's precision.
    """

    count: jax.Array  # type: ignore[assignment]  # a tuple has a method of this name
    mu_g: optax.Updates
    b_g: optax.Updates
    b_ghat: optax.Updates


class ScaleByConstantVsgdState(NamedTuple):
    """State of Constant VSGD.

    Attributes:
        count: how many steps were taken, int32.
        mu_g: posterior mean of each gradient.
        b: rate of the Gamma posterior of the one precision.
    """

    count: jax.Array  # type: ignore[assignment]  # a tuple has a method of this name
    mu_g: optax.Updates
    b: optax.Updates


def scale_by_vsgd(
    variance_ratio: jax.typing.ArrayLike = 30.0,
    prior_strength: jax.typing.ArrayLike = 1e-8,
    kappa1: jax.typing.ArrayLike = 0.81,
    kappa2: jax.typing.ArrayLike = 0.9,
    eps: jax.typing.ArrayLike = 1e-8,
    *,
    state_dtype: str = "float32",
    seed: jax.typing.ArrayLike = 0,
    outlier_threshold: jax.typing.ArrayLike | None = None,
    prior_shape: jax.typing.ArrayLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Replace gradients by VSGD's directions, E[g] / sqrt(E[g^2]).

    See `vsgd.optax.vsgd` for the update and what it does with dtypes.

    Args:
        variance_ratio: the paper's K_g, the prior of Var(ghat - g) / Var(g_t - g_{t-1}).
        prior_strength: the paper's gamma, in units of gradient^2: scale it with the square of the loss's scale.
        kappa1: how fast b_g forgets; its learning rate at step t is t ** -kappa1. In (0.5, 1].
        kappa2: the same for b_ghat.
        eps: added to the root of the second moment, in units of the gradient.
        state_dtype: "float32", or "bfloat16" for state in half the memory: see `vsgd.optax.vsgd`.
        seed: an integer, what the noise of the rounding is drawn from.
        outlier_threshold: cut what differs from the predicted gradient by more than so many of its predicted standard
            deviations, element by element; None: use every gradient as it is. See `vsgd.outliers`.
        prior_shape: the shape of the prior on both precisions, without unit; None: `prior_strength`, as in the paper. With 0.0,
            `prior_strength` and `eps` can follow the loss's scale exactly: see `docs/tuning.md`.

    Returns:
        A gradient transformation with a `ScaleByVsgdState`. It ignores extra arguments and needs no `params`.

    Raises:
        ValueError: a hyperparameter, given as a Python number, is out of its range, or `state_dtype` is another.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> from vsgd.optax import scale_by_vsgd
        >>> transformation = optax.chain(optax.clip_by_global_norm(1.0), scale_by_vsgd(), optax.scale(-0.01))
        >>> state = transformation.init(jnp.zeros(2))
        >>> updates, state = transformation.update(jnp.array([1.0, -2.0]), state)
        >>> print(updates.round(4))
        [-0.0072  0.009 ]
    """
    hyper = core.Hyperparameters(*_known(variance_ratio, prior_strength, kappa1, kappa2, eps, prior_shape))
    return _scale_by_rule(core.VSGD, hyper, ScaleByVsgdState, state_dtype, seed, outlier_threshold)


def scale_by_constant_vsgd(
    variance_ratio: jax.typing.ArrayLike = 3.0,
    prior_strength: jax.typing.ArrayLike = 1e-8,
    kappa: jax.typing.ArrayLike = 0.9,
    eps: jax.typing.ArrayLike = 1e-8,
    *,
    state_dtype: str = "float32",
    seed: jax.typing.ArrayLike = 0,
    outlier_threshold: jax.typing.ArrayLike | None = None,
    prior_shape: jax.typing.ArrayLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Replace gradients by Constant VSGD's directions, E[g] / sqrt(E[g^2]).

    See `vsgd.optax.constant_vsgd` for the update, and `vsgd.optax.vsgd` for what both do with dtypes.

    Args:
        variance_ratio: the paper's K_g, the fixed ratio Var(ghat - g) / Var(g_t - g_{t-1}).
        prior_strength: the paper's gamma, in units of gradient^2: scale it with the square of the loss's scale.
        kappa: how fast b forgets; its learning rate at step t is t ** -kappa. In (0.5, 1].
        eps: added to the root of the second moment, in units of the gradient.
        state_dtype: "float32", or "bfloat16" for state in half the memory: see `vsgd.optax.vsgd`.
        seed: an integer, what the noise of the rounding is drawn from.
        outlier_threshold: cut what differs from the predicted gradient by more than so many of its predicted standard
            deviations, element by element; None: use every gradient as it is. See `vsgd.outliers`.
        prior_shape: the shape of the prior on the precision, without unit; None: `prior_strength`, as in the paper. With 0.0,
            `prior_strength` and `eps` can follow the loss's scale exactly: see `docs/tuning.md`.

    Returns:
        A gradient transformation with a `ScaleByConstantVsgdState`. It ignores extra arguments and needs no `params`.

    Raises:
        ValueError: a hyperparameter, given as a Python number, is out of its range, or `state_dtype` is another.

    Example:
        >>> import jax.numpy as jnp
        >>> from vsgd.optax import scale_by_constant_vsgd
        >>> transformation = scale_by_constant_vsgd()
        >>> directions, state = transformation.update(jnp.array([1.0, -2.0]), transformation.init(jnp.zeros(2)))
        >>> state._fields
        ('count', 'mu_g', 'b')
    """
    hyper = core.ConstantHyperparameters(*_known(variance_ratio, prior_strength, kappa, eps, prior_shape))
    return _scale_by_rule(core.CONSTANT_VSGD, hyper, ScaleByConstantVsgdState, state_dtype, seed, outlier_threshold)


def vsgd(
    learning_rate: optax.ScalarOrSchedule,
    variance_ratio: jax.typing.ArrayLike = 30.0,
    prior_strength: jax.typing.ArrayLike = 1e-8,
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
) -> optax.GradientTransformationExtraArgs:
    r"""Variational stochastic gradient descent.

    Each element of the gradient is a hidden quantity :math:`g_t` that drifts from step to step and that a mini-batch shows
    with noise, as :math:`\hat{g}_t`. Its posterior mean :math:`\mu_t` and variance :math:`\sigma_t^2` are filtered, with both
    noise levels learned, and the step is :math:`E[g_t] / \sqrt{E[g_t^2]}`. With :math:`\eta_t` for ``learning_rate``,
    :math:`\gamma` for ``prior_strength``, :math:`K_g` for ``variance_ratio``, :math:`\lambda` for ``weight_decay`` and
    :math:`a = \gamma + 1/2 + 5 \cdot 10^{-5}` (``prior_shape`` in the place of :math:`\gamma`, where it is given),

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

    The state has the shape and sharding of the parameters. It is float32, and so is the arithmetic, for bfloat16, float16 and
    float32 parameters, and float64 for float64 ones: b_g falls to 1e-8, which float16 cannot hold and at which bfloat16
    freezes, if rounded to the nearest. A complex number is two real ones, in its state too (complex64 or complex128). Updates
    have the gradient's dtype. All parameters share one step count. A gradient of None leaves its state as it is, and its
    update is None.

    With ``state_dtype="bfloat16"`` what would be float32 state is stored as bfloat16, 6 bytes per parameter instead of 12, by
    stochastic rounding: up or down by chance, so that the mean is kept, and with it changes too small for bfloat16. The
    arithmetic stays float32, and complex and float64 state what it is. The chance is a hash of ``seed``, the parameter's
    place in the tree, the step and the element's place in the whole array: a run can be repeated and continued, and sharding
    changes nothing. (In `jax.shard_map` and `jax.vmap` the whole array is what the function sees.)

    With ``stochastic_rounding=True`` bfloat16 parameters are rounded so too: decay and step are computed in float32, from the
    gradient on, and rounded once, so that a decay by 1e-4, which bfloat16 cannot hold, is not lost. The updates of these
    parameters are float32, and such that `optax.apply_updates` arrives at the rounded number. So nothing may change them in
    between: in an `optax.chain`, this comes last.

    A step is at most ``learning_rate`` in each element: try 0.01 where you would use 0.001 with Adam.

    Note:
        `optax.inject_hyperparams` rounds hyperparameters to the parameters' dtype, if no parameter has a wider one:
        kappa1 = 0.81 becomes 0.8086 in bfloat16, and prior_strength = 1e-8 becomes 0 in float16, where we take the
        smallest positive float16, 6e-8, instead. `inject_hyperparams(vsgd, hyperparam_dtype=jnp.float32)` keeps their digits
        (and, as with other optax optimizers, makes the updates float32, which `optax.apply_updates` rounds at the end).
        Injected hyperparameters are arrays: their range is not checked. Give it ``static_args="mask"`` if mask is a callable.

    Args:
        learning_rate: the paper's eta, the step size: a number, or a schedule; the authors' default is 0.1.
        variance_ratio: the paper's K_g, the prior of Var(ghat - g) / Var(g_t - g_{t-1}).
        prior_strength: the paper's gamma, in units of gradient^2: scale it with the square of the loss's scale.
        kappa1: how fast b_g forgets; its learning rate at step t is t ** -kappa1. In (0.5, 1].
        kappa2: the same for b_ghat.
        eps: added to the root of the second moment, in units of the gradient.
        weight_decay: decoupled weight decay, multiplied by the learning rate, as in `optax.adamw`.
        mask: a tree of booleans with the structure of the parameters or a prefix of it, or a callable that returns one given
            the parameters: which of them decay.
        state_dtype: "float32", or "bfloat16" for state in half the memory.
        seed: an integer, what the noise of the rounding is drawn from.
        stochastic_rounding: whether bfloat16 parameters are rounded stochastically.
        outlier_threshold: cut what differs from the predicted gradient by more than so many of its predicted standard
            deviations, element by element; None: use every gradient as it is. See `vsgd.outliers`.
        prior_shape: the shape of the prior on both precisions, without unit; None: `prior_strength`, as in the paper. With 0.0,
            `prior_strength` and `eps` can follow the loss's scale exactly: see `docs/tuning.md`.

    Returns:
        A gradient transformation. As with `optax.adamw`, its `update` needs `params`.

    Raises:
        ValueError: a hyperparameter, given as a Python number, is out of its range, or `state_dtype` is another.

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
    core.validate_flags(stochastic_rounding=stochastic_rounding)
    options: dict[str, Any] = {
        "state_dtype": state_dtype,
        "seed": seed,
        "outlier_threshold": outlier_threshold,
        "prior_shape": prior_shape,
    }
    scaling = scale_by_vsgd(variance_ratio, prior_strength, kappa1, kappa2, eps, **options)
    solver = _descend(scaling, learning_rate, weight_decay, mask)
    return _round_steps(solver, core.VSGD, seed) if stochastic_rounding else solver


def constant_vsgd(
    learning_rate: optax.ScalarOrSchedule,
    variance_ratio: jax.typing.ArrayLike = 3.0,
    prior_strength: jax.typing.ArrayLike = 1e-8,
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
) -> optax.GradientTransformationExtraArgs:
    r"""VSGD with one precision for drift and noise, the paper's second variant: Adam's memory.

    The gain is constant, so mu_g is Adam's first moment without bias correction, with beta1 = K_g / (K_g + 1). In the
    notation of `vsgd.optax.vsgd`, with :math:`a = \gamma + 1 + 10^{-4}` (or ``prior_shape`` for :math:`\gamma`),

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
        variance_ratio: the paper's K_g, the fixed ratio Var(ghat - g) / Var(g_t - g_{t-1}).
        prior_strength: the paper's gamma, in units of gradient^2: scale it with the square of the loss's scale.
        kappa: how fast b forgets; its learning rate at step t is t ** -kappa. In (0.5, 1].
        eps: added to the root of the second moment, in units of the gradient.
        weight_decay: decoupled weight decay, multiplied by the learning rate, as in `optax.adamw`.
        mask: a tree of booleans with the structure of the parameters or a prefix of it, or a callable that returns one given
            the parameters: which of them decay.
        state_dtype: "float32", or "bfloat16" for state in half the memory: see `vsgd.optax.vsgd`.
        seed: an integer, what the noise of the rounding is drawn from.
        stochastic_rounding: whether bfloat16 parameters are rounded stochastically: see `vsgd.optax.vsgd`.
        outlier_threshold: cut what differs from the predicted gradient by more than so many of its predicted standard
            deviations, element by element; None: use every gradient as it is. See `vsgd.outliers`.
        prior_shape: the shape of the prior on the precision, without unit; None: `prior_strength`, as in the paper. With 0.0,
            `prior_strength` and `eps` can follow the loss's scale exactly: see `docs/tuning.md`.

    Returns:
        A gradient transformation. As with `optax.adamw`, its `update` needs `params`.

    Raises:
        ValueError: a hyperparameter, given as a Python number, is out of its range, or `state_dtype` is another.

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
    core.validate_flags(stochastic_rounding=stochastic_rounding)
    options: dict[str, Any] = {
        "state_dtype": state_dtype,
        "seed": seed,
        "outlier_threshold": outlier_threshold,
        "prior_shape": prior_shape,
    }
    scaling = scale_by_constant_vsgd(variance_ratio, prior_strength, kappa, eps, **options)
    solver = _descend(scaling, learning_rate, weight_decay, mask)
    return _round_steps(solver, core.CONSTANT_VSGD, seed) if stochastic_rounding else solver


_RULES = {ScaleByVsgdState: core.VSGD, ScaleByConstantVsgdState: core.CONSTANT_VSGD}


def posterior(
    opt_state: Any,
    *,
    prior_strength: jax.typing.ArrayLike = 1e-8,
    variance_ratio: jax.typing.ArrayLike = 3.0,
    prior_shape: jax.typing.ArrayLike | None = None,
) -> Any:
    """What is known of each gradient, from the state: the uncertainty of the gradient, not of the weights.

    Args:
        opt_state: the state of VSGD or Constant VSGD, or of a chain, mask or wrapper that holds it.
        prior_strength: as the optimizer was given it.
        variance_ratio: as Constant VSGD was given it; VSGD needs none here.
        prior_shape: as the optimizer was given it.

    Returns:
        A tree like the parameters', with a `vsgd.posterior.Posterior` in the place of each: arrays of its shape, float64 for
        float64 parameters, else float32. A parameter that is masked out keeps its `optax.MaskedNode`.

    Raises:
        ValueError: there is no state of VSGD.

    Example:
        >>> import jax.numpy as jnp
        >>> from vsgd.optax import posterior, vsgd
        >>> solver = vsgd(0.01)
        >>> params = {"weight": jnp.zeros(2)}
        >>> _, state = solver.update({"weight": jnp.array([1.0, -2.0])}, solver.init(params), params)
        >>> print(posterior(state)["weight"].mean.round(4))
        [ 0.0323 -0.0645]
    """
    return optax_posterior.posteriors(_RULES, opt_state, _scales_of(prior_strength, variance_ratio, prior_shape))


def noise_scale(
    opt_state: Any,
    *,
    batch_size: jax.typing.ArrayLike,
    prior_strength: jax.typing.ArrayLike = 1e-8,
    variance_ratio: jax.typing.ArrayLike = 3.0,
    prior_shape: jax.typing.ArrayLike | None = None,
) -> NoiseScales:
    """The gradient noise scale (arXiv 1812.06162), from the state; see `vsgd.posterior.noise_scale` for how.

    Args:
        opt_state: as for `posterior`.
        batch_size: how many examples a gradient is the mean of, on all devices and in accumulated steps together.
        prior_strength: as for `posterior`.
        variance_ratio: as for `posterior`.
        prior_shape: as for `posterior`.

    Returns:
        The estimates overall and, in `tensors`, in a tree like the parameters'.

    Raises:
        ValueError: there is no state of VSGD, or `batch_size`, as a Python number, is out of its range.

    Example:
        >>> import jax.numpy as jnp
        >>> from vsgd.optax import noise_scale, vsgd
        >>> solver = vsgd(0.01)
        >>> params = jnp.zeros(2)
        >>> _, state = solver.update(jnp.array([1.0, -2.0]), solver.init(params), params)
        >>> bool(noise_scale(state, batch_size=32).overall.trace > 0)
        True
    """
    return optax_posterior.noise_scales(_RULES, opt_state, _scales_of(prior_strength, variance_ratio, prior_shape), batch_size)


def surprise(
    grads: optax.Updates,
    opt_state: Any,
    *,
    prior_strength: jax.typing.ArrayLike = 1e-8,
    variance_ratio: jax.typing.ArrayLike = 3.0,
    prior_shape: jax.typing.ArrayLike | None = None,
) -> Any:
    """How unexpected gradients are to the state before they update it, averaged over each parameter: see `vsgd.posterior`.

    Args:
        grads: gradients, as for `update`.
        opt_state: as for `posterior`.
        prior_strength: as for `posterior`.
        variance_ratio: as for `posterior`.
        prior_shape: as for `posterior`.

    Returns:
        A tree like the gradients' with the mean of each one's squared standardized innovations, 0-d arrays; near 1 where the
        model fits. Of a parameter that is masked out it has the `optax.MaskedNode`.

    Raises:
        ValueError: there is no state of VSGD.
    """
    return optax_posterior.surprises(_RULES, grads, opt_state, _scales_of(prior_strength, variance_ratio, prior_shape))


def _scales_of(prior_strength: Any, variance_ratio: Any, prior_shape: Any) -> Callable[[core.Rule], tuple[Any, Any]]:
    given = {"prior_strength": prior_strength, "variance_ratio": variance_ratio, "prior_shape": prior_shape}
    core.validate(**given)

    def scales(rule: core.Rule) -> tuple[Any, Any]:
        return rule.variance_scales(rule.hyperparameters(**given))

    return scales


def _descend(
    scaling: optax.GradientTransformationExtraArgs,
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: optax.ScalarOrSchedule,
    mask: Mask,
) -> optax.GradientTransformationExtraArgs:
    """The step from a direction: decoupled weight decay and the step size."""
    core.validate(
        **{
            name: value
            for name, value in (("learning_rate", learning_rate), ("weight_decay", weight_decay))
            if not callable(value)
        }
    )
    return optax.chain(
        scaling,
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )


def _round_steps(
    solver: optax.GradientTransformationExtraArgs, rule: core.Rule, seed: Any
) -> optax.GradientTransformationExtraArgs:
    """Let a chain that begins with the rule's scaling step to stochastically rounded bfloat16 parameters."""
    make_words = _make_words(seed)
    multiplier = rounding.MULTIPLIERS[len(rule.state_names)]

    def widen(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32) if _dtype(leaf) == jnp.bfloat16 else leaf, tree)

    def update(updates: optax.Updates, state: Any, params: Any = None, **extra_args: Any) -> tuple[optax.Updates, Any]:
        # From the gradient on, for a decay or a direction in bfloat16 would have been rounded before.
        steps, new_state = solver.update(widen(updates), state, widen(params), **extra_args)

        def round_leaf(step: Any, number: Any, param: Any) -> Any:
            if step is None or _dtype(param) != jnp.bfloat16:
                return step
            old = jnp.asarray(param, jnp.float32)
            new = old + jnp.asarray(step, jnp.float32)
            # Adding the difference arrives there: two numbers of 8 digits, and float32 has 24.
            return _to_bfloat16(new, make_words(number, new_state[0].count, old.shape), multiplier) - old

        return jax.tree.map(round_leaf, steps, _numbers(state[0][1]), params, is_leaf=lambda leaf: leaf is None), new_state

    return optax.GradientTransformationExtraArgs(solver.init, update)


def _scale_by_rule(
    rule: core.Rule, hyper: Any, make_state: Callable[..., Any], state_dtype: str, seed: Any, outlier_threshold: Any
) -> optax.GradientTransformationExtraArgs:
    """What VSGD and Constant VSGD share: everything but the rule, its hyperparameters and its state's type."""
    rule, hyper = guarded(rule, hyper, *_known(outlier_threshold))
    core.validate(**hyper._asdict(), seed=seed)
    core.validate_state_dtype(state_dtype)
    update_real = rule.make_update(jnp)
    make_words = _make_words(seed)

    def init(params: optax.Params) -> Any:
        def full(param: Any, index: int) -> jax.Array:
            dtype = arithmetic_dtype(_dtype(param))
            real = jnp.finfo(dtype).dtype
            value = jnp.asarray(rule.initial_state(_in_dtype(hyper, real))[index], real)
            stored = state_dtype if dtype == jnp.float32 else dtype
            return jnp.full_like(param, join(value, value) if dtype != real else value, dtype=stored)

        trees = (jax.tree.map(functools.partial(full, index=i), params) for i in range(len(rule.state_names)))
        return make_state(jnp.zeros([], jnp.int32), *trees)

    def update(updates: optax.Updates, state: Any, params: Any = None, **extra_args: Any) -> tuple[optax.Updates, Any]:
        del params, extra_args
        count = optax.safe_increment(state.count)

        @functools.cache
        def coefficients(dtype: Any) -> Any:
            # In the arithmetic's dtype: a power of a float32 count would cost a float64 run its accuracy.
            return rule.coefficients(count.astype(dtype), _in_dtype(hyper, dtype))

        def update_leaf(path: Any, grad: Any, number: int, *arrays: jax.Array) -> tuple[Any, ...]:
            if grad is None:
                return None, *arrays
            _check_gradient(path, grad, {jnp.shape(array) for array in arrays})
            stored = arrays[0].dtype
            dtype = arithmetic_dtype(stored)
            c = coefficients(jnp.finfo(dtype).dtype)
            wide = (parts(array.astype(dtype)) for array in arrays)
            pairs = zip(parts(jnp.asarray(grad, dtype)), zip(*wide, strict=True), strict=True)
            direction, new_arrays = jax.tree.map(join, *(update_real(part, of_state, c) for part, of_state in pairs))
            if stored == jnp.bfloat16:
                words = make_words(number, count, arrays[0].shape)
                factors = zip(new_arrays, rounding.MULTIPLIERS, strict=False)
                new_arrays = [_to_bfloat16(array, words, multiplier).astype(stored) for array, multiplier in factors]
            return direction.astype(_dtype(grad)), *new_arrays

        treedef: Any
        grads, treedef = jax.tree_util.tree_flatten_with_path(updates, is_leaf=lambda leaf: leaf is None)
        trees = [treedef.flatten_up_to(tree) for tree in (_numbers(state[1]), *state[1:])]
        leaves = [update_leaf(path, grad, *of_leaf) for (path, grad), *of_leaf in zip(grads, *trees, strict=True)]
        directions, *new_trees = (treedef.unflatten([leaf[i] for leaf in leaves]) for i in range(len(state)))
        return directions, make_state(count, *new_trees)

    return optax.GradientTransformationExtraArgs(init, update)


class _Integers(rounding.Wrapping):
    """JAX's integer namespace, as `vsgd.rounding` wants one."""

    where = staticmethod(jnp.where)

    @staticmethod
    def bits(x: jax.Array) -> jax.Array:
        return jax.lax.bitcast_convert_type(x, jnp.int32)

    @staticmethod
    def floats(i: jax.Array) -> jax.Array:
        return jax.lax.bitcast_convert_type(i, jnp.float32)


_make_key = rounding.make_key(_Integers)
_make_word = rounding.make_word(_Integers)
_to_bfloat16 = rounding.make_round(_Integers)


def _make_words(seed: Any) -> Callable[[int, jax.Array, tuple[int, ...]], jax.Array]:
    """Build `words(number, count, shape)`, the random bits of a leaf's elements at a step."""
    if isinstance(seed, Integral):
        base_key, seed = rounding.base_key, int(seed)
    else:  # an array, as `inject_hyperparams` makes of it
        base_key, seed = rounding.make_base_key(_Integers), jnp.asarray(seed).astype(jnp.int32)

    def words(number: int, count: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        places = rounding.places(shape, functools.partial(jax.lax.broadcasted_iota, jnp.int32))
        return _make_word(places, _make_key(base_key(seed, number), count))

    return words


def _numbers(tree: Any) -> Any:
    """The tree with each leaf's number in its place."""
    leaves, structure = jax.tree.flatten(tree)
    return jax.tree.unflatten(structure, range(len(leaves)))


def _dtype(array: Any) -> Any:
    """The dtype of an array, of what only describes one, or of a number."""
    return array.dtype if hasattr(array, "dtype") else jnp.result_type(array)


def _known(*values: Any) -> tuple[Any, ...]:
    """Numbers as Python's own floats, which take on an array's dtype; NumPy's would widen it, and a large integer overflow."""
    return tuple(float(value) if isinstance(value, Real) and _is_foreign(value) else value for value in values)


def _is_foreign(value: Any) -> bool:
    return hasattr(value, "dtype") or (isinstance(value, int) and 2**31 <= abs(value) <= sys.float_info.max)


def _in_dtype(hyper: Any, dtype: Any) -> Any:
    """Hyperparameters that are arrays in the dtype of the arithmetic; numbers take it on by themselves."""
    return hyper._replace(
        **{
            name: _array_in_dtype(name, value, dtype)
            for name, value in hyper._asdict().items()
            if not (value is None or isinstance(value, Real))
        }
    )


def _array_in_dtype(name: str, value: Any, dtype: Any) -> jax.Array:
    value = jnp.asarray(value)
    if name == "prior_strength" and value.dtype == jnp.float16:
        # `inject_hyperparams` rounds to the parameters' dtype: 1e-8 to 0, at which all is NaN.
        return jnp.maximum(value.astype(dtype), float(jnp.finfo(value.dtype).smallest_subnormal))
    return value.astype(dtype)


def _check_gradient(path: Any, grad: Any, shapes: set[tuple[int, ...]]) -> None:
    where = f" at {jax.tree_util.keystr(path)}" if path else ""
    if shapes != {jnp.shape(grad)}:  # it would broadcast
        raise ValueError(f"state has arrays of shapes {sorted(shapes)}{where}, but updates has {jnp.shape(grad)}")
    if not jnp.issubdtype(_dtype(grad), jnp.inexact):
        raise ValueError(f"updates has an array of {_dtype(grad)}{where}, but must have floating or complex numbers")
