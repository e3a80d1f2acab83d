"""VSGD for NumPy arrays: the reference, readable in one sitting."""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from vsgd import core, prior
from vsgd.outliers import choose_rule
from vsgd.posterior import (
    NoiseScale,
    NoiseScales,
    Posterior,
    Scales,
    compute_posterior,
    compute_surprise,
    estimate_noise_scale,
)
from vsgd.validation import document_options, validate_numbers

__all__ = ["VSGD", "ConstantVSGD", "prior_strength_from"]


class _RuleOptimizer:
    """The code that VSGD and ConstantVSGD share: everything but the rule and its hyperparameters.

    Attributes:
        params: the arrays that `step` updates in place, or views of their memory.
        lr: the step size; assign to it to follow a schedule.
        weight_decay: decoupled weight decay.
        hyper: the rule's other hyperparameters.
        gradient_unit: the unit of the state, in units of the gradient: 1.0, or with `prior_strength="auto"` None until
            calibrated.
        state: for each parameter a dict with `step`, the count of its steps, and the rule's state arrays.
    """

    _plain_rule: ClassVar[core.Rule]

    def __init__(self, params: Iterable[np.ndarray], lr: float, weight_decay: float, **options: Any) -> None:
        self._rule = choose_rule(self._plain_rule, options["outlier_threshold"])
        names = self._rule.hyperparameters._fields
        validate_numbers(lr=lr, weight_decay=weight_decay, **{name: options[name] for name in names})
        if not isinstance(params, Iterable):
            raise ValueError(f"params is {type(params).__name__}, but must be a list of arrays")
        self.params = [_check_param(index, param) for index, param in enumerate(params)]
        self.lr = lr
        self.weight_decay = weight_decay
        self.hyper = self._rule.select_hyperparameters(options)
        self.gradient_unit: float | None = None if prior.is_auto(options["prior_strength"]) else 1.0
        self.state = [self._make_state(param) for param in self.params]

    def _make_state(self, param: np.ndarray) -> dict[str, Any]:
        # float16 holds neither b_g (it falls to 1e-8) nor its small changes.
        dtype = np.promote_types(param.dtype, np.complex64 if np.iscomplexobj(param) else np.float32)
        state: dict[str, Any] = {"step": 0}
        for name, value in zip(self._rule.state_names, self._rule.initial_state(self.hyper), strict=True):
            state[name] = np.full_like(param, complex(value, value) if dtype.kind == "c" else value, dtype=dtype)
        return state

    def step(self, grads: Sequence[np.ndarray | None]) -> None:
        """Take one step, in place.

        Args:
            grads: for each parameter a gradient of its shape, or None to leave the parameter and its step count as they are.

        Raises:
            ValueError: the gradients do not fit the parameters, or `lr` or `weight_decay` is out of its range. Nothing has
                changed.
        """
        validate_numbers(lr=self.lr, weight_decay=self.weight_decay)
        checked = self._check_grads(grads)
        if self.gradient_unit is None:
            self.gradient_unit = self._measure_unit(checked)
        if self.gradient_unit is not None:
            for param, grad, state in zip(self.params, checked, self.state, strict=True):
                if grad is not None:
                    self._step_one(param, grad, state, 1 / self.gradient_unit)

    def _measure_unit(self, grads: Sequence[np.ndarray | None]) -> float | None:
        pairs = [(grad, state["mu_g"].dtype) for grad, state in zip(grads, self.state, strict=True) if grad is not None]
        arrays = [_view_as_real(grad.astype(dtype)) for grad, dtype in pairs]
        with np.errstate(divide="ignore", invalid="ignore"):
            return float(prior.measure_unit(np, [prior.Shards(arrays)], sum(array.size for array in arrays))) or None

    def _step_one(self, param: np.ndarray, grad: np.ndarray, state: dict[str, Any], scale: float) -> None:
        state["step"] += 1
        arrays = tuple(state[name] for name in self._rule.state_names)
        update = self._rule.make_update(np)
        coefficients = self._rule.coefficients(state["step"], self.hyper)
        dtype = arrays[0].dtype
        real_grad = _view_as_real(grad.astype(dtype)) * scale
        direction, new_arrays = update(real_grad, tuple(map(_view_as_real, arrays)), coefficients)
        for array, new in zip(arrays, new_arrays, strict=True):
            _view_as_real(array)[...] = new
        lr = float(self.lr)
        decay = 1 - lr * float(self.weight_decay)
        _view_as_real(param)[...] = core.descend(_view_as_real(param.astype(dtype)), direction, lr, decay)

    def posterior(self, index: int) -> Posterior:
        """Return the posterior of a parameter's gradient: the uncertainty of the gradient, not of the weights.

        Args:
            index: the parameter's index in `params`.

        Returns:
            Copies of the parameter's shape, float64 for float64 parameters, else float32.
        """
        posterior = self._compute_posterior(self.state[index])
        posterior = posterior._replace(mean=posterior.mean.copy())
        if np.iscomplexobj(self.params[index]):
            dtype = self.state[index]["mu_g"].dtype
            return Posterior(*(np.ascontiguousarray(part).view(dtype)[..., 0] for part in posterior))
        return posterior

    def noise_scale(self, *, batch_size: float) -> NoiseScales:
        """Estimate the gradient noise scale (arXiv 1812.06162) where the weights are held still, at a learning rate of 0.

        While weights move, the estimate is wrong: see `vsgd.posterior.estimate_noise_scale`. To measure the noise scale of a
        training, see `vsgd.monitor.noise_scale`.

        Args:
            batch_size: the number of examples that a gradient averages.

        Returns:
            The estimate overall and, in `tensors`, a list in the order of `params`.

        Raises:
            ValueError: `batch_size` is out of its range.
        """
        validate_numbers(batch_size=batch_size)
        tensors = [estimate_noise_scale(self._compute_posterior(state), batch_size, np.sum) for state in self.state]
        return NoiseScales(functools.reduce(operator.add, tensors, NoiseScale(np.float64(0), np.float64(0))), tensors)

    def surprise(self, grads: Sequence[np.ndarray | None]) -> list[float | None]:
        """Return how unexpected gradients are before a step takes them, averaged over each parameter: see `vsgd.posterior`.

        Args:
            grads: gradients as for `step`.

        Returns:
            For each parameter the mean of its squared standardized innovations, near 1 where the model fits; None without a
            gradient.

        Raises:
            ValueError: the gradients do not fit the parameters.
        """
        surprises: list[float | None] = []
        for grad, state in zip(self._check_grads(grads), self.state, strict=True):
            if grad is None:
                surprises.append(None)
                continue
            real_grad = _view_as_real(grad.astype(state["mu_g"].dtype))
            surprises.append(float(compute_surprise(real_grad, *self._get_real_state(state)).mean()))
        return surprises

    def _compute_posterior(self, state: dict[str, Any]) -> Posterior:
        return compute_posterior(*self._get_real_state(state))

    def _get_real_state(self, state: dict[str, Any]) -> tuple[core.State, Scales]:
        arrays = tuple(_view_as_real(state[name]) for name in self._rule.state_names)
        return arrays, Scales(*self._rule.variance_scales(self.hyper), self.gradient_unit or 1.0)

    def _check_grads(self, grads: Sequence[np.ndarray | None]) -> list[np.ndarray | None]:
        """Return the gradients as arrays, or raise an error if one does not fit its parameter."""
        if not hasattr(grads, "__len__"):
            raise ValueError(f"grads is {type(grads).__name__}, but must be a list with an array or None for each of params")
        if len(grads) != len(self.params):
            raise ValueError(f"grads has {len(grads)} items, but there are {len(self.params)} params")
        pairs = enumerate(zip(self.params, grads, strict=True))
        return [None if grad is None else _check_grad(index, param, grad) for index, (param, grad) in pairs]


def _check_param(index: int, param: Any) -> np.ndarray:
    if not isinstance(param, np.ndarray) or isinstance(param, np.ma.MaskedArray) or param.dtype.kind not in "fc":
        found = f"{type(param).__name__} of {param.dtype}" if isinstance(param, np.ndarray) else type(param).__name__
        raise ValueError(f"params[{index}] is {found}, but must be a NumPy array of floating or complex numbers, unmasked")
    if not param.flags.writeable:
        raise ValueError(f"params[{index}] is read-only, but must be writeable to be updated in place")
    return param.view(np.ndarray)  # a subclass, such as a matrix, may define other operators


def _check_grad(index: int, param: np.ndarray, grad: Any) -> np.ndarray:
    if np.shape(grad) != param.shape:
        raise ValueError(f"grads[{index}] has shape {np.shape(grad)}, but params[{index}] has {param.shape}")
    array = np.asarray(grad)
    if array.dtype.kind not in "biuf" + param.dtype.kind:
        raise ValueError(
            f"grads[{index}] is of {array.dtype}, but must be of numbers that fit params[{index}] of {param.dtype}"
        )
    return array


def _view_as_real(array: np.ndarray) -> np.ndarray:
    """Return a view of the array in which a complex number is two real ones."""
    return array[..., np.newaxis].view(array.real.dtype) if array.dtype.kind == "c" else array


@document_options()
class VSGD(_RuleOptimizer):
    """Variational stochastic gradient descent (Chen et al., TMLR 2025, arXiv 2404.06549) for a list of arrays.

    `state` holds for each parameter `step` and the arrays `mu_g`, `b_g`, `b_ghat`, of the parameter's shape, float64 for
    float64 parameters, else float32.

    Args:
        params: arrays of floating or complex numbers, updated in place.
        lr: the paper's eta, the step size.
        variance_ratio: {variance_ratio}
        prior_strength: {prior_strength}
        kappa1: {kappa1}
        kappa2: {kappa2}
        eps: {eps}
        weight_decay: decoupled weight decay, as in AdamW, applied before the step.
        outlier_threshold: {outlier_threshold}
        prior_shape: {prior_shape}
        forgetting_floor: {forgetting_floor}

    Raises:
        ValueError: a hyperparameter is out of its range, or a parameter is not a writeable array of floating numbers.

    Example:
        >>> weight = np.array([1.0, -2.0])
        >>> optimizer = VSGD([weight], lr=0.05)
        >>> for _ in range(100):
        ...     optimizer.step([2 * weight])  # the gradient of (weight ** 2).sum()
        >>> bool((weight**2).sum() < 1)  # from 5
        True
    """

    _plain_rule = core.VSGD

    def __init__(
        self,
        params: Iterable[np.ndarray],
        lr: float = 0.01,
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
            params,
            lr,
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
    """Constant VSGD (arXiv 2404.06549, section 4) for a list of arrays, with one precision for drift and noise.

    `state` holds for each parameter `step` and the arrays `mu_g`, `b`, of the parameter's shape, float64 for float64
    parameters, else float32.

    Args:
        params: arrays of floating or complex numbers, updated in place.
        lr: the paper's eta, the step size.
        variance_ratio: {constant_variance_ratio}
        prior_strength: {prior_strength}
        kappa: {kappa}
        eps: {eps}
        weight_decay: decoupled weight decay, as in AdamW, applied before the step.
        outlier_threshold: {outlier_threshold}
        prior_shape: {prior_shape}
        forgetting_floor: {forgetting_floor}

    Raises:
        ValueError: a hyperparameter is out of its range, or a parameter is not a writeable array of floating numbers.

    Example:
        >>> weight = np.array([1.0, -2.0])
        >>> optimizer = ConstantVSGD([weight], lr=0.1)
        >>> optimizer.step([2 * weight])
        >>> sorted(optimizer.state[0])
        ['b', 'mu_g', 'step']
    """

    _plain_rule = core.CONSTANT_VSGD

    def __init__(
        self,
        params: Iterable[np.ndarray],
        lr: float = 0.01,
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
            params,
            lr,
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
def prior_strength_from(
    gradients: Iterable[Iterable[np.ndarray | None] | Mapping[Any, np.ndarray | None]], scale: float = 10.0
) -> float:
    """Compute a `prior_strength` in the units of a model's gradients, before training: see `docs/calibration.md`.

    The result is `5e-5 * scale` times the mean square of all gradient elements, over all parameters and mini-batches. Pass the
    gradients that the optimizer will see: those of the training loss, unscaled.

    Args:
        gradients: for each of a few mini-batches, about 10, the gradients of the parameters: a list as for `step`, or a dict.
            None is skipped.
        scale: {scale}

    Returns:
        A number for `prior_strength`.

    Raises:
        ValueError: `scale` is out of its range; the gradients are missing, all zero, not finite or not of numbers; or the
            result is not a valid prior strength.

    Example:
        >>> weight = np.array([1.0, -2.0])
        >>> gradients = ([2 * (weight - target)] for target in (0.0, 1.0))  # of each mini-batch
        >>> strength = prior_strength_from(gradients)
        >>> round(strength, 6)  # 5e-5 * 10 * (2**2 + 4**2 + 0**2 + 6**2) / 4
        0.007
        >>> optimizer = VSGD([weight], prior_strength=strength)
    """
    return prior.prior_strength_from(gradients, scale, prior.iterate_lists(_make_leaf), np.sum)


def _make_leaf(name: str, grad: Any) -> prior.Gradient:
    array = np.asarray(grad)
    if array.dtype.kind not in "biufc":
        raise ValueError(f"{name} is of {array.dtype}, but must be of numbers")
    is_complex = array.dtype.kind == "c"
    magnitudes = np.abs(array.astype(np.promote_types(array.dtype, np.complex128 if is_complex else np.float64)))
    return prior.Gradient(name, magnitudes, array.size * (2 if is_complex else 1))
