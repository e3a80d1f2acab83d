"""Checkpoints of other VSGD implementations, in the names and units of ours.

Known are the authors' code (state `mug`, `bg`, `bhg`, and the constants `pa2`, `pbg2`, `pbhg2` and `step` for each
parameter) and `pytorch_optimizer`'s VSGD (the same three arrays; constants and step in the group). Both hold `2 b`.
No framework is imported: a value only needs the operator `/`.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

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
