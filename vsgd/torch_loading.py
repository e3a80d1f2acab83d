"""Checkpoints on their way into a torch optimizer: the state is checked, brought to its place, and keeps its precision.

`Optimizer.load_state_dict` casts all state but `step` to the parameter's dtype, so its tensors are hidden from it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from vsgd import core
from vsgd.backends.torch_blocks import is_plain, state_dtype


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
        _check_present(kind, saved, rule.hyperparameters._fields, f"param_groups[{number}]")
        wanted = saved.get("state_dtype", group["state_dtype"])
        params.update((index, (param, wanted)) for index, param in zip(saved["params"], group["params"], strict=False))
    hidden = {
        index: _hide_state(kind, rule.state_names, index, *params[index], state) if state else {}
        for index, state in state_dict["state"].items()
        if index in params
    }
    return {**state_dict, "state": {**state_dict["state"], **hidden}}


def _hide_state(
    kind: str, names: Sequence[str], index: Any, param: Tensor, wanted: str, state: dict[str, Any]
) -> dict[str, Any]:
    _check_present(kind, state, ("step", *names), f"the state of parameter {index}")
    for name in names:
        shape = getattr(state[name], "shape", None)
        if shape != param.shape:
            raise ValueError(f"{name} of parameter {index} has shape {shape}, but the parameter has {tuple(param.shape)}")
    return {**state, **{name: _Hidden(_state_like(param, wanted, state[name])) for name in names}}


def _check_present(kind: str, given: dict[str, Any], names: Iterable[str], where: str) -> None:
    missing = [name for name in names if name not in given]
    if missing:
        raise ValueError(
            f"state_dict is not of a {kind}: {where} has {', '.join(map(str, given))} and lacks {', '.join(missing)}"
        )


def _state_like(param: Tensor, wanted: str, saved: Tensor) -> Tensor:
    """A saved state array where and how the parameter lies, in the precision that its group wants."""
    tensor = saved.to(device=param.device, dtype=state_dtype(param, wanted))
    if is_plain(tensor) and tensor.stride() != param.stride():
        return torch.empty_like(param, dtype=tensor.dtype, requires_grad=False).copy_(tensor)
    return tensor


def show_tensors(optimizer: Optimizer) -> None:
    """Put the tensors that were hidden in their places."""
    for state in optimizer.state.values():
        for name, value in state.items():
            if isinstance(value, _Hidden):
                state[name] = value.tensor
