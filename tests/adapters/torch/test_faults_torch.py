"""Test that damaged checkpoints of the torch adapter raise a clear error and change no bit of the optimizer."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from functools import reduce
from operator import getitem
from typing import Any

import pytest
import torch
from adapters.torch.torch_optimizers import assert_same_state, problem, train
from hypothesis import given, settings
from hypothesis import strategies as st

from vsgd.torch import VSGD, ConstantVSGD

StateDict = dict[str, Any]


def trained(cls: Any = VSGD) -> tuple[Any, list[Any]]:
    """Return an optimizer with two groups of one parameter each, after some steps."""
    params, _ = problem()
    optimizer = cls([{"params": [params[0]]}, {"params": [params[1]]}])
    train(optimizer, params, range(3))
    return optimizer, params


def change(*path: Any, to: Any) -> Callable[[StateDict], StateDict]:
    """Return a function that replaces a state dict's value at this path."""

    def apply(good: StateDict) -> StateDict:
        reduce(getitem, path[:-1], good)[path[-1]] = to
        return good

    return apply


def drop(*path: Any) -> Callable[[StateDict], StateDict]:
    """Return a function that removes a state dict's value at this path."""

    def apply(good: StateDict) -> StateDict:
        del reduce(getitem, path[:-1], good)[path[-1]]
        return good

    return apply


def saved_by(cls: Any) -> Callable[[StateDict], StateDict]:
    return lambda _: trained(cls)[0].state_dict()


STATE, GROUP = ("state", 1), ("param_groups", 1)
FAULTS: dict[str, tuple[Callable[[StateDict], Any], str]] = {
    "no dict": (lambda _: 3, "state_dict is int, but must be a dict with state and param_groups"),
    "no state": (drop("state"), "state_dict has state of nothing, but it must be a dict"),
    "no groups": (drop("param_groups"), "has param_groups of nothing, but it must be a list"),
    "AdamW": (saved_by(torch.optim.AdamW), r"not of a VSGD: param_groups\[0\] has .* and lacks variance_ratio"),
    "the other variant": (saved_by(ConstantVSGD), r"not of a VSGD: param_groups\[0\] has .* and lacks kappa1, kappa2"),
    "AdamW's state": (
        lambda good: {**good, "state": saved_by(torch.optim.AdamW)(good)["state"]},
        "the state of parameter 0 has step, exp_avg, exp_avg_sq and lacks mu_g, b_g, b_ghat",
    ),
    "a group less": (drop(*GROUP), "has 1 param_groups, but the optimizer has 2"),
    "a parameter more": (
        change(*GROUP, "params", to=[1, 2]),
        r"param_groups\[1\] has 2 params, but the optimizer's group has 1",
    ),
    "a parameter twice": (change(*GROUP, "params", to=[0]), "param_groups name parameter 0 twice"),
    "no parameters": (change(*GROUP, "params", to=None), r"param_groups\[1\] has params of NoneType, but must have a list"),
    "a group that is none": (change(*GROUP, to=5), r"param_groups\[1\] is int"),
    "groups swapped": (
        lambda good: {**good, "param_groups": good["param_groups"][::-1]},
        r"mu_g of parameter 0 has shape .*, but",
    ),
    "state of a stranger": (change("state", 7, to={}), "state of parameter 7, but its param_groups"),
    "state that is none": (change(*STATE, to=3), "the state of 1 is int, but must be a dict"),
    "a name more": (change(*STATE, "exp_avg", to=torch.ones(5)), "the state of parameter 1 has exp_avg too"),
    "a name less": (drop(*STATE, "b_g"), "the state of parameter 1 has .* and lacks b_g"),
    "another optimizer": (saved_by(torch.optim.SGD), "state_dict is of SGD and not of a VSGD"),
    **{
        f"a step of {step}": (
            change(*STATE, "step", to=step),
            "(?s)step of parameter 1 is .*, but must be a finite number >= 0",
        )
        for step in (
            *("three", True, -1, *map(torch.tensor, (True, -1.0, float("nan"), [1.0, 1.0]))),
            *(torch.ones((), device="meta"), torch.ones(1).to_sparse()),
        )
    },
    "integers": (change(*STATE, "b_g", to=torch.ones(5).int()), "b_g of parameter 1 is of torch.int32, but must be of numbers"),
    "complex": (change(*STATE, "b_g", to=torch.ones(5) * 1j), "b_g of parameter 1 is of torch.complex64, but must be"),
    "a shape": (change(*STATE, "b_g", to=torch.ones(3)), r"b_g of parameter 1 has shape torch.Size\(\[3\]\), but .* \(5,\)"),
    "no tensor": (change(*STATE, "b_g", to=0.5), r"b_g of parameter 1 has shape None, but the parameter has \(5,\)"),
    "sparse": (change(*STATE, "b_g", to=torch.ones(5).to_sparse()), "b_g of parameter 1 is Tensor, but must be a dense tensor"),
    "a hyperparameter": (
        change(*GROUP, "kappa1", to=3.0),
        r"Invalid kappa1 value: 3.0 \(kappa1 must be a number in \(0.5, 1\]\)",
    ),
    "a flag": (change(*GROUP, "maximize", to="no"), r"Invalid maximize value: 'no' \(maximize must be True, False or None\)"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_checkpoint_changes_nothing(fault: str) -> None:
    (optimizer, params), (untouched, its_params) = trained(), trained()
    make, message = FAULTS[fault]
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(make(copy.deepcopy(optimizer.state_dict())))
    assert optimizer.state_dict()["param_groups"] == untouched.state_dict()["param_groups"]
    for each, of in ((optimizer, params), (untouched, its_params)):
        train(each, of, range(3, 5))
    assert_same_state(optimizer, untouched)
    torch.testing.assert_close(params, its_params, rtol=0, atol=0)


# --- Any value at any place. ---

JUNK = st.sampled_from(
    [None, True, -1, 0, 2, 0.5, float("nan"), 10**400, "text", b"bytes", [], [1, 2], {}, {"a": 1}, *map(torch.ones, (0, 1, 5))]
).map(copy.deepcopy)


def places(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the paths of all values in nested dicts and lists."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [each for key, value in items for each in ((*path, key), *places(value, (*path, key)))]


@st.composite
def mutated(draw: st.DrawFn, good: StateDict) -> StateDict:
    bad = copy.deepcopy(good)
    for _ in range(draw(st.integers(1, 3))):
        if not bad:
            break
        path = draw(st.sampled_from(places(bad)))
        how = draw(st.sampled_from(["drop", "replace", "add", "rename"]))
        if how != "add":
            moved = reduce(getitem, path, bad)
            bad = change(*path, to=draw(JUNK))(bad) if how == "replace" else drop(*path)(bad)
        holder = reduce(getitem, path[:-1], bad)
        if how in ("add", "rename") and isinstance(holder, dict):
            name = draw(st.sampled_from(["b", "mug", "params", "lr", 0, 9, "step"]))
            holder[name] = moved if how == "rename" else draw(JUNK)
        elif how == "add":
            holder.append(draw(JUNK))
    return bad


def assert_whole_or_nothing(optimizer: Any, params: list[Any], bad: Any) -> None:
    """Assert that a state dict loads, or is rejected without any change, and that the optimizer can step afterwards."""
    before = copy.deepcopy(optimizer.state_dict())
    try:
        optimizer.load_state_dict(bad)
    except ValueError:
        after = optimizer.state_dict()
        assert after["param_groups"] == before["param_groups"]
        torch.testing.assert_close(after["state"], before["state"], rtol=0, atol=0)
    for group in optimizer.param_groups:
        # Reset flags that the damage may have set and that a step on this machine would reject, as torch's own optimizers do.
        group.update(capturable=False, differentiable=False, fused=None)
    train(optimizer, params, range(1))


@settings(deadline=None, derandomize=True, max_examples=150)
@given(data=st.data())
def test_any_mutation_loads_whole_or_not_at_all(data: st.DataObject) -> None:
    optimizer, params = trained()
    assert_whole_or_nothing(optimizer, params, data.draw(mutated(optimizer.state_dict())))


@settings(deadline=None, derandomize=True, max_examples=100)
@given(data=st.data())
def test_a_damaged_file_loads_whole_or_not_at_all(data: st.DataObject) -> None:
    optimizer, params = trained()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    content = bytearray(file.getvalue())
    at = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        content = content[:at]
    else:
        content[at] ^= data.draw(st.integers(1, 255))
    try:
        read = torch.load(io.BytesIO(bytes(content)), weights_only=True)
    except Exception:  # torch's own reader noticed the damage, and raises errors and warnings of many types
        return
    assert_whole_or_nothing(optimizer, params, read)
