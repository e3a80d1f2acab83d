"""Which engine runs what: as the options of a group ask, else the fastest there is."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Iterable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import _to_scalar

from vsgd import core
from vsgd.backends import torch_foreach, torch_loop, torch_rounding
from vsgd.backends.torch_blocks import Leaf, block_size, blocks, is_plain

HAS_NUMBA = importlib.util.find_spec("numba") is not None

FUSED_NEEDS_NUMBA = "fused=True needs numba: pip install 'vsgd[fused]'"

#: The options of a group that say how a step is taken.
FLAGS = {"foreach": None, "maximize": False, "capturable": False, "differentiable": False, "fused": None}


def may_fuse(group: dict[str, Any]) -> bool:
    """Whether the fused engine is wanted, and no other way prescribed."""
    wanted = group["fused"] or (HAS_NUMBA and _is_automatic(group))
    return wanted and not (group["capturable"] or group["differentiable"])


def fused_engine(group: dict[str, Any]) -> ModuleType | None:
    """The fused engine, where it is wanted and can be had."""
    if not may_fuse(group):
        return None
    engine = _import_fused()
    if isinstance(engine, ModuleType):
        return engine
    if group["fused"]:
        raise ImportError(FUSED_NEEDS_NUMBA) from engine
    return None


@functools.cache
def _import_fused() -> ModuleType | ImportError:
    # At the first use, and not above: importing numba takes half a second.
    try:
        from vsgd.backends import torch_fused
    except ImportError as error:
        return error
    return torch_fused


def _wants_foreach(group: dict[str, Any], leaves: Iterable[Leaf]) -> bool:
    if _is_automatic(group):
        return not group["differentiable"] and all(leaf.param.is_cuda and is_plain(leaf.param) for leaf in leaves)
    return bool(group["foreach"])


def _is_automatic(group: dict[str, Any]) -> bool:
    return group["foreach"] is None and group["fused"] is None


def number(lr: float | Tensor) -> float:
    """A step size as a Python number."""
    return lr.detach().item() if isinstance(lr, Tensor) else lr


def hyperparameters(rule: core.Rule, group: dict[str, Any]) -> Any:
    """The rule's hyperparameters, of those that a group holds."""
    return rule.hyperparameters(*(group[name] for name in rule.hyperparameters._fields))


def step_batch(rule: core.Rule, group: dict[str, Any], batch: Any) -> None:
    """One step of a batch of the fused engine."""
    lr = number(group["lr"])
    decay = 1 - lr * group["weight_decay"]
    batch.step(rule, hyperparameters(rule, group), lr, decay, maximize=group["maximize"])


def step_at(rule: core.Rule, hyper: Any, leaves: Sequence[Leaf], count: float, lr: float) -> None:
    """One step without weight decay, in place, on leaves that share their count, each by the fastest engine that takes it.

    Args:
        rule: the variant to run.
        hyper: its hyperparameters.
        leaves: parameters.
        count: which step this is, 1 at the first.
        lr: step size.
    """
    group = {**FLAGS, **hyper._asdict(), "lr": lr, "weight_decay": 0.0}
    steps = torch.full((len(leaves),), count - 1, dtype=torch.float64, device="cpu").unbind()
    fused = fused_engine(group) if any(leaf.param.is_cpu for leaf in leaves) else None
    fusible: list[tuple[Leaf, Tensor]] = []
    left: list[tuple[Leaf, Tensor]] = []
    for pair in zip(leaves, steps, strict=True):
        (fusible if fused is not None and fused.accepts(*pair) else left).append(pair)
    if fused is not None and fusible:
        step_batch(rule, group, fused.Batch(*zip(*fusible, strict=True)))
    step_by_numbers(rule, group, [leaf for leaf, _ in left], [step for _, step in left])


def step_by_numbers(rule: core.Rule, group: dict[str, Any], leaves: list[Leaf], steps: list[Tensor]) -> None:
    """Coefficients as numbers, computed once for all parameters of equal step count."""
    if not leaves:
        return
    torch._foreach_add_(steps, 1)
    hyper = hyperparameters(rule, group)
    lr = number(group["lr"])
    decay = 1 - lr * group["weight_decay"]
    by_count: dict[tuple[float, Callable[..., None]], list[Leaf]] = {}
    for leaf, step in zip(leaves, steps, strict=True):
        engine = torch_foreach.step if _wants_foreach(group, [leaf]) else torch_loop.step_in_blocks
        by_count.setdefault((step.item(), engine), []).append(_at(leaf, step.item()))
    for (count, engine), batch in by_count.items():
        coefficients = rule.coefficients(count, hyper)
        engine(rule, batch, coefficients, lr, decay, maximize=group["maximize"])


def step_by_tensors(rule: core.Rule, group: dict[str, Any], leaves: list[Leaf], steps: list[Tensor]) -> None:
    """Coefficients as 0-d tensors beside the parameters: no value is read back to the host."""
    torch._foreach_add_(steps, 1)
    hyper = hyperparameters(rule, group)
    lr = _to_scalar(group["lr"])
    # In the state's dtype: a power of a float32 count would cost a float64 run its accuracy.
    leaves = [_at(leaf, step) for leaf, step in zip(leaves, steps, strict=True)]
    steps = [step.to(leaf.dtype) for step, leaf in zip(steps, leaves, strict=True)]
    if _wants_foreach(group, leaves):
        coefficients = rule.coefficients(torch_foreach.TensorList(steps), hyper)
        if isinstance(lr, Tensor):
            lr = torch_foreach.TensorList([lr] * len(leaves))
        decay = 1 - lr * group["weight_decay"]
        torch_foreach.step(rule, leaves, coefficients, lr, decay, maximize=group["maximize"])
        return
    decay = 1 - lr * group["weight_decay"]
    whole = torch.compiler.is_compiling() or group["differentiable"]
    for leaf, step in zip(leaves, steps, strict=True):
        coefficients = rule.coefficients(step, hyper)
        if torch.compiler.is_compiling() and leaf.param.is_cpu:
            coefficients = type(coefficients)(*map(_in_memory, coefficients))
        parts = [leaf] if whole else blocks(leaf, block_size(leaf))
        torch_loop.step(rule, parts, coefficients, lr, decay, maximize=group["maximize"])


def _at(leaf: Leaf, step: float | Tensor) -> Leaf:
    """The leaf with the noise of a step."""
    return leaf if leaf.noise is None else leaf._replace(noise=torch_rounding.noise_at(leaf.noise, step))


def _in_memory(value: float | Tensor) -> float | Tensor:
    """The same number, which the compiler computes before the loop over elements, and not for each of them."""
    return value.as_strided((), ()) if isinstance(value, Tensor) else value
