"""The posterior of a torch optimizer's gradients, from its groups and state."""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterator
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from vsgd import core
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
from vsgd.validation import validate_numbers


class Stepped(NamedTuple):
    """A parameter that has been stepped.

    Attributes:
        name: its name if the optimizer was given named parameters with unique names, else its index as in `state_dict()`.
        param: the parameter.
        group: the options of its group.
        group_index: the index of its group.
    """

    name: str | int
    param: Tensor
    group: dict[str, Any]
    group_index: int


class PosteriorMixin:
    """Methods that report an optimizer's gradient estimates."""

    _plain_rule: ClassVar[core.Rule]
    param_groups: list[dict[str, Any]]
    state: Any

    def posterior(self, param: Tensor) -> Posterior:
        """Return the posterior of a parameter's gradient: the uncertainty of the gradient, not of the weights.

        Args:
            param: a parameter of this optimizer that has been stepped.

        Returns:
            Copies of the parameter's shape, on its device, float64 for float64 parameters, else float32.

        Raises:
            ValueError: the parameter is not the optimizer's, or has no state yet.
        """
        group = next((group for group in self.param_groups if any(param is each for each in group["params"])), None)
        if group is None:
            raise ValueError(f"param of shape {tuple(param.shape)} is no parameter of this optimizer, but must be one")
        if not self.state.get(param):
            raise ValueError(
                f"param of shape {tuple(param.shape)} has no state yet, but must have been stepped with a gradient"
            )
        posterior = compute_posterior(self._get_real_state(param), self._compute_scales(group))
        # A copy, because the next step overwrites the state.
        posterior = posterior._replace(mean=posterior.mean.clone())
        return Posterior(*map(torch.view_as_complex, posterior)) if param.is_complex() else posterior

    def noise_scale(self, *, batch_size: float) -> NoiseScales:
        """Estimate the gradient noise scale (arXiv 1812.06162) where the weights are held still, at a learning rate of 0.

        While weights move, the estimate is wrong: see `vsgd.posterior.estimate_noise_scale`. To measure the noise scale of a
        training, see `vsgd.torch.noise_scale`. No value is read back from a device, but sharded tensors are summed over all
        processes: every process must call this method.

        Args:
            batch_size: the number of examples that a gradient averages, over all processes and accumulated steps.

        Returns:
            0-d tensors: the estimate overall and, in `tensors`, a dict by the parameter's name if the optimizer was given named
            parameters with unique names, else by its index as in `state_dict()`.

        Raises:
            ValueError: `batch_size` is out of its range, or no parameter has been stepped.
        """
        validate_numbers(batch_size=batch_size)
        tensors: dict[str | int, NoiseScale] = {}
        for stepped in self._iterate_stepped():
            posterior = compute_posterior(self._get_real_state(stepped.param), self._compute_scales(stepped.group))
            tensors[stepped.name] = estimate_noise_scale(posterior, batch_size, sum_shards)
        if not tensors:
            raise ValueError("the optimizer has no state yet, but must have taken a step with a gradient")
        device = next(iter(tensors.values())).trace.device
        on_device = (NoiseScale(scale.trace.to(device), scale.squared_norm.to(device)) for scale in tensors.values())
        return NoiseScales(functools.reduce(operator.add, on_device), tensors)

    def surprise(self) -> dict[str | int, Tensor]:
        """Return how unexpected the gradients of the next step are, averaged over each parameter: see `vsgd.posterior`.

        Returns:
            For each parameter with a gradient and state the mean of its squared standardized innovations, a 0-d tensor, near 1
            where the model fits and large at a spike of the loss. Keys are as in `noise_scale`.
        """
        surprises: dict[str | int, Tensor] = {}
        for name, param, group, _ in self._iterate_stepped():
            if param.grad is not None:
                grad = view_as_real(-param.grad if group["maximize"] else param.grad)
                squares = compute_surprise(grad, self._get_real_state(param), self._compute_scales(group))
                surprises[name] = sum_shards(squares) / (param.numel() * (2 if param.is_complex() else 1))
        return surprises

    def _iterate_stepped(self) -> Iterator[Stepped]:
        names = [name for group in self.param_groups for name in group.get("param_names", ())]
        params = [(param, group, number) for number, group in enumerate(self.param_groups) for param in group["params"]]
        # Torch requires no unique names, and a user may append to a group's parameters.
        has_names = len(names) == len(params) == len({*names})
        for index, (param, group, number) in enumerate(params):
            if self.state.get(param):
                yield Stepped(names[index] if has_names else index, param, group, number)

    def _compute_scales(self, group: dict[str, Any]) -> Scales:
        rule = choose_rule(self._plain_rule, group["outlier_threshold"])
        return Scales(*rule.variance_scales(rule.select_hyperparameters(group)), get_unit(group))

    def _get_real_state(self, param: Tensor) -> tuple[Tensor, ...]:
        return tuple(view_as_real(self.state[param][name]) for name in self._plain_rule.state_names)


def get_unit(group: dict[str, Any]) -> float:
    """Return the unit of a group's state, in units of the gradient."""
    return 1.0 if group["gradient_unit"] is None else float(group["gradient_unit"])


def view_as_real(tensor: Tensor) -> Tensor:
    """Return a tensor in float32 or float64, with a complex number as two real ones."""
    tensor = tensor.detach()
    real = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    return real.to(torch.promote_types(real.dtype, torch.float32))


def sum_shards(values: Tensor) -> Tensor:
    """Return the sum of a tensor's elements over all of its shards, 0-d, on every process."""
    total: Any = values.sum()
    return total.full_tensor() if hasattr(total, "full_tensor") else total
