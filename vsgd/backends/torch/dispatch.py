"""Dispatch of leaves to engines: each leaf goes to the first engine that the options allow and that accepts the leaf."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vsgd import rounding
from vsgd.backends.torch.foreach import Foreach
from vsgd.backends.torch.leaves import Engine, Leaf, Plan, StepOptions, make_leaf
from vsgd.backends.torch.loop import Loop


class FusedEngine(NamedTuple):
    """Where a device's fused engine is, and what it needs.

    Attributes:
        module: its module in `vsgd.backends.torch`.
        name: its class.
        package: the package that it imports.
        oldest: the package's oldest version that has what the engine needs.
        command: the command that installs it.
        on_device: whether it can step with counts that are tensors.
    """

    module: str
    name: str
    package: str
    oldest: tuple[int, int]
    command: str
    on_device: bool


#: The fused engine of each type of device.
FUSED = {
    "cpu": FusedEngine("fused_cpu", "FusedCpu", "numba", (0, 61), "pip install 'numba>=0.61'", on_device=False),
    # Older ones flush subnormals to zero.
    "cuda": FusedEngine("fused_cuda", "FusedCuda", "triton", (3, 6), "pip install 'torch>=2.10'", on_device=True),
}


def check_fused(device_types: Iterable[str]) -> None:
    """Check that the packages of these devices' fused engines are installed, in a version that has what they need.

    Raises:
        ImportError: one is missing or too old.
    """
    for device_type in set(device_types) & FUSED.keys():
        engine = FUSED[device_type]
        version = "none"
        if importlib.util.find_spec(engine.package) is not None:
            version = str(importlib.import_module(engine.package).__version__)
            if tuple(map(int, version.split(".")[:2])) >= engine.oldest:
                continue
        needed = f"{engine.package} {'.'.join(map(str, engine.oldest))} or newer"
        raise ImportError(f"VSGD's fused step on {device_type} needs {needed}, but found {version}: run {engine.command}")


def load_fused(device_type: str, required: bool) -> Engine | None:
    """Return the fused engine of a type of device, or None where it cannot be imported.

    Args:
        device_type: a key of `FUSED`.
        required: whether to raise an error instead of returning None.

    Raises:
        ImportError: the engine is required and cannot be imported.
    """
    engine = _import_fused(device_type)
    if not isinstance(engine, ImportError):
        return engine
    if required:
        check_fused([device_type])
        raise ImportError(f"the engine of fused=True cannot be imported: {engine}") from engine
    _warn_once(f"VSGD takes slow steps, because {engine}")
    return None


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=2)


@functools.cache
def _import_fused(device_type: str) -> Any:
    # At the first use: importing numba takes half a second.
    entry = FUSED[device_type]
    try:
        check_fused([device_type])
        return getattr(importlib.import_module(f"vsgd.backends.torch.{entry.module}"), entry.name)()
    except ImportError as error:
        return error


def wants_fused(options: StepOptions, device_type: str) -> bool:
    """Return whether the options allow the fused engine of this type of device."""
    if device_type not in FUSED or torch.compiler.is_compiling():
        return False
    if options.on_device and not FUSED[device_type].on_device:
        return False
    return bool(options.fused) or (device_type == "cpu" and _is_automatic(options))


def _is_automatic(options: StepOptions) -> bool:
    return options.foreach is None and options.fused is None


def list_engines(options: StepOptions, device_types: Iterable[str]) -> list[Engine]:
    """Return the engines that the options allow, in order of preference; the last one accepts every leaf."""
    wanted = [device_type for device_type in device_types if wants_fused(options, device_type)]
    loaded = [load_fused(device_type, required=bool(options.fused)) for device_type in wanted]
    engines = [engine for engine in loaded if engine is not None]
    if options.foreach or (_is_automatic(options) and not options.differentiable):
        engines.append(Foreach(everywhere=bool(options.foreach)))
    return [*engines, Loop()]


def assign_leaves(leaves: Sequence[Leaf], options: StepOptions) -> list[tuple[Engine, list[int]]]:
    """Return the engines that step these leaves, each with the indices of its leaves."""
    assigned: list[tuple[Engine, list[int]]] = []
    remaining = list(range(len(leaves)))
    for engine in list_engines(options, sorted({leaf.param.device.type for leaf in leaves})):
        accepted = [index for index in remaining if engine.accepts(leaves[index])]
        if accepted:
            assigned.append((engine, accepted))
            taken = set(accepted)
            remaining = [index for index in remaining if index not in taken]
    return assigned


def step_leaves(leaves: Sequence[Leaf], count: float, options: StepOptions) -> None:
    """Take one step, in place, of leaves that share their step count.

    Args:
        leaves: the leaves.
        count: which step this is, 1 for the first.
        options: the step's options.
    """
    options = read_numbers(options)
    for engine, indices in assign_leaves(leaves, options):
        engine.step([leaves[index] for index in indices], count, options)


def read_numbers(options: StepOptions) -> StepOptions:
    """Return the options with Python numbers in place of tensors, unless the step runs on the device."""
    if options.on_device:
        return options
    lr, weight_decay, *hyper = (
        value.detach().item() if isinstance(value, Tensor) else value
        for value in (options.lr, options.weight_decay, *options.hyper)
    )
    return options._replace(lr=lr, weight_decay=weight_decay, hyper=type(options.hyper)(*hyper))


class Collected(NamedTuple):
    """The parameters of a group that have a gradient, in the order of the group.

    Attributes:
        params: the parameters.
        grads: their gradients.
        counts: their step counts, before this step.
        states: one list for each name of `rule.state_names`, with the state array of each parameter.
    """

    params: list[Tensor]
    grads: list[Tensor]
    counts: list[Tensor]
    states: list[list[Tensor]]


class _Planned(NamedTuple):
    plan: Plan
    rounding: tuple[bool, int]  # the options that decide the leaves' noise


class Stepper:
    """Steps the parameter groups of one optimizer, and plans the next fused steps.

    Args:
        state_names: the names of a parameter's state arrays.
    """

    def __init__(self, state_names: Sequence[str]) -> None:
        self._state_names = state_names
        self._planned: dict[int, _Planned] = {}

    def exclude_planned(
        self, index: int, group: dict[str, Any], options: StepOptions, state: Mapping[Any, Any]
    ) -> dict[str, Any]:
        """Return the group without the parameters that its plan will step, if the plan is still valid.

        Args:
            index: the group's index in the optimizer.
            group: the group.
            options: its options.
            state: the optimizer's state.
        """
        planned = self._planned.get(index)
        if planned is None:
            return group
        if (
            planned.rounding == (group["stochastic_rounding"], group["seed"])
            and wants_fused(options, "cpu")
            and planned.plan.renew(group["params"], state)
        ):
            return {**group, "params": planned.plan.others}
        del self._planned[index]
        return group

    def step(self, index: int, groups: Sequence[Mapping[str, Any]], options: StepOptions, collected: Collected) -> None:
        """Take one step of a group's parameters, in place.

        Args:
            index: the group's index.
            groups: all groups of the optimizer.
            options: the options of this group.
            collected: the parameters to step; those in a valid plan are stepped in addition.
        """
        # A compiled step has collected the parameters of an earlier plan too.
        planned = None if options.on_device else self._planned.get(index)
        if planned is None and not collected.params:
            return
        options = read_numbers(options)
        if planned is not None:
            planned.plan.step(options)
        if not collected.params:
            return
        group, params, counts = groups[index], collected.params, collected.counts
        keys = _make_base_keys(index, groups, params)
        # A list, because the compiler of torch 2.6 cannot leave a loop over `zip`.
        rows = list(zip(params, collected.grads, keys, *collected.states, strict=True))
        leaves = [make_leaf(param, grad, tuple(state), key, group["stochastic_rounding"]) for param, grad, key, *state in rows]
        if options.on_device:
            next_counts = torch._foreach_add(counts, 1)
            for engine, indices in assign_leaves(leaves, options):
                engine.step([leaves[i] for i in indices], [next_counts[i] for i in indices], options)
                # After the step: where an engine cannot compile its kernel, nothing has changed.
                torch._foreach_copy_([counts[i] for i in indices], [next_counts[i] for i in indices])
            return
        for engine, indices in assign_leaves(leaves, options):
            # A plan needs the parameters themselves, and no views of them.
            own = [i for i in indices if leaves[i].param is params[i]]
            plan = engine.make_plan(group["params"], [leaves[i] for i in own], [counts[i] for i in own], self._state_names)
            if plan is not None:
                plan.step(options)
                # Next to an earlier plan, this step has more parameters than the last: the next step plans them together.
                if self._planned.pop(index, None) is None:
                    self._planned[index] = _Planned(plan, (group["stochastic_rounding"], group["seed"]))
                unplanned = set(map(id, plan.others))
                indices = [i for i in indices if leaves[i].param is not params[i] or id(params[i]) in unplanned]
            by_count: dict[float, list[int]] = {}
            for i in indices:
                by_count.setdefault(counts[i].item() + 1, []).append(i)
            for count, members in by_count.items():
                engine.step([leaves[i] for i in members], count, options)
                torch._foreach_add_([counts[i] for i in members], 1)


def _make_base_keys(index: int, groups: Sequence[Mapping[str, Any]], params: Sequence[Tensor]) -> list[int | None]:
    """Return the `rounding.base_key` of each parameter, or None where the group rounds nothing stochastically."""
    group = groups[index]
    if group["state_dtype"] == "float32" and not group["stochastic_rounding"]:
        return [None] * len(params)
    first = sum(len(earlier["params"]) for earlier in groups[:index])
    numbers = {id(param): first + number for number, param in enumerate(group["params"])}
    return [rounding.base_key(group["seed"], numbers[id(param)]) for param in params]
