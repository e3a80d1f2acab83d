"""Translate and check checkpoints before a torch optimizer loads them, and keep the precision of their state.

`Optimizer.load_state_dict` casts all state but `step` to the parameter's dtype. So `hide_tensors` hides the tensors before, and
`show_tensors` restores them after the base class has run.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from vsgd import core
from vsgd.backends.torch.leaves import choose_state_dtype, is_plain

# The authors' code stores `mug`, `bg`, `bhg` and constants for each parameter; `pytorch_optimizer` stores the same arrays, with
# constants and step in the group. Both store 2b.
_FOREIGN_ARRAYS = {"mug", "bg", "bhg"}
_FOREIGN_NAMES = {"ghattg": "variance_ratio", "ps": "prior_strength", "tau1": "kappa1", "tau2": "kappa2"}
_FOREIGN_CONSTANTS = {"pa2", "pbg2", "pbhg2", "step", "weight_decouple"}

# Other optimizers, by a name in their groups or state.
_OWNERS = {"betas": "Adam or a relative", "exp_avg": "Adam or a relative", "nesterov": "SGD", "momentum_buffer": "SGD"}


def check_form(state_dict: dict[str, Any], param_groups: Sequence[dict[str, Any]]) -> None:
    """Check that a dict has the form of an optimizer's state, for equally many parameters.

    Args:
        state_dict: the state to load.
        param_groups: the optimizer's groups.

    Raises:
        ValueError: it has another form.
    """
    for name, form in (("state", dict), ("param_groups", list)):
        if not isinstance(state_dict.get(name), form):
            raise ValueError(f"state_dict has {name} of {_name_type(state_dict, name)}, but it must be a {form.__name__}")
    saved_groups = state_dict["param_groups"]
    if len(saved_groups) != len(param_groups):
        raise ValueError(f"state_dict has {len(saved_groups)} param_groups, but the optimizer has {len(param_groups)}")
    for number, (saved, group) in enumerate(zip(saved_groups, param_groups, strict=True)):
        name, count = f"param_groups[{number}]", len(group["params"])
        if not isinstance(saved, dict):
            raise ValueError(f"{name} is {type(saved).__name__}, but must be a dict")
        if not isinstance(saved.get("params"), list) or not all(isinstance(index, int | str) for index in saved["params"]):
            raise ValueError(f"{name} has params of {_name_type(saved, 'params')}, but must have a list of parameters' indices")
        if len(saved["params"]) != count:
            raise ValueError(f"{name} has {len(saved['params'])} params, but the optimizer's group has {count}")
    indices = [index for saved in saved_groups for index in saved["params"]]
    repeated = {index for index in indices if indices.count(index) > 1} if len({*indices}) < len(indices) else set()
    if repeated:
        raise ValueError(f"state_dict's param_groups name parameter {repeated.pop()} twice, but each must occur once")
    for index, state in state_dict["state"].items():
        if isinstance(index, int) and index not in indices:
            raise ValueError(f"state_dict has state of parameter {index}, but its param_groups name no such parameter")
        if not isinstance(state, dict):
            raise ValueError(f"the state of {index} is {type(state).__name__}, but must be a dict")


def _name_type(holder: dict[str, Any], name: str) -> str:
    return type(holder[name]).__name__ if name in holder else "nothing"


def translate_checkpoint(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Return the `state_dict` of the authors' VSGD or of `pytorch_optimizer`'s in the names and units of `vsgd.torch.VSGD`.

    Any other `state_dict` is returned as it is.

    Args:
        state_dict: a dict with `state` (by parameter) and `param_groups`. It is not changed.

    Returns:
        A new dict if it was translated, with `step`, `mu_g`, `b_g` and `b_ghat` for each parameter.

    Raises:
        ValueError: the checkpoint decays weights through the gradient, which this VSGD does not do.

    Example:
        >>> state = {0: {"mug": 0.5, "bg": 2.0, "bhg": 6.0, "step": 3.0}}
        >>> translate_checkpoint({"state": state, "param_groups": [{"lr": 0.1, "params": [0]}]})["state"]
        {0: {'step': 3.0, 'mu_g': 0.5, 'b_g': 1.0, 'b_ghat': 3.0}}
    """
    if not any(_FOREIGN_ARRAYS.issubset(state) for state in state_dict["state"].values()):
        return state_dict
    groups, steps = [], {}
    for group in state_dict["param_groups"]:
        if group.get("weight_decay") and not group.get("weight_decouple", True):
            raise ValueError(
                "the checkpoint has weight_decouple=False, but VSGD decays weights only decoupled from the gradient: "
                "set weight_decay=0 or weight_decouple=True in its param_groups"
            )
        groups.append({_FOREIGN_NAMES.get(name, name): each for name, each in group.items() if name not in _FOREIGN_CONSTANTS})
        if "pbg2" in group:
            groups[-1]["prior_strength"] = group["pbg2"] / 2
            groups[-1]["variance_ratio"] = group["pbhg2"] / group["pbg2"]
        if "step" in group:
            steps.update(dict.fromkeys(group["params"], group["step"]))
    states = {}
    for param, state in state_dict["state"].items():
        states[param] = state and {  # empty for a parameter that never had a gradient
            "step": deepcopy(state.get("step", steps.get(param))),  # a copy: the group's count serves all parameters
            "mu_g": state["mug"],
            "b_g": state["bg"] / 2,
            "b_ghat": state["bhg"] / 2,
        }
    return {**state_dict, "state": states, "param_groups": groups}


class _Hidden:
    """A tensor that the base class's `load_state_dict` does not see."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def hide_tensors(
    state_dict: dict[str, Any], param_groups: Sequence[dict[str, Any]], rule: core.Rule, class_name: str
) -> dict[str, Any]:
    """Return the state in its final form, with hidden tensors.

    Args:
        state_dict: the state to load. It is not changed.
        param_groups: the optimizer's groups.
        rule: the optimizer's variant.
        class_name: the name of the optimizer's class.

    Raises:
        ValueError: the state belongs to another optimizer, or does not fit the parameters.
    """
    params: dict[Any, tuple[Tensor, str]] = {}
    for number, (saved, group) in enumerate(zip(state_dict["param_groups"], param_groups, strict=False)):
        # Newer hyperparameters are None or 0 by default; older checkpoints lack them.
        required = (name for name, default in rule.hyperparameters._field_defaults.items() if default)
        _check_present(class_name, saved, required, f"param_groups[{number}]")
        dtype = saved.get("state_dtype", group["state_dtype"])
        params.update((index, (param, dtype)) for index, param in zip(saved["params"], group["params"], strict=False))
    hidden = {
        index: _hide_state(class_name, rule.state_names, index, *params[index], state) if state else {}
        for index, state in state_dict["state"].items()
        if index in params
    }
    return {**state_dict, "state": {**state_dict["state"], **hidden}}


def show_tensors(optimizer: Optimizer) -> None:
    """Restore the tensors that `hide_tensors` has hidden."""
    for state in optimizer.state.values():
        for name, value in state.items():
            if isinstance(value, _Hidden):
                state[name] = value.tensor


def _hide_state(
    class_name: str, names: Sequence[str], index: Any, param: Tensor, state_dtype: str, state: dict[str, Any]
) -> dict[str, Any]:
    _check_present(class_name, state, ("step", *names), f"the state of parameter {index}")
    foreign = [name for name in state if name in _OWNERS]  # a wrapper may keep something else there
    if foreign:
        raise ValueError(f"state_dict is not of a {class_name}: the state of parameter {index} has {', '.join(foreign)} too")
    _check_step(index, state["step"])
    for name in names:
        _check_array(f"{name} of parameter {index}", state[name], param)
    return {**state, **{name: _Hidden(_convert(param, state_dtype, state[name])) for name in names}}


def _check_present(class_name: str, given: dict[str, Any], names: Iterable[str], where: str) -> None:
    missing = [name for name in names if name not in given]
    if missing:
        owner = next((f"of {owner} and " for name, owner in _OWNERS.items() if name in given), "")
        present = ", ".join(map(str, given))
        raise ValueError(f"state_dict is {owner}not of a {class_name}: {where} has {present} and lacks {', '.join(missing)}")


def _check_step(index: Any, step: Any) -> None:
    if isinstance(step, Tensor):
        valid = step.layout is torch.strided and not step.is_meta and step.numel() == 1
        valid = valid and not step.is_complex() and step.dtype is not torch.bool
        # A count on an accelerator is not read back.
        valid = valid and (step.device.type != "cpu" or 0 <= step.item() < math.inf)
    else:
        is_number = isinstance(step, int | float | np.integer | np.floating) and not isinstance(step, bool)
        valid = is_number and bool(0 <= step <= sys.float_info.max)
    if not valid:
        raise ValueError(f"step of parameter {index} is {step!r}, but must be a finite number >= 0")


def _check_array(name: str, value: Any, param: Tensor) -> None:
    shape = getattr(value, "shape", None)
    if shape != param.shape:
        raise ValueError(f"{name} has shape {shape}, but the parameter has {tuple(param.shape)}")
    if not isinstance(value, Tensor) or value.layout is not torch.strided:
        raise ValueError(f"{name} is {type(value).__name__}, but must be a dense tensor")
    if not (value.is_floating_point() or (value.is_complex() and param.is_complex())):
        raise ValueError(f"{name} is of {value.dtype}, but must be of numbers that fit the parameter's {param.dtype}")


def _convert(param: Tensor, state_dtype: str, saved: Tensor) -> Tensor:
    """Return a saved state array on the device and in the layout of its parameter, in the precision of its group."""
    saved_sharding, sharding = _describe_sharding(saved), _describe_sharding(param)
    if saved_sharding != sharding:
        raise ValueError(
            f"state of a parameter of shape {tuple(param.shape)} is {saved_sharding}, but the parameter is {sharding}: "
            "load it with torch.distributed.checkpoint.state_dict.set_optimizer_state_dict"
        )
    tensor = saved.to(device=param.device, dtype=choose_state_dtype(param, state_dtype))
    if is_plain(tensor) and tensor.stride() != param.stride():
        return torch.empty_like(param, dtype=tensor.dtype, requires_grad=False).copy_(tensor)
    return tensor


def _describe_sharding(tensor: Any) -> str:
    placements = getattr(tensor, "placements", None)
    if placements is None:
        return "a plain tensor"
    return f"placed as {tuple(placements)} on {' x '.join(map(str, tensor.device_mesh.shape))} processes"
