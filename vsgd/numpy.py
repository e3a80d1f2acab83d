"""VSGD for NumPy arrays: the reference, readable in one sitting."""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from typing import Any, ClassVar

import numpy as np

from vsgd import core, prior
from vsgd.outliers import guarded
from vsgd.posterior import NoiseScale, NoiseScales, Posterior, noise_scale, posterior, surprise

__all__ = ["VSGD", "ConstantVSGD", "prior_strength_from"]


class _RuleOptimizer:
    """What VSGD and ConstantVSGD share: everything but the rule and its hyperparameters.

    Attributes:
        params: the arrays that `step` updates in place, or views of their memory.
        lr: the step size; set it to follow a schedule.
        weight_decay: decoupled weight decay.
        hyper: the rule's other hyperparameters.
        state: for each parameter a dict with `step`, the count of its steps, and the rule's state arrays.
    """

    _kind: ClassVar[core.Rule]

    def __init__(
        self, params: Iterable[np.ndarray], lr: float, weight_decay: float, hyper: Any, outlier_threshold: float | None
    ) -> None:
        self._rule, hyper = guarded(self._kind, hyper, outlier_threshold)
        core.validate(lr=lr, weight_decay=weight_decay, **hyper._asdict())
        if not isinstance(params, Iterable):
            raise ValueError(f"params is {type(params).__name__}, but must be a list of arrays")
        self.params = [_checked_param(index, param) for index, param in enumerate(params)]
        self.lr = lr
        self.weight_decay = weight_decay
        # As Python's own: a power of NumPy's integers fails, and its float64 would widen the arithmetic.
        self.hyper = type(hyper)(*(float(value) if isinstance(value, Real) else value for value in hyper))
        self.state = [self._initial_state(param) for param in self.params]

    def _initial_state(self, param: np.ndarray) -> dict[str, Any]:
        # float16 holds neither b_g (it falls to 1e-8) nor its small changes.
        dtype = np.promote_types(param.dtype, np.complex64 if np.iscomplexobj(param) else np.float32)
        state: dict[str, Any] = {"step": 0}
        for name, value in zip(self._rule.state_names, self._rule.initial_state(self.hyper), strict=True):
            state[name] = np.full_like(param, complex(value, value) if dtype.kind == "c" else value, dtype=dtype)
        return state

    def step(self, grads: Sequence[np.ndarray | None]) -> None:
        """Take one step, in place.

        Args:
            grads: a gradient of its parameter's shape for each parameter; a parameter with None is left alone, and its step
                count with it.

        Raises:
            ValueError: the gradients do not fit the parameters, or `lr` or `weight_decay` was set to what is out of its range.
                Nothing was changed.
        """
        core.validate(lr=self.lr, weight_decay=self.weight_decay)
        for param, grad, state in zip(self.params, self._checked(grads), self.state, strict=True):
            if grad is not None:
                self._step_one(param, grad, state)

    def _checked(self, grads: Sequence[np.ndarray | None]) -> list[np.ndarray | None]:
        """The gradients as arrays, where they fit the parameters."""
        if not hasattr(grads, "__len__"):
            raise ValueError(f"grads is {type(grads).__name__}, but must be a list with an array or None for each of params")
        if len(grads) != len(self.params):
            raise ValueError(f"grads has {len(grads)} items, but there are {len(self.params)} params")
        pairs = enumerate(zip(self.params, grads, strict=True))
        return [None if grad is None else _checked_grad(index, param, grad) for index, (param, grad) in pairs]

    def posterior(self, index: int) -> Posterior:
        """What is known of a parameter's gradient: the uncertainty of the gradient, not of the weights.

        Args:
            index: of the parameter, in `params`.

        Returns:
            Arrays of the parameter's shape, float64 for float64 parameters, else float32; copies.
        """
        known = self._posterior(self.state[index])
        known = known._replace(mean=known.mean.copy())
        if np.iscomplexobj(self.params[index]):
            return Posterior(*(np.ascontiguousarray(part).view(self.state[index]["mu_g"].dtype)[..., 0] for part in known))
        return known

    def noise_scale(self, *, batch_size: float) -> NoiseScales:
        """The gradient noise scale (arXiv 1812.06162) of all parameters; see `vsgd.posterior.noise_scale`.

        Args:
            batch_size: how many examples a gradient is the mean of.

        Returns:
            The estimates overall and, in `tensors`, as a list in the order of `params`.

        Raises:
            ValueError: `batch_size` is out of its range.
        """
        core.validate(batch_size=batch_size)
        tensors = [noise_scale(self._posterior(state), batch_size, np.sum) for state in self.state]
        return NoiseScales(functools.reduce(operator.add, tensors, NoiseScale(np.float64(0), np.float64(0))), tensors)

    def surprise(self, grads: Sequence[np.ndarray | None]) -> list[float | None]:
        """How unexpected gradients are before a step takes them, averaged over each parameter: see `vsgd.posterior`.

        Args:
            grads: as for `step`.

        Returns:
            For each parameter the mean of its squared standardized innovations, near 1 where the model fits; None without a
            gradient.

        Raises:
            ValueError: the gradients do not fit the parameters.
        """
        pairs = zip(self._checked(grads), self.state, strict=True)
        return [None if grad is None else self._surprise(grad, state) for grad, state in pairs]

    def _surprise(self, grad: np.ndarray, state: dict[str, Any]) -> float:
        arrays = self._arrays(state)
        return float(surprise(_real(grad.astype(state["mu_g"].dtype)), arrays, self._rule.variance_scales(self.hyper)).mean())

    def _arrays(self, state: dict[str, Any]) -> tuple[np.ndarray, ...]:
        return tuple(_real(state[name]) for name in self._rule.state_names)

    def _posterior(self, state: dict[str, Any]) -> Posterior:
        return posterior(self._arrays(state), self._rule.variance_scales(self.hyper))

    def _step_one(self, param: np.ndarray, grad: np.ndarray, state: dict[str, Any]) -> None:
        state["step"] += 1
        arrays = tuple(state[name] for name in self._rule.state_names)
        update = self._rule.make_update(np)
        coefficients = self._rule.coefficients(state["step"], self.hyper)
        dtype = arrays[0].dtype
        direction, new_arrays = update(_real(grad.astype(dtype)), tuple(map(_real, arrays)), coefficients)
        for array, new in zip(arrays, new_arrays, strict=True):
            _real(array)[...] = new
        decay = 1 - self.lr * self.weight_decay
        _real(param)[...] = core.descend(_real(param.astype(dtype)), direction, self.lr, decay)


def _checked_param(index: int, param: Any) -> np.ndarray:
    if not isinstance(param, np.ndarray) or isinstance(param, np.ma.MaskedArray) or param.dtype.kind not in "fc":
        kind = f"{type(param).__name__} of {param.dtype}" if isinstance(param, np.ndarray) else type(param).__name__
        raise ValueError(f"params[{index}] is {kind}, but must be a NumPy array of floating or complex numbers, unmasked")
    if not param.flags.writeable:
        raise ValueError(f"params[{index}] is read-only, but must be writeable to be updated in place")
    return param.view(np.ndarray)  # a subclass, such as a matrix, may have operators of its own


def _checked_grad(index: int, param: np.ndarray, grad: Any) -> np.ndarray:
    if np.shape(grad) != param.shape:
        raise ValueError(f"grads[{index}] has shape {np.shape(grad)}, but params[{index}] has {param.shape}")
    array = np.asarray(grad)
    if array.dtype.kind not in "biuf" + param.dtype.kind:
        raise ValueError(
            f"grads[{index}] is of {array.dtype}, but must be of numbers that fit params[{index}] of {param.dtype}"
        )
    return array


def _real(array: np.ndarray) -> np.ndarray:
    """A view of the array, with a complex number as two real ones."""
    return array[..., np.newaxis].view(array.real.dtype) if array.dtype.kind == "c" else array


class VSGD(_RuleOptimizer):
    """Variational stochastic gradient descent (Chen et al., TMLR 2025, arXiv 2404.06549) for a list of arrays.

    State of each parameter, in `state`: `step`, `mu_g`, `b_g`, `b_ghat` (arrays of the parameter's shape; float64 for float64
    parameters, else float32).

    Args:
        params: arrays of floating or complex numbers, updated in place.
        lr: the paper's eta, the step size.
        variance_ratio: the paper's K_g, the prior of Var(ghat - g) / Var(g_t - g_{t-1}).
        prior_strength: the paper's gamma, in units of gradient^2: scale it with the square of the loss's scale.
        kappa1: how fast b_g forgets; its learning rate at step t is t ** -kappa1. In (0.5, 1].
        kappa2: the same for b_ghat.
        eps: added to the root of the second moment, in units of the gradient.
        weight_decay: decoupled weight decay, as in AdamW, applied before the step.
        outlier_threshold: cut what differs from the predicted gradient by more than so many of its predicted standard
            deviations, element by element; None: use every gradient as it is. See `vsgd.outliers`.
        prior_shape: the shape of the prior on both precisions, without unit; None: `prior_strength`, as in the paper. With 0.0,
            `prior_strength` and `eps` can follow the loss's scale exactly: see `docs/tuning.md`.

    Raises:
        ValueError: a hyperparameter is out of its range, or a parameter is no writeable array of floating numbers.

    Example:
        >>> weight = np.array([1.0, -2.0])
        >>> optimizer = VSGD([weight], lr=0.05)
        >>> for _ in range(100):
        ...     optimizer.step([2 * weight])  # the gradient of (weight ** 2).sum()
        >>> bool((weight**2).sum() < 1)  # from 5
        True
    """

    _kind = core.VSGD

    def __init__(
        self,
        params: Iterable[np.ndarray],
        lr: float = 0.01,
        variance_ratio: float = 30.0,
        prior_strength: float = 1e-8,
        kappa1: float = 0.81,
        kappa2: float = 0.9,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        outlier_threshold: float | None = None,
        prior_shape: float | None = None,
    ) -> None:
        hyper = core.Hyperparameters(variance_ratio, prior_strength, kappa1, kappa2, eps, prior_shape)
        super().__init__(params, lr, weight_decay, hyper, outlier_threshold)


class ConstantVSGD(_RuleOptimizer):
    """VSGD with one precision for drift and noise (arXiv 2404.06549, the paper's second variant), for a list of arrays.

    State of each parameter, in `state`: `step`, `mu_g`, `b` (arrays of the parameter's shape; float64 for float64 parameters,
    else float32).

    Args:
        params: arrays of floating or complex numbers, updated in place.
        lr: the paper's eta, the step size.
        variance_ratio: the paper's K_g, the fixed ratio Var(ghat - g) / Var(g_t - g_{t-1}).
        prior_strength: the paper's gamma, in units of gradient^2: scale it with the square of the loss's scale.
        kappa: how fast b forgets; its learning rate at step t is t ** -kappa. In (0.5, 1].
        eps: added to the root of the second moment, in units of the gradient.
        weight_decay: decoupled weight decay, as in AdamW, applied before the step.
        outlier_threshold: cut what differs from the predicted gradient by more than so many of its predicted standard
            deviations, element by element; None: use every gradient as it is. See `vsgd.outliers`.
        prior_shape: the shape of the prior on the precision, without unit; None: `prior_strength`, as in the paper. With 0.0,
            `prior_strength` and `eps` can follow the loss's scale exactly: see `docs/tuning.md`.

    Raises:
        ValueError: a hyperparameter is out of its range, or a parameter is no writeable array of floating numbers.

    Example:
        >>> weight = np.array([1.0, -2.0])
        >>> optimizer = ConstantVSGD([weight], lr=0.1)
        >>> optimizer.step([2 * weight])
        >>> sorted(optimizer.state[0])
        ['b', 'mu_g', 'step']
    """

    _kind = core.CONSTANT_VSGD

    def __init__(
        self,
        params: Iterable[np.ndarray],
        lr: float = 0.01,
        variance_ratio: float = 3.0,
        prior_strength: float = 1e-8,
        kappa: float = 0.9,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        outlier_threshold: float | None = None,
        prior_shape: float | None = None,
    ) -> None:
        hyper = core.ConstantHyperparameters(variance_ratio, prior_strength, kappa, eps, prior_shape)
        super().__init__(params, lr, weight_decay, hyper, outlier_threshold)


def prior_strength_from(
    gradients: Iterable[Iterable[np.ndarray | None] | Mapping[Any, np.ndarray | None]], scale: float = 10.0
) -> float:
    """A `prior_strength` in the units of a model's gradients, to be taken before training: see `docs/tuning.md`.

    It is `5e-5 * scale` times the mean of the squares of all elements, over all parameters and mini-batches together. So the
    first steps expect a variance of about `scale` times what a squared gradient is.

    Args:
        gradients: for each of a few mini-batches, 10 are advised, the gradients of the parameters, a list as for `step`, or a
            dict; a generator need not hold those of more than one. None is left out.
        scale: the variance to start with, over the mean squared gradient. Larger starts slower, far smaller is unsafe.

    Returns:
        A number for `VSGD` or `ConstantVSGD`.

    Raises:
        ValueError: `scale` is out of its range; there are no gradients, all are zero, one is not finite or none of numbers; or
            they are so small or large that what would be returned is no prior strength.

    Example:
        >>> weight = np.array([1.0, -2.0])
        >>> gradients = ([2 * (weight - target)] for target in (0.0, 1.0))  # of each mini-batch
        >>> strength = prior_strength_from(gradients)
        >>> round(strength, 6)  # 5e-5 * 10 * (2**2 + 4**2 + 0**2 + 6**2) / 4
        0.007
        >>> optimizer = VSGD([weight], prior_strength=strength)
    """
    return prior.prior_strength_from(gradients, scale, prior.of_list(_leaf), np.sum)


def _leaf(name: str, grad: Any) -> prior.Leaf:
    array = np.asarray(grad)
    if array.dtype.kind not in "biufc":
        raise ValueError(f"{name} is of {array.dtype}, but must be of numbers")
    is_complex = array.dtype.kind == "c"
    sizes = np.abs(array.astype(np.promote_types(array.dtype, np.complex128 if is_complex else np.float64)))
    return prior.Leaf(name, sizes, array.size * (2 if is_complex else 1))
