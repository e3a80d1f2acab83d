"""The posterior of a Keras optimizer's gradients, from the state of its variables."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import keras
from keras import ops

from vsgd import core
from vsgd.backends.keras import choose_arithmetic_dtype, join_complex, split_complex
from vsgd.keras.checkpoints import check_shapes, get_name
from vsgd.posterior import (
    NoiseScale,
    NoiseScales,
    Posterior,
    Scales,
    compute_posterior,
    compute_surprise,
    estimate_noise_scale,
)
from vsgd.validation import validate_numbers


class PosteriorMixin:
    """Methods that report an optimizer's gradient estimates."""

    built: bool
    _rule: core.Rule
    _states: list[Any]
    _gradient_unit: Any
    _trainable_variables: list[Any]
    _trainable_variables_indices: Any
    _select_hyperparameters: Callable[[], Any]
    _var_key: Callable[[Any], Any]
    _get_variable_index: Callable[[Any], int]

    def posterior(self, variable: Any) -> Posterior:
        """Return the posterior of a variable's gradient: the uncertainty of the gradient, not of the weights.

        Args:
            variable: a variable that the optimizer was built with.

        Returns:
            Copies of the variable's shape, tensors of the backend, float64 for float64 variables, else float32.

        Raises:
            ValueError: the optimizer was not built with the variable, or the variable's gradient is its new value.
        """
        state = self._get_state(variable)
        if state is None:
            name = get_name(variable)
            raise ValueError(f"variable is {name}, which its gradient overwrites, but must be one that is stepped")
        parts = [compute_posterior(part, self._compute_scales(part)) for part in get_real_states(state)]
        posterior = Posterior(*map(join_complex, zip(*parts, strict=True)))
        # A copy: the torch engines overwrite the state.
        return posterior._replace(mean=ops.copy(posterior.mean))

    def noise_scale(self, *, batch_size: float) -> NoiseScales:
        """Estimate the gradient noise scale (arXiv 1812.06162) where the weights are held still, at a learning rate of 0.

        While weights move, the estimate is wrong: see `vsgd.posterior.estimate_noise_scale`. To measure the noise scale of a
        training, see `vsgd.monitor.noise_scale`.

        Args:
            batch_size: the number of examples that a gradient averages, over all devices and accumulated steps.

        Returns:
            The estimate overall and, in `tensors`, a list in the order of the variables that the optimizer was built with; None
            for a variable whose gradient is its new value.

        Raises:
            ValueError: `batch_size` is out of its range, or the optimizer is not built, or has no variable with a gradient.
        """
        validate_numbers(batch_size=batch_size)
        if not self.built:
            raise ValueError("the optimizer has no variables yet, but must be built: call `build` or train")
        if not any(self._states):
            raise ValueError("the optimizer has no variable that is stepped, but must have one")

        def estimate(state: Sequence[Any]) -> NoiseScale:
            posteriors = (compute_posterior(part, self._compute_scales(part)) for part in get_real_states(state))
            return functools.reduce(operator.add, (estimate_noise_scale(each, batch_size, ops.sum) for each in posteriors))

        tensors = [None if state is None else estimate(state) for state in self._states]
        return NoiseScales(functools.reduce(operator.add, filter(None, tensors)), tensors)

    def surprise(self, grads: Sequence[Any], trainable_variables: Sequence[Any] | None = None) -> list[Any]:
        """Return how unexpected gradients are before a step takes them, averaged over each variable: see `vsgd.posterior`.

        Args:
            grads: gradients as for `apply`; a gradient may be None.
            trainable_variables: their variables; None: those that the optimizer was built with.

        Returns:
            For each gradient the mean of its squared standardized innovations, near 1 where the model fits; None where the
            gradient is None or the variable's new value.

        Raises:
            ValueError: the optimizer was not built with a variable, or the gradients do not fit the variables.
        """
        variables = self._trainable_variables if trainable_variables is None else trainable_variables
        if len(grads) != len(variables):
            raise ValueError(f"grads has {len(grads)} items, but there are {len(variables)} variables")
        check_shapes(grads, variables)
        states = [None if grad is None else self._get_state(each) for grad, each in zip(grads, variables, strict=True)]

        def average(grad: Any, state: Sequence[Any]) -> Any:
            real_states = get_real_states(state)
            dtype = keras.backend.standardize_dtype(real_states[0][0].dtype)
            real_grads = (ops.cast(part, dtype) for part in split_complex(ops.convert_to_tensor(grad)))
            means = [
                ops.mean(compute_surprise(part, real_state, self._compute_scales(real_state)))
                for part, real_state in zip(real_grads, real_states, strict=True)
            ]
            return sum(means) / len(means)

        return [None if state is None else average(grad, state) for grad, state in zip(grads, states, strict=True)]

    def _get_state(self, variable: Any) -> Any:
        if not self.built or self._var_key(variable) not in self._trainable_variables_indices:
            raise ValueError(f"variable is {get_name(variable)}, but must be one that the optimizer was built with")
        return self._states[self._get_variable_index(variable)]

    def _compute_scales(self, state: tuple[Any, ...]) -> Scales:
        unit: Any = 1.0
        if self._gradient_unit is not None:
            unit = ops.cast(ops.stop_gradient(ops.convert_to_tensor(self._gradient_unit)), state[0].dtype)
            unit = ops.where(unit > 0, unit, ops.ones_like(unit))
        return Scales(*self._rule.variance_scales(self._select_hyperparameters()), unit)


def get_real_states(state: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Return the state of each real part of a variable, in the dtype of the arithmetic."""
    tensors = [ops.stop_gradient(ops.convert_to_tensor(each)) for each in state]
    wide = (ops.cast(each, choose_arithmetic_dtype(keras.backend.standardize_dtype(each.dtype))) for each in tensors)
    return list(zip(*map(split_complex, wide), strict=True))
