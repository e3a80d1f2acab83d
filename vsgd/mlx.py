"""VSGD as an `mlx.optimizers.Optimizer`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar, TypeAlias

try:
    import mlx.core as mx
    from mlx.optimizers import Optimizer
    from mlx.utils import tree_flatten, tree_map
except ImportError as error:
    raise ImportError("vsgd.mlx needs MLX: pip install 'vsgd[mlx]'") from error

from vsgd import core, prior
from vsgd.outliers import guarded
from vsgd.posterior import Posterior, posterior

__all__ = ["VSGD", "ConstantVSGD", "prior_strength_from"]

LearningRate: TypeAlias = float | mx.array | Callable[[mx.array], mx.array]


class _RuleOptimizer(Optimizer):
    """What VSGD and ConstantVSGD share: everything but the rule."""

    _kind: ClassVar[core.Rule]

    def __init__(
        self,
        learning_rate: LearningRate = 0.01,
        weight_decay: float = 0.0,
        outlier_threshold: float | None = None,
        **hyper: Any,
    ) -> None:
        super().__init__()
        self._rule, self.hyper = guarded(self._kind, self._kind.hyperparameters(**hyper), outlier_threshold)
        known = {} if callable(learning_rate) else {"learning_rate": learning_rate}
        core.validate(**known, weight_decay=weight_decay, **self.hyper._asdict())
        self.weight_decay = weight_decay
        self._maybe_schedule("learning_rate", learning_rate)

    def init_single(self, parameter: mx.array, state: dict[str, mx.array]) -> None:
        """Fill the state of one parameter."""
        # Half precision holds neither b_g (it falls to 1e-8) nor its small changes.
        dtype = mx.float64 if parameter.dtype == mx.float64 else mx.float32
        for name, value in zip(self._rule.state_names, self._rule.initial_state(self.hyper), strict=True):
            state[name] = mx.full(parameter.shape, value, dtype)

    def apply_gradients(self, gradients: Any, parameters: Any) -> Any:
        """Step as the base class does, but refuse what does not fit before anything changes."""
        if not self._initialized:
            self.init(tree_map(lambda _, parameter: parameter, gradients, parameters))
        tree_map(self._check, gradients, parameters, self.state)
        return super().apply_gradients(gradients, parameters)

    def _check(self, gradient: mx.array, parameter: mx.array, state: dict[str, mx.array]) -> None:
        shapes = {name: array.shape for name, array in {"parameter": parameter, **state}.items()}
        expected = dict.fromkeys(("parameter", *self._rule.state_names), gradient.shape)
        if shapes != expected:  # they would broadcast
            raise ValueError(f"parameter and state have shapes {shapes}, but must have the gradient's: {expected}")
        if not mx.issubdtype(parameter.dtype, mx.floating):
            raise ValueError(f"a parameter is of {parameter.dtype}, but must be of real floating numbers")

    def apply_single(self, gradient: mx.array, parameter: mx.array, state: dict[str, mx.array]) -> mx.array:
        """Update the state of one parameter and return its new value."""
        arrays = tuple(state[name] for name in self._rule.state_names)
        dtype = arrays[0].dtype
        coefficients = self._rule.coefficients(self.step.astype(dtype), self.hyper)
        direction, arrays = self._rule.make_update(mx)(gradient.astype(dtype), arrays, coefficients)
        state.update(zip(self._rule.state_names, arrays, strict=True))
        lr = self.learning_rate.astype(dtype)
        return core.descend(parameter.astype(dtype), direction, lr, 1 - lr * self.weight_decay).astype(parameter.dtype)

    def posterior(self, state: dict[str, mx.array]) -> Posterior:
        """What is known of a parameter's gradient: the uncertainty of the gradient, not of the weights.

        Args:
            state: the parameter's in the optimizer's, such as `optimizer.state["layers"][0]["weight"]`.

        Returns:
            Arrays of the parameter's shape, float64 for float64 parameters, else float32.

        Raises:
            ValueError: the state is of another rule, or of more than one parameter.
        """
        if state.keys() != set(self._rule.state_names):
            raise ValueError(f"state has {sorted(state)}, but must be one parameter's: {sorted(self._rule.state_names)}")
        return posterior(tuple(state[name] for name in self._rule.state_names), self._rule.variance_scales(self.hyper))


class VSGD(_RuleOptimizer):
    """Variational stochastic gradient descent (Chen et al., TMLR 2025, arXiv 2404.06549) for MLX.

    State of each parameter, in `state` at the parameter's place: `mu_g`, `b_g`, `b_ghat` (arrays of the parameter's shape;
    float64 for float64 parameters, else float32). All parameters share the count `state["step"]`.

    Args:
        learning_rate: the paper's eta, the step size: a number, or a schedule, called with the count of steps before this one.
            MLX keeps a number as float32; an array keeps its dtype, for a run in float64.
        weight_decay: decoupled weight decay, as in `mlx.optimizers.AdamW`, applied before the step.
        outlier_threshold: cut what differs from the predicted gradient by more than so many of its predicted standard
            deviations, element by element; None: use every gradient as it is. See `vsgd.outliers`.
        **hyper: the fields of `vsgd.core.Hyperparameters`, by name: `variance_ratio`, `prior_strength`, `kappa1`, `kappa2`,
            `eps`, `prior_shape`.

    Raises:
        ValueError: a hyperparameter is out of its range; or, in a step, a parameter is not of real floating numbers, or a
            shape does not fit. Nothing was changed.

    Example:
        >>> import mlx.core as mx
        >>> from vsgd.mlx import VSGD
        >>> optimizer = VSGD(learning_rate=0.05)
        >>> params = {"weight": mx.array([1.0, -2.0])}
        >>> for _ in range(100):
        ...     grads = {"weight": 2 * params["weight"]}  # of (weight ** 2).sum()
        ...     params = optimizer.apply_gradients(grads, params)
        >>> (params["weight"] ** 2).sum().item() < 1  # from 5
        True
        >>> optimizer.posterior(optimizer.state["weight"]).gain.shape
        (2,)
    """

    _kind = core.VSGD


class ConstantVSGD(_RuleOptimizer):
    """VSGD with one precision for drift and noise (arXiv 2404.06549, the paper's second variant), for MLX.

    State of each parameter, in `state` at the parameter's place: `mu_g`, `b` (arrays of the parameter's shape; float64 for
    float64 parameters, else float32). All parameters share the count `state["step"]`.

    Args:
        learning_rate: as for `VSGD`.
        weight_decay: as for `VSGD`.
        outlier_threshold: as for `VSGD`.
        **hyper: the fields of `vsgd.core.ConstantHyperparameters`, by name: `variance_ratio`, `prior_strength`, `kappa`,
            `eps`, `prior_shape`.

    Raises:
        ValueError: as for `VSGD`.

    Example:
        >>> import mlx.core as mx, mlx.optimizers as optim
        >>> from vsgd.mlx import ConstantVSGD
        >>> optimizer = ConstantVSGD(optim.cosine_decay(0.1, decay_steps=100))
        >>> params = {"weight": mx.array([1.0, -2.0])}
        >>> optimizer.apply_gradients({"weight": 2 * params["weight"]}, params)["weight"].round(3)
        array([0.9, -1.9], dtype=float32)
    """

    _kind = core.CONSTANT_VSGD


def prior_strength_from(gradients: Iterable[Any], scale: float = 10.0) -> float:
    """A `prior_strength` in the units of a model's gradients, to be taken before training: see `docs/tuning.md`.

    It is `5e-5 * scale` times the mean of the squares of all elements, over all parameters and mini-batches together. So the
    first steps expect a variance of about `scale` times what a squared gradient is.

    The mini-batches are taken one after the other: a generator need not hold the gradients of more than one. Gradients are to
    be those that the optimizer will see, of the loss that is trained on.

    Args:
        gradients: for each of a few mini-batches, 10 are advised, a tree of gradients, as `mlx.nn.value_and_grad` returns it.
            None is left out.
        scale: the variance to start with, over the mean squared gradient. Larger starts slower, far smaller is unsafe.

    Returns:
        A number for `VSGD` or `ConstantVSGD`.

    Raises:
        ValueError: `scale` is out of its range; there are no gradients, all are zero, one is not finite or none of numbers; or
            they are so small or large that what would be returned is no prior strength.

    Example:
        >>> import mlx.core as mx
        >>> from vsgd.mlx import VSGD, prior_strength_from
        >>> def loss(params, x):
        ...     return ((x @ params["weight"] - 1.0) ** 2).mean()
        >>> params = {"weight": mx.zeros(2)}
        >>> batches = [mx.array([[1.0, 0.0]]), mx.array([[0.0, 2.0]])]
        >>> strength = prior_strength_from(mx.grad(loss)(params, x) for x in batches)
        >>> round(strength, 6)  # 5e-5 * 10 * (2**2 + 4**2) / 4
        0.0025
        >>> optimizer = VSGD(prior_strength=strength)
    """
    return prior.prior_strength_from(gradients, scale, _leaves, lambda sizes: sizes.sum().item())


def _leaves(name: str, batch: Any) -> Iterator[prior.Leaf]:
    for path, grad in tree_flatten(batch):
        if grad is not None:
            yield _leaf(f"{name}[{path!r}]" if path else name, grad)


def _leaf(name: str, grad: Any) -> prior.Leaf:
    if not (isinstance(grad, mx.array) and mx.issubdtype(grad.dtype, mx.inexact)):
        kind = f"an array of {grad.dtype}" if isinstance(grad, mx.array) else type(grad).__name__
        raise ValueError(f"{name} is {kind}, but must be an array of floating or complex numbers")
    is_complex = mx.issubdtype(grad.dtype, mx.complexfloating)
    wide = grad if is_complex or grad.dtype == mx.float64 else grad.astype(mx.float32)
    return prior.Leaf(name, mx.abs(wide), grad.size * (2 if is_complex else 1))
