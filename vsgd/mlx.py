"""VSGD as an `mlx.optimizers.Optimizer`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from numbers import Real
from typing import Any, ClassVar, TypeAlias

try:
    import mlx.core as mx
    from mlx.optimizers import Optimizer
    from mlx.utils import tree_flatten, tree_map
except ImportError as error:
    raise ImportError("vsgd.mlx needs MLX: run pip install '.[mlx]' in a clone of vsgd") from error

from vsgd import core, prior
from vsgd.outliers import choose_rule
from vsgd.posterior import Posterior, Scales, compute_posterior
from vsgd.validation import document_options, validate_numbers

__all__ = ["VSGD", "ConstantVSGD", "prior_strength_from"]

LearningRate: TypeAlias = float | mx.array | Callable[[mx.array], mx.array]


class _RuleOptimizer(Optimizer):
    """The code that VSGD and ConstantVSGD share: everything but the rule and its hyperparameters."""

    _plain_rule: ClassVar[core.Rule]

    def __init__(self, learning_rate: LearningRate, weight_decay: float, **options: Any) -> None:
        super().__init__()
        self._rule = choose_rule(self._plain_rule, options["outlier_threshold"])
        if not callable(learning_rate):
            validate_numbers(mx.array, learning_rate=learning_rate)
        names = self._rule.hyperparameters._fields
        validate_numbers(weight_decay=weight_decay, **{name: options[name] for name in names})
        self.hyper = self._rule.select_hyperparameters(options)
        self._calibrates = prior.is_auto(options["prior_strength"])
        if self._calibrates:
            self.state["gradient_unit"] = mx.array(0.0)
        self.weight_decay = float(weight_decay)
        # MLX would turn an integer into an array of 64 bits.
        self._maybe_schedule("learning_rate", float(learning_rate) if isinstance(learning_rate, Real) else learning_rate)

    def init_single(self, parameter: mx.array, state: dict[str, mx.array]) -> None:
        """Create the state of one parameter."""
        # Half precision holds neither b_g (it falls to 1e-8) nor its small changes.
        dtype = mx.float64 if parameter.dtype == mx.float64 else mx.float32
        for name, value in zip(self._rule.state_names, self._rule.initial_state(self.hyper), strict=True):
            state[name] = mx.full(parameter.shape, value, dtype)

    def apply_gradients(self, gradients: Any, parameters: Any) -> Any:
        """Take a step as the base class does; arrays that do not fit raise an error before anything changes."""
        if not self._initialized:
            self.init(tree_map(lambda _, parameter: parameter, gradients, parameters))
        tree_map(self._check, gradients, parameters, self.state)
        if ("gradient_unit" in self.state) != self._calibrates:
            found = "no gradient_unit" if self._calibrates else "a gradient_unit"
            raise ValueError(
                f"state has {found}, but only the state of an optimizer with prior_strength='auto' has and needs one"
            )
        if not self._calibrates:
            return super().apply_gradients(gradients, parameters)
        before = self.step
        self.state["gradient_unit"] = mx.where(self._unit > 0, self._unit, _measure_unit(gradients))
        stepped = super().apply_gradients(gradients, parameters)
        self.state["step"] = mx.where(self._unit > 0, self.step, before)
        return stepped

    @property
    def _unit(self) -> mx.array:
        return self.state["gradient_unit"]

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
        gradient = gradient.astype(dtype)
        if self._calibrates:
            gradient = gradient * (1 / self._unit.astype(dtype))
        direction, new_arrays = self._rule.make_update(mx)(gradient, arrays, coefficients)
        lr = self.learning_rate.astype(dtype)
        stepped = core.descend(parameter.astype(dtype), direction, lr, 1 - lr * self.weight_decay).astype(parameter.dtype)
        if self._calibrates:  # a step without a unit changes nothing
            old = parameter, *arrays
            new = (mx.where(self._unit > 0, *pair) for pair in zip((stepped, *new_arrays), old, strict=True))
            stepped, new_arrays = next(new), tuple(new)
        state.update(zip(self._rule.state_names, new_arrays, strict=True))
        return stepped

    def posterior(self, state: dict[str, mx.array]) -> Posterior:
        """Return the posterior of a parameter's gradient: the uncertainty of the gradient, not of the weights.

        Args:
            state: the parameter's state in the optimizer, such as `optimizer.state["layers"][0]["weight"]`.

        Returns:
            Arrays of the parameter's shape, float64 for float64 parameters, else float32.

        Raises:
            ValueError: the state belongs to another rule, or to more than one parameter.
        """
        if state.keys() != set(self._rule.state_names):
            raise ValueError(f"state has {sorted(state)}, but must be one parameter's: {sorted(self._rule.state_names)}")
        arrays = tuple(state[name] for name in self._rule.state_names)
        unit = mx.where(self._unit > 0, self._unit, 1.0).astype(arrays[0].dtype) if self._calibrates else 1.0
        return compute_posterior(arrays, Scales(*self._rule.variance_scales(self.hyper), unit))


@document_options()
class VSGD(_RuleOptimizer):
    """Variational stochastic gradient descent (Chen et al., TMLR 2025, arXiv 2404.06549) for MLX.

    `state` holds `mu_g`, `b_g`, `b_ghat` at each parameter's place, arrays of the parameter's shape, float64 for float64
    parameters, else float32. All parameters share the count `state["step"]`.

    Args:
        learning_rate: the paper's eta, the step size: a number, or a schedule, called with the count of steps before this one.
            MLX stores a number as float32; an array keeps its dtype, which a run in float64 needs.
        variance_ratio: {variance_ratio}
        prior_strength: {prior_strength}
        kappa1: {kappa1}
        kappa2: {kappa2}
        eps: {eps}
        weight_decay: decoupled weight decay, as in `mlx.optimizers.AdamW`, applied before the step.
        outlier_threshold: {outlier_threshold}
        prior_shape: {prior_shape}
        forgetting_floor: {forgetting_floor}

    Raises:
        ValueError: a hyperparameter is out of its range; or, in a step, a parameter is not of real floating numbers, or a shape
            does not fit. Nothing has changed.

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

    _plain_rule = core.VSGD

    def __init__(
        self,
        learning_rate: LearningRate = 0.01,
        *,
        variance_ratio: float = 30.0,
        prior_strength: float | str = 1e-8,
        kappa1: float = 0.81,
        kappa2: float = 0.9,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        outlier_threshold: float | None = None,
        prior_shape: float | None = None,
        forgetting_floor: float = 0.0,
    ) -> None:
        super().__init__(
            learning_rate,
            weight_decay,
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
class ConstantVSGD(_RuleOptimizer):
    """Constant VSGD (arXiv 2404.06549, section 4) for MLX, with one precision for drift and noise.

    `state` holds `mu_g`, `b` at each parameter's place, arrays of the parameter's shape, float64 for float64 parameters, else
    float32. All parameters share the count `state["step"]`.

    Args:
        learning_rate: the paper's eta, the step size: a number, or a schedule, called with the count of steps before this one.
            MLX stores a number as float32; an array keeps its dtype, which a run in float64 needs.
        variance_ratio: {constant_variance_ratio}
        prior_strength: {prior_strength}
        kappa: {kappa}
        eps: {eps}
        weight_decay: decoupled weight decay, as in `mlx.optimizers.AdamW`, applied before the step.
        outlier_threshold: {outlier_threshold}
        prior_shape: {prior_shape}
        forgetting_floor: {forgetting_floor}

    Raises:
        ValueError: a hyperparameter is out of its range; or, in a step, a parameter is not of real floating numbers, or a shape
            does not fit. Nothing has changed.

    Example:
        >>> import mlx.core as mx, mlx.optimizers as optim
        >>> from vsgd.mlx import ConstantVSGD
        >>> optimizer = ConstantVSGD(optim.cosine_decay(0.1, decay_steps=100))
        >>> params = {"weight": mx.array([1.0, -2.0])}
        >>> optimizer.apply_gradients({"weight": 2 * params["weight"]}, params)["weight"].round(3)
        array([0.9, -1.9], dtype=float32)
    """

    _plain_rule = core.CONSTANT_VSGD

    def __init__(
        self,
        learning_rate: LearningRate = 0.01,
        *,
        variance_ratio: float = 3.0,
        prior_strength: float | str = 1e-8,
        kappa: float = 0.9,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        outlier_threshold: float | None = None,
        prior_shape: float | None = None,
        forgetting_floor: float = 0.0,
    ) -> None:
        super().__init__(
            learning_rate,
            weight_decay,
            variance_ratio=variance_ratio,
            prior_strength=prior_strength,
            kappa=kappa,
            eps=eps,
            outlier_threshold=outlier_threshold,
            prior_shape=prior_shape,
            forgetting_floor=forgetting_floor,
        )


@document_options()
def prior_strength_from(gradients: Iterable[Any], scale: float = 10.0) -> float:
    """Compute a `prior_strength` in the units of a model's gradients, before training: see `docs/calibration.md`.

    The result is `5e-5 * scale` times the mean square of all gradient elements, over all parameters and mini-batches. Pass the
    gradients that the optimizer will see: those of the training loss, unscaled.

    Args:
        gradients: for each of a few mini-batches, about 10, a tree of gradients, as `mlx.nn.value_and_grad` returns it. None is
            skipped.
        scale: {scale}

    Returns:
        A number for `prior_strength`.

    Raises:
        ValueError: `scale` is out of its range; the gradients are missing, all zero, not finite or not of numbers; or the
            result is not a valid prior strength.

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
    return prior.prior_strength_from(gradients, scale, _iterate_leaves, lambda magnitudes: magnitudes.sum().item())


def _measure_unit(gradients: Any) -> mx.array:
    arrays = [gradient for _, gradient in tree_flatten(gradients)]
    wide = [array if array.dtype == mx.float64 else array.astype(mx.float32) for array in arrays]
    return mx.array(prior.measure_unit(mx, [prior.Shards(wide)], sum(array.size for array in arrays)))


def _iterate_leaves(name: str, batch: Any) -> Iterator[prior.Gradient]:
    for path, grad in tree_flatten(batch):
        if grad is not None:
            yield _make_leaf(f"{name}[{path!r}]" if path else name, grad)


def _make_leaf(name: str, grad: Any) -> prior.Gradient:
    if not (isinstance(grad, mx.array) and mx.issubdtype(grad.dtype, mx.inexact)):
        found = f"an array of {grad.dtype}" if isinstance(grad, mx.array) else type(grad).__name__
        raise ValueError(f"{name} is {found}, but must be an array of floating or complex numbers")
    is_complex = mx.issubdtype(grad.dtype, mx.complexfloating)
    wide = grad if is_complex or grad.dtype == mx.float64 else grad.astype(mx.float32)
    return prior.Gradient(name, mx.abs(wide), grad.size * (2 if is_complex else 1))
