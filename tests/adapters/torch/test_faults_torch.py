"""Damaged checkpoints of the torch adapter: a sentence, and not one bit of the optimizer changed."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from adapters.torch.torch_optimizers import ENGINES, assert_same_state, problem, train  # noqa: E402

from vsgd.torch import VSGD, ConstantVSGD  # noqa: E402

classes = pytest.mark.parametrize("cls", [VSGD, ConstantVSGD])


def trained(cls: Any = VSGD, **options: Any) -> tuple[Any, list[Any]]:
    """An optimizer with two groups of one parameter each, some steps in."""
    params, _ = problem()
    optimizer = cls([{"params": [params[0]]}, {"params": [params[1]], "lr": 0.1}], **options)
    train(optimizer, params, range(3))
    return optimizer, params


def assert_refused(optimizer: Any, params: list[Any], bad: Any, message: str) -> None:
    """The error's text, nothing changed, and the same steps as one that never saw the checkpoint."""
    untouched, its_params = trained(type(optimizer))
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(bad)
    assert optimizer.state_dict()["param_groups"] == untouched.state_dict()["param_groups"]
    for each, of in ((optimizer, params), (untouched, its_params)):
        train(each, of, range(3, 5))
    assert_same_state(optimizer, untouched)
    torch.testing.assert_close(params, its_params, rtol=0, atol=0)


def adamw(_: dict[str, Any]) -> dict[str, Any]:
    params, _closure = problem()
    optimizer = torch.optim.AdamW([{"params": [param]} for param in params])
    train(optimizer, params, range(2))
    return optimizer.state_dict()


def changed(change: Callable[[dict[str, Any]], Any]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    def apply(good: dict[str, Any]) -> dict[str, Any]:
        change(good)
        return good

    return apply


def state(name: str, value: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return changed(lambda good: good["state"][1].update({name: value}))


def group(name: str, value: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return changed(lambda good: good["param_groups"][1].update({name: value}))


FAULTS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no dict": (lambda _: 3, "state_dict is int, but must be a dict with state and param_groups"),
    "no state": (changed(lambda good: good.pop("state")), "state_dict has state of nothing, but it must be a dict"),
    "no groups": (changed(lambda good: good.pop("param_groups")), "has param_groups of nothing, but it must be a list"),
    "AdamW": (adamw, r"state_dict is not of a VSGD: param_groups\[0\] has .* and lacks variance_ratio"),
    "AdamW's state": (
        lambda good: {**good, "state": adamw(good)["state"]},
        "the state of parameter 0 has step, exp_avg, exp_avg_sq and lacks mu_g, b_g, b_ghat",
    ),
    "a group less": (changed(lambda good: good["param_groups"].pop()), "has 1 param_groups, but the optimizer has 2"),
    "a parameter more": (group("params", [1, 2]), r"param_groups\[1\] has 2 params, but the optimizer's group has 1"),
    "a parameter twice": (group("params", [0]), "param_groups name parameter 0 twice"),
    "no parameters": (group("params", None), r"param_groups\[1\] has params of NoneType, but must have a list"),
    "a group that is none": (changed(lambda good: good["param_groups"].__setitem__(1, 5)), r"param_groups\[1\] is int"),
    "groups swapped": (changed(lambda good: good["param_groups"].reverse()), r"mu_g of parameter 0 has shape .*, but"),
    "state of a stranger": (changed(lambda good: good["state"].update({7: {}})), "state of parameter 7, but its param_groups"),
    "state that is none": (changed(lambda good: good["state"].update({1: 3})), "the state of 1 is int, but must be a dict"),
    "a name more": (state("exp_avg", torch.ones(5)), "the state of parameter 1 has exp_avg too"),
    "a name less": (changed(lambda good: good["state"][1].pop("b_g")), "the state of parameter 1 has .* and lacks b_g"),
    "a step of text": (state("step", "three"), "step of parameter 1 is 'three', but must be a finite number >= 0"),
    "a step that is a truth": (
        state("step", torch.tensor(True)),
        "step of parameter 1 is tensor.True., but must be a finite number",
    ),
    "a negative step": (state("step", torch.tensor(-1.0)), "step of parameter 1 is tensor.*, but must be a finite number >= 0"),
    "a step of NaN": (state("step", torch.tensor(float("nan"))), "step of parameter 1 is tensor.*, but must be"),
    "many steps": (state("step", torch.ones(2)), "step of parameter 1 is tensor.*, but must be"),
    "integers": (
        state("b_g", torch.ones(5, dtype=torch.int64)),
        "b_g of parameter 1 is of torch.int64, but must be of numbers",
    ),
    "complex": (state("b_g", torch.ones(5, dtype=torch.complex64)), "b_g of parameter 1 is of torch.complex64, but must be"),
    "a shape": (state("b_g", torch.ones(3)), r"b_g of parameter 1 has shape torch.Size\(\[3\]\), but the parameter has \(5,\)"),
    "no tensor": (state("b_g", 0.5), r"b_g of parameter 1 has shape None, but the parameter has \(5,\)"),
    "sparse": (state("b_g", torch.ones(5).to_sparse()), "b_g of parameter 1 is Tensor, but must be a dense tensor"),
    "a hyperparameter": (group("kappa1", 3.0), r"Invalid kappa1 value: 3.0 \(kappa1 must be a number in \(0.5, 1\]\)"),
    "a hyperparameter of many": (group("lr", [0.1]), r"Invalid learning rate: \[0.1\]"),
    "a flag": (group("maximize", "no"), r"Invalid maximize value: 'no' \(maximize must be True, False or None\)"),
    "a dtype": (group("state_dtype", 3), "Invalid state_dtype value: 3"),
    "a threshold": (group("outlier_threshold", -1.0), "Invalid outlier_threshold value: -1.0"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_checkpoint_changes_nothing(fault: str) -> None:
    optimizer, params = trained()
    make, message = FAULTS[fault]
    assert_refused(optimizer, params, make(copy.deepcopy(optimizer.state_dict())), message)


@pytest.mark.parametrize(("of", "into"), [(VSGD, ConstantVSGD), (ConstantVSGD, VSGD)])
def test_the_other_variants_state_is_refused(of: Any, into: Any) -> None:
    assert_refused(*trained(into), trained(of)[0].state_dict(), "state_dict is not of a")


# --- Anything anywhere. ---

JUNK = st.sampled_from(
    [
        None,
        True,
        -1,
        0,
        2,
        0.5,
        float("nan"),
        10**400,
        "text",
        b"bytes",
        [],
        [1, 2],
        {},
        {"a": 1},
        (),
        *map(torch.ones, (0, 1, 5)),
    ]
).map(copy.deepcopy)


def places(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where something stands in nested dicts and lists."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [each for key, value in items for each in ((*path, key), *places(value, (*path, key)))]


@st.composite
def mutated(draw: st.DrawFn, good: dict[str, Any]) -> dict[str, Any]:
    bad = copy.deepcopy(good)
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(places(bad) or [("state",)]))
        holder = bad
        for key in path[:-1]:
            holder = holder[key]
        how = draw(st.sampled_from(["drop", "replace", "add", "rename"]))
        if how == "replace" or path[-1] not in (holder if isinstance(holder, dict) else range(len(holder))):
            holder[path[-1]] = draw(JUNK)
        elif how == "drop":
            del holder[path[-1]]
        elif isinstance(holder, list):
            holder.append(draw(JUNK))
        else:
            name = draw(st.sampled_from(["b", "mug", "params", "lr", 0, 9, "step"]))
            holder[name] = holder.pop(path[-1]) if how == "rename" else draw(JUNK)
    return bad


def assert_whole_or_nothing(optimizer: Any, params: list[Any], bad: Any) -> None:
    """It loads, or is refused and nothing changed; either way the optimizer steps on."""
    before = copy.deepcopy(optimizer.state_dict())
    try:
        optimizer.load_state_dict(bad)
    except ValueError:
        after = optimizer.state_dict()
        assert after["param_groups"] == before["param_groups"]
        torch.testing.assert_close(after["state"], before["state"], rtol=0, atol=0)
    for group in optimizer.param_groups:
        # Flags may have been damaged to ones that are some, and that a step on this machine refuses, as torch's own do.
        group.update(capturable=False, differentiable=False, fused=None)
    for each in params:
        each.grad = torch.ones_like(each)
    optimizer.step()


@settings(deadline=None, derandomize=True, max_examples=150)
@given(data=st.data())
def test_any_mutation_loads_whole_or_not_at_all(data: st.DataObject) -> None:
    optimizer, params = trained()
    assert_whole_or_nothing(optimizer, params, data.draw(mutated(optimizer.state_dict())))


# --- Bytes. ---


@classes
@pytest.mark.parametrize("engine", ENGINES, ids=str)
def test_every_option_loads_without_running_code(cls: Any, engine: dict[str, Any]) -> None:
    options = {"state_dtype": "bfloat16", "stochastic_rounding": True, "seed": 3, "outlier_threshold": 5.0, **engine}
    optimizer, _ = trained(cls, **options)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    loaded, _ = trained(cls)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    assert_same_state(loaded, optimizer)
    assert loaded.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]


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
    except Exception:  # torch's own reader saw it, and says so by errors and warnings of many types
        return
    assert_whole_or_nothing(optimizer, params, read)
