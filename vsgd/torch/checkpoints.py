"""Checkpoints on their way into a torch optimizer: the state is checked, brought to its place, and keeps its precision.

`Optimizer.load_state_dict` casts all state but `step` to the parameter's dtype, so its tensors are hidden from it.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from vsgd import core
from vsgd.backends.torch.leaves import choose_state_dtype, is_plain


class _Hidden:
    """A tensor that the base class's `load_state_dict` leaves alone."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def hide_tensors(
    state_dict: dict[str, Any], param_groups: Sequence[dict[str, Any]], rule: core.Rule, kind: str
) -> dict[str, Any]:
    """The state as it will be, hidden; or an error.

    Args:
        state_dict: what is to be loaded. It is not changed.
        param_groups: the optimizer's.
        rule: the optimizer's variant.
        kind: the optimizer's name.

    Raises:
        ValueError: the state is of another optimizer, or does not fit the parameters.
    """
    params: dict[Any, tuple[Tensor, str]] = {}
    for number, (saved, group) in enumerate(zip(state_dict["param_groups"], param_groups, strict=False)):
        defaults = rule.hyperparameters._field_defaults
        _check_present(kind, saved, (name for name in defaults if defaults[name] is not None), f"param_groups[{number}]")
        wanted = saved.get("state_dtype", group["state_dtype"])
        params.update((index, (param, wanted)) for index, param in zip(saved["params"], group["params"], strict=False))
    hidden = {
        index: _hide_state(kind, rule.state_names, index, *params[index], state) if state else {}
        for index, state in state_dict["state"].items()
        if index in params
    }
    return {**state_dict, "state": {**state_dict["state"], **hidden}}


def check_form(state_dict: dict[str, Any], param_groups: Sequence[dict[str, Any]]) -> None:
    """Check that this is some optimizer's state, for as many parameters.

    Args:
        state_dict: what is to be loaded.
        param_groups: the optimizer's.

    Raises:
        ValueError: it is none.
    """
    for name, kind in (("state", dict), ("param_groups", list)):
        if not isinstance(state_dict.get(name), kind):
            raise ValueError(f"state_dict has {name} of {_type_of(state_dict, name)}, but it must be a {kind.__name__}")
    saved_groups = state_dict["param_groups"]
    if len(saved_groups) != len(param_groups):
        raise ValueError(f"state_dict has {len(saved_groups)} param_groups, but the optimizer has {len(param_groups)}")
    for number, (saved, group) in enumerate(zip(saved_groups, param_groups, strict=True)):
        _check_group_form(f"param_groups[{number}]", saved, len(group["params"]))
    indices = [index for saved in saved_groups for index in saved["params"]]
    repeated = {index for index in indices if indices.count(index) > 1} if len({*indices}) < len(indices) else set()
    if repeated:
        raise ValueError(f"state_dict's param_groups name parameter {repeated.pop()} twice, but each must stand once")
    for index, state in state_dict["state"].items():
        if isinstance(index, int) and index not in indices:
            raise ValueError(f"state_dict has state of parameter {index}, but its param_groups name no such parameter")
        if not isinstance(state, dict):
            raise ValueError(f"the state of {index} is {type(state).__name__}, but must be a dict")


def _check_group_form(where: str, saved: Any, number: int) -> None:
    if not isinstance(saved, dict):
        raise ValueError(f"{where} is {type(saved).__name__}, but must be a dict")
    if not isinstance(saved.get("params"), list) or not all(isinstance(index, int | str) for index in saved["params"]):
        raise ValueError(f"{where} has params of {_type_of(saved, 'params')}, but must have a list of parameters' indices")
    if len(saved["params"]) != number:
        raise ValueError(f"{where} has {len(saved['params'])} params, but the optimizer's group has {number}")


def _type_of(holder: dict[str, Any], name: str) -> str:
    return type(holder[name]).__name__ if name in holder else "nothing"


def _hide_state(
    kind: str, names: Sequence[str], index: Any, param: Tensor, wanted: str, state: dict[str, Any]
) -> dict[str, Any]:
    _check_present(kind, state, ("step", *names), f"the state of parameter {index}")
    unknown = [str(name) for name in state if name not in ("step", *names)]
    if unknown:
        raise ValueError(f"state_dict is not of a {kind}: the state of parameter {index} has {', '.join(unknown)} too")
    _check_step(index, state["step"])
    for name in names:
        _check_array(f"{name} of parameter {index}", state[name], param)
    return {**state, **{name: _Hidden(_state_like(param, wanted, state[name])) for name in names}}


def _check_step(index: Any, step: Any) -> None:
    if isinstance(step, Tensor):
        holds = step.numel() == 1 and not step.is_complex() and step.dtype is not torch.bool
        # What lies on an accelerator is not read back.
        holds = holds and (step.device.type != "cpu" or 0 <= step.item() < math.inf)
    else:
        holds = isinstance(step, int | float) and not isinstance(step, bool) and 0 <= step <= sys.float_info.max
    if not holds:
        raise ValueError(f"step of parameter {index} is {step!r}, but must be a finite number >= 0")


def _check_array(what: str, value: Any, param: Tensor) -> None:
    shape = getattr(value, "shape", None)
    if shape != param.shape:
        raise ValueError(f"{what} has shape {shape}, but the parameter has {tuple(param.shape)}")
    if not isinstance(value, Tensor) or value.layout is not torch.strided:
        raise ValueError(f"{what} is {type(value).__name__}, but must be a dense tensor")
    if not (value.is_floating_point() or (value.is_complex() and param.is_complex())):
        raise ValueError(f"{what} is of {value.dtype}, but must be of numbers that fit the parameter's {param.dtype}")


def _check_present(kind: str, given: dict[str, Any], names: Iterable[str], where: str) -> None:
    missing = [name for name in names if name not in given]
    if missing:
        raise ValueError(
            f"state_dict is not of a {kind}: {where} has {', '.join(map(str, given))} and lacks {', '.join(missing)}"
        )


def _state_like(param: Tensor, wanted: str, saved: Tensor) -> Tensor:
    """A saved state array where and how the parameter lies, in the precision that its group wants."""
    is_so, must_be = _sharding(saved), _sharding(param)
    if is_so != must_be:
        raise ValueError(
            f"state of a parameter of shape {tuple(param.shape)} is {is_so}, but the parameter is {must_be}: "
            "load it with torch.distributed.checkpoint.state_dict.set_optimizer_state_dict"
        )
    tensor = saved.to(device=param.device, dtype=choose_state_dtype(param, wanted))
    if is_plain(tensor) and tensor.stride() != param.stride():
        return torch.empty_like(param, dtype=tensor.dtype, requires_grad=False).copy_(tensor)
    return tensor


def _sharding(tensor: Any) -> str:
    """How a tensor is shared among processes, in words."""
    placements = getattr(tensor, "placements", None)
    if placements is None:
        return "a plain tensor"
    return f"placed as {tuple(placements)} on {' x '.join(map(str, tensor.device_mesh.shape))} processes"


def show_tensors(optimizer: Optimizer) -> None:
    """Put the tensors that were hidden in their places."""
    for state in optimizer.state.values():
        for name, value in state.items():
            if isinstance(value, _Hidden):
                state[name] = value.tensor


_ARRAYS = {"mug", "bg", "bhg"}
_AUTHORS_NAMES = {"ghattg": "variance_ratio", "ps": "prior_strength", "tau1": "kappa1", "tau2": "kappa2"}
_CONSTANTS = {"pa2", "pbg2", "pbhg2", "step", "weight_decouple"}


def translate(state_dict: dict[str, Any]) -> dict[str, Any]:
    """A torch optimizer's `state_dict` of the authors' VSGD, or of `pytorch_optimizer`'s, as one of `vsgd.torch.VSGD`.

    Any other `state_dict` comes back as it is.

    Args:
        state_dict: with `state` (by parameter) and `param_groups`. It is not changed.

    Returns:
        A new dict where a translation was needed, with `step`, `mu_g`, `b_g` and `b_ghat` for each parameter.

    Raises:
        ValueError: the checkpoint decays weights through the gradient, which VSGD here does not do.

    Example:
        >>> state = {0: {"mug": 0.5, "bg": 2.0, "bhg": 6.0, "step": 3.0}}
        >>> translate({"state": state, "param_groups": [{"lr": 0.1, "params": [0]}]})["state"]
        {0: {'step': 3.0, 'mu_g': 0.5, 'b_g': 1.0, 'b_ghat': 3.0}}
    """
    if not any(_ARRAYS.issubset(state) for state in state_dict["state"].values()):
        return state_dict
    steps = {param: group["step"] for group in state_dict["param_groups"] if "step" in group for param in group["params"]}
    return {
        **state_dict,
        "state": {param: _state(state and {"step": steps.get(param), **state}) for param, state in state_dict["state"].items()},
        "param_groups": [_group(group) for group in state_dict["param_groups"]],
    }


def _state(theirs: dict[str, Any]) -> dict[str, Any]:
    if not theirs:  # a parameter that never had a gradient
        return {}
    return {
        "step": deepcopy(theirs["step"]),  # its own, where the group's served all parameters
        "mu_g": theirs["mug"],
        "b_g": theirs["bg"] / 2,
        "b_ghat": theirs["bhg"] / 2,
    }


def _group(theirs: dict[str, Any]) -> dict[str, Any]:
    if theirs.get("weight_decay") and not theirs.get("weight_decouple", True):
        raise ValueError(
            "the checkpoint has weight_decouple=False, but VSGD decays weights only decoupled from the gradient: "
            "set weight_decay=0 or weight_decouple=True in its param_groups"
        )
    ours = {_AUTHORS_NAMES.get(name, name): value for name, value in theirs.items() if name not in _CONSTANTS}
    if "pbg2" in theirs:
        ours["prior_strength"] = theirs["pbg2"] / 2
        ours["variance_ratio"] = theirs["pbhg2"] / theirs["pbg2"]
    return ours
