"""Which engine runs what: as the options of a group ask, else the fastest there is."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable, Iterable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import _to_scalar

from vsgd import core
from vsgd.backends.torch import foreach, loop, rounding
from vsgd.backends.torch.leaves import Leaf, block_size, blocks, is_plain

HAS_NUMBA = importlib.util.find_spec("numba") is not None


class Fused(NamedTuple):
    """Where a device's fused engine is, and what it needs.

    Attributes:
        module: its module, in `vsgd.backends`.
        package: the package that must be there.
        missing: what to say where it is not.
        batches: whether the engine steps batches, which may be planned, or leaves.
    """

    module: str
    package: str
    missing: str
    batches: bool


#: By type of device.
FUSED = {
    "cpu": Fused("fused_cpu", "numba", "fused=True needs numba: pip install 'vsgd[fused]'", batches=True),
    "cuda": Fused("fused_cuda", "triton", "fused=True on CUDA needs triton: pip install 'triton>=3.6'", batches=False),
}


def check_installed(devices: Iterable[str]) -> None:
    """Check that the fused engines of these devices can be had.

    Raises:
        ImportError: the package of one is missing.
    """
    for engine in (FUSED[device] for device in set(devices) & FUSED.keys()):
        if importlib.util.find_spec(engine.package) is None:
            raise ImportError(engine.missing)


#: The options of a group that say how a step is taken.
FLAGS = {"foreach": None, "maximize": False, "capturable": False, "differentiable": False, "fused": None}


def may_fuse(group: dict[str, Any]) -> bool:
    """Whether the fused engine is wanted, and no other way prescribed."""
    wanted = group["fused"] or (HAS_NUMBA and _is_automatic(group))
    return wanted and not (group["capturable"] or group["differentiable"])


def fused_engine(group: dict[str, Any], device: str, *, batches: bool) -> ModuleType | None:
    """The fused engine of a type of device, where it is wanted and can be had, and steps batches or leaves, as is asked."""
    automatic = device == "cpu" and HAS_NUMBA and _is_automatic(group)
    if device not in FUSED or FUSED[device].batches != batches or not (group["fused"] or automatic):
        return None
    engine = _import_fused(device)
    if isinstance(engine, ModuleType):
        return engine
    if group["fused"]:
        check_installed([device])
        raise ImportError(f"the engine of fused=True cannot be imported: {engine}") from engine
    return None


@functools.cache
def _import_fused(device: str) -> ModuleType | ImportError:
    # At the first use, and not above: importing numba takes half a second.
    try:
        return importlib.import_module(f"vsgd.backends.torch.{FUSED[device].module}")
    except ImportError as error:
        return error


def _engine(group: dict[str, Any], leaf: Leaf) -> Callable[..., None]:
    fused = fused_engine(group, leaf.param.device.type, batches=False)
    if fused is not None and fused.accepts(leaf):
        return fused.step
    return foreach.step if _wants_foreach(group, [leaf]) else loop.step_in_blocks


def _wants_foreach(group: dict[str, Any], leaves: Iterable[Leaf]) -> bool:
    if _is_automatic(group):
        return not group["differentiable"] and all(leaf.param.is_cuda and is_plain(leaf.param) for leaf in leaves)
    return bool(group["foreach"])


def _is_automatic(group: dict[str, Any]) -> bool:
    return group["foreach"] is None and group["fused"] is None


def number(value: float | Tensor) -> float:
    """A hyperparameter as a Python number."""
    return value.detach().item() if isinstance(value, Tensor) else value


def hyperparameters(rule: core.Rule, group: dict[str, Any]) -> Any:
    """The rule's hyperparameters, of those that a group holds."""
    return rule.hyperparameters(*(group[name] for name in rule.hyperparameters._fields))


def hyperparameter_numbers(rule: core.Rule, group: dict[str, Any]) -> Any:
    """The same as Python numbers, also where the group holds tensors."""
    return rule.hyperparameters(*map(number, hyperparameters(rule, group)))


def step_batch(rule: core.Rule, group: dict[str, Any], batch: Any) -> None:
    """One step of a batch of the fused engine."""
    batch.step(rule, *_numbers(rule, group), maximize=group["maximize"])


def _numbers(rule: core.Rule, group: dict[str, Any]) -> tuple[Any, float, float]:
    """The rule's hyperparameters, step size and decay."""
    lr = number(group["lr"])
    return hyperparameter_numbers(rule, group), lr, 1 - lr * number(group["weight_decay"])


def split_for_batches(
    group: dict[str, Any], leaves: Sequence[Leaf], steps: Sequence[Tensor]
) -> tuple[ModuleType | None, list[tuple[Leaf, Tensor]], tuple[list[Leaf], list[Tensor]]]:
    """The fused engine that steps batches, the leaves that it takes, with their counts, and leaves and counts that are left."""
    fused = fused_engine(group, "cpu", batches=True) if any(leaf.param.is_cpu for leaf in leaves) else None
    taken: list[tuple[Leaf, Tensor]] = []
    left: tuple[list[Leaf], list[Tensor]] = ([], [])
    for leaf, step in zip(leaves, steps, strict=True):
        if fused is not None and fused.accepts(leaf, step):
            taken.append((leaf, step))
        else:
            left[0].append(leaf)
            left[1].append(step)
    return fused, taken, left


def step_at(rule: core.Rule, hyper: Any, leaves: Sequence[Leaf], count: float, lr: float, weight_decay: float) -> None:
    """One step, in place, on leaves that share their count, each by the fastest engine that takes it.

    Args:
        rule: the variant to run.
        hyper: its hyperparameters.
        leaves: parameters.
        count: which step this is, 1 at the first.
        lr: step size.
        weight_decay: of all of them, times the step size.
    """
    group = {**FLAGS, **hyper._asdict(), "lr": lr, "weight_decay": weight_decay}
    steps = torch.full((len(leaves),), count - 1, dtype=torch.float64, device="cpu").unbind()
    fused, taken, left = split_for_batches(group, leaves, steps)
    if fused is not None and taken:
        step_batch(rule, group, fused.Batch(*zip(*taken, strict=True)))
    step_by_numbers(rule, group, *left)


def step_by_numbers(rule: core.Rule, group: dict[str, Any], leaves: list[Leaf], steps: list[Tensor]) -> None:
    """Coefficients as numbers, computed once for all parameters of equal step count."""
    if not leaves:
        return
    torch._foreach_add_(steps, 1)
    hyper, lr, decay = _numbers(rule, group)
    kinds: dict[tuple[float, Callable[..., None], torch.device], list[Leaf]] = {}
    for leaf, step in zip(leaves, steps, strict=True):
        kinds.setdefault((step.item(), _engine(group, leaf), leaf.param.device), []).append(_at(leaf, step.item()))
    for (count, engine, _), batch in kinds.items():
        coefficients = rule.coefficients(count, hyper)
        engine(rule, batch, coefficients, lr, decay, maximize=group["maximize"])


def step_by_tensors(rule: core.Rule, group: dict[str, Any], leaves: list[Leaf], steps: list[Tensor]) -> None:
    """Coefficients as 0-d tensors beside the parameters: no value is read back to the host."""
    torch._foreach_add_(steps, 1)
    hyper = hyperparameters(rule, group)
    lr = _to_scalar(group["lr"])
    if group["fused"] and not torch.compiler.is_compiling():
        leaves, steps = _step_fused(rule, group, leaves, steps)
    # In the state's dtype: a power of a float32 count would cost a float64 run its accuracy.
    leaves = [_at(leaf, step) for leaf, step in zip(leaves, steps, strict=True)]
    steps = [step.to(leaf.dtype) for step, leaf in zip(steps, leaves, strict=True)]
    if leaves and _wants_foreach(group, leaves):
        coefficients = rule.coefficients(foreach.TensorList(steps), hyper)
        if isinstance(lr, Tensor):
            lr = foreach.TensorList([lr] * len(leaves))
        decay = 1 - lr * group["weight_decay"]
        foreach.step(rule, leaves, coefficients, lr, decay, maximize=group["maximize"])
        return
    decay = 1 - lr * group["weight_decay"]
    whole = torch.compiler.is_compiling() or group["differentiable"]
    for leaf, step in zip(leaves, steps, strict=True):
        coefficients = rule.coefficients(step, hyper)
        if torch.compiler.is_compiling() and leaf.param.is_cpu:
            coefficients = type(coefficients)(*map(_in_memory, coefficients))
        parts = [leaf] if whole else blocks(leaf, block_size(leaf))
        loop.step(rule, parts, coefficients, lr, decay, maximize=group["maximize"])


def _step_fused(
    rule: core.Rule, group: dict[str, Any], leaves: list[Leaf], steps: list[Tensor]
) -> tuple[list[Leaf], list[Tensor]]:
    """Step the leaves that a fused engine takes, on each device; the others are returned."""
    kinds: dict[tuple[ModuleType, torch.device], list[tuple[Leaf, Tensor]]] = {}
    rest: list[tuple[Leaf, Tensor]] = []
    for leaf, step in zip(leaves, steps, strict=True):
        engine = fused_engine(group, leaf.param.device.type, batches=False)
        if engine is not None and engine.accepts(leaf):
            kinds.setdefault((engine, leaf.param.device), []).append((leaf, step))
        else:
            rest.append((leaf, step))
    lr = _to_scalar(group["lr"])
    decay = 1 - lr * group["weight_decay"]
    for (engine, _), pairs in kinds.items():
        # In float64, as numbers are: of the kernel's scalars each is rounded once.
        counts = torch.stack([step for _, step in pairs]).double()
        coefficients = rule.coefficients(counts, hyperparameters(rule, group))
        batch = rounding.leaves_at([leaf for leaf, _ in pairs], counts)
        engine.step(rule, batch, coefficients, lr, decay, maximize=group["maximize"])
    return [leaf for leaf, _ in rest], [step for _, step in rest]


def _at(leaf: Leaf, step: float | Tensor) -> Leaf:
    """The leaf with the noise of a step."""
    return leaf if leaf.noise is None else leaf._replace(noise=rounding.noise_at(leaf.noise, step))


def _in_memory(value: float | Tensor) -> float | Tensor:
    """The same number, which the compiler computes before the loop over elements, and not for each of them."""
    return value.as_strided((), ()) if isinstance(value, Tensor) else value
