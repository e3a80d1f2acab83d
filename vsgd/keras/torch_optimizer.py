"""The Keras optimizer on PyTorch: it steps all variables together by the torch engines."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
from keras import ops

from vsgd.backends.torch.dispatch import step_leaves
from vsgd.backends.torch.leaves import Leaf, StepOptions, make_leaf
from vsgd.keras.optimizer import RuleOptimizer


class TorchRuleOptimizer(RuleOptimizer):
    """A `RuleOptimizer` that runs the torch engines, unless PyTorch compiles the step."""

    def _backend_update_step(self, grads: Sequence[Any], trainable_variables: Sequence[Any], learning_rate: Any) -> None:
        if torch.compiler.is_compiling():
            super()._backend_update_step(grads, trainable_variables, learning_rate)
            return
        calibration = (1, 0) if self._gradient_unit is None else (self._gradient_unit, self._skipped_steps)
        count, lr, unit, skipped = _read_numbers(self.iterations, learning_rate, *calibration)
        count += 1 - skipped
        if unit == 0:
            unit = float(self._calibrate(grads, trainable_variables))
            if unit == 0:
                return
        leaves_by_decay: dict[float, list[Leaf]] = {}
        with torch.no_grad():
            for variable, grad in zip(trainable_variables, grads, strict=True):
                leaves_by_decay.setdefault(self._get_update_decay(variable), []).append(self._make_leaf(variable, grad))
            hyper = self._select_hyperparameters()
            for decay, leaves in leaves_by_decay.items():
                step_leaves(leaves, count, StepOptions(self._rule, hyper, lr, decay, grad_scale=1 / unit))

    def _make_leaf(self, variable: Any, grad: Any) -> Leaf:
        index = self._get_variable_index(variable)
        states = self._states[index]
        param = variable.value
        state = tuple(each.value for each in states)
        if grad.dtype is not param.dtype:
            # The fused kernel rejects gradients of another dtype, and another engine rounds differently.
            grad = grad.to(torch.promote_types(state[0].dtype, torch.float32))
        return make_leaf(param, grad, state, self._keys[index], self.stochastic_rounding)

    def stateless_apply(
        self, optimizer_variables: Sequence[Any], grads: Sequence[Any], trainable_variables: Sequence[Any]
    ) -> tuple[list[Any], list[Any]]:
        """Return new values as `apply` computes them, and assign nothing.

        Args:
            optimizer_variables: values of the optimizer's variables.
            grads: a gradient for each of the variables that the optimizer was built with.
            trainable_variables: values of these variables.

        Returns:
            The new values of the variables, and those of the optimizer's variables.

        Raises:
            ValueError: the optimizer is not built, or a list has another length.
        """
        # Clones, because the engines write in place.
        optimizer_variables = [value.clone() for value in optimizer_variables]
        trainable_variables = [value.clone() for value in trainable_variables]
        new: tuple[list[Any], list[Any]] = super().stateless_apply(optimizer_variables, grads, trainable_variables)
        return new


def _read_numbers(*values: Any) -> list[float]:
    """Return the values of numbers, variables and tensors, those on a GPU after one wait for it."""
    tensors = [None if isinstance(value, Real) else ops.convert_to_tensor(value) for value in values]
    on_gpu = [tensor for tensor in tensors if tensor is not None and tensor.is_cuda]
    read = iter(torch.stack([tensor.double() for tensor in on_gpu]).tolist() if on_gpu else ())
    return [
        float(value) if tensor is None else next(read) if tensor.is_cuda else float(tensor.item())
        for value, tensor in zip(values, tensors, strict=True)
    ]
