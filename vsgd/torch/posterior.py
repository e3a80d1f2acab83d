"""The posterior of a torch optimizer's gradients, from its groups and state."""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vsgd import core
from vsgd.backends.torch.dispatch import hyperparameters
from vsgd.posterior import NoiseScale, NoiseScales, Posterior, noise_scale, posterior, surprise

Groups = Sequence[dict[str, Any]]
States = Mapping[Tensor, dict[str, Tensor]]


def posterior_of(rule: core.Rule, groups: Groups, states: States, param: Tensor) -> Posterior:
    """The posterior of one parameter's gradient.

    Raises:
        ValueError: the parameter is in no group, or has no state yet.
    """
    group = next((group for group in groups if any(param is each for each in group["params"])), None)
    if group is None:
        raise ValueError(f"param of shape {tuple(param.shape)} is no parameter of this optimizer, but must be one")
    if not states.get(param):
        raise ValueError(f"param of shape {tuple(param.shape)} has no state yet, but must have been stepped with a gradient")
    known = _real_posterior(rule, group, states[param])
    # A copy, for the next step overwrites the state.
    known = known._replace(mean=known.mean.clone())
    return Posterior(*map(torch.view_as_complex, known)) if param.is_complex() else known


def noise_scales(rule: core.Rule, groups: Groups, states: States, batch_size: float) -> NoiseScales:
    """The noise scales of all parameters that have state.

    Raises:
        ValueError: `batch_size` is out of its range, or no parameter has state.
    """
    core.validate(batch_size=batch_size)
    tensors = {
        param: noise_scale(_real_posterior(rule, group, state), batch_size, sum_of_shards)
        for group, param, state in _stepped(groups, states)
    }
    if not tensors:
        raise ValueError("the optimizer has no state yet, but must have taken a step with a gradient")
    device = next(iter(tensors.values())).trace.device
    overall = functools.reduce(operator.add, (NoiseScale(*(part.to(device) for part in each)) for each in tensors.values()))
    return NoiseScales(overall, tensors)


def surprises(rule: core.Rule, groups: Groups, states: States) -> dict[Tensor, Tensor]:
    """The mean surprise of each parameter that has state and a gradient."""
    return {
        param: sum_of_shards(surprise(_gradient(group, param), _real_state(rule, state), scales_of(rule, group)))
        / _count(param)
        for group, param, state in _stepped(groups, states)
        if param.grad is not None
    }


def _stepped(groups: Groups, states: States) -> Iterator[tuple[dict[str, Any], Tensor, dict[str, Tensor]]]:
    return ((group, param, states[param]) for group in groups for param in group["params"] if states.get(param))


def _real_posterior(rule: core.Rule, group: dict[str, Any], state: dict[str, Tensor]) -> Posterior:
    return posterior(_real_state(rule, state), scales_of(rule, group))


def scales_of(rule: core.Rule, group: dict[str, Any]) -> tuple[Any, Any]:
    """`rule.variance_scales` of a group's hyperparameters."""
    return rule.variance_scales(hyperparameters(rule, group))


def _real_state(rule: core.Rule, state: dict[str, Tensor]) -> tuple[Tensor, ...]:
    return tuple(_real(state[name]) for name in rule.state_names)


def _real(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    real = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    return real.to(torch.promote_types(real.dtype, torch.float32))


def _gradient(group: dict[str, Any], param: Tensor) -> Tensor:
    grad = param.grad
    assert grad is not None
    return _real(-grad if group["maximize"] else grad)


def _count(param: Tensor) -> int:
    return param.numel() * (2 if param.is_complex() else 1)


def sum_of_shards(values: Tensor) -> Tensor:
    """The sum of a tensor's elements, over all shards where there are shards; 0-d, on every process."""
    total: Any = values.sum()
    return total.full_tensor() if hasattr(total, "full_tensor") else total
