"""Watching a torch optimizer: see `vsgd.monitor`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer
from torch.utils.hooks import RemovableHandle

from vsgd import core
from vsgd.monitor import Monitor
from vsgd.monitor.summaries import Arrays, Block, digest, summarize
from vsgd.torch.optimizer import RuleOptimizer
from vsgd.torch.posterior import scales_of

__all__ = ["watch"]

# Small tensors are looked at together, up to so many elements, for a look's temporary memory is several times theirs.
_BLOCK = 2**22


def _take(values: Tensor, places: Any) -> Tensor:
    return values[torch.from_numpy(places).to(values.device)]


_ARRAYS = Arrays(torch.sum, lambda table, sizes: table.split(sizes, dim=1), torch.stack, torch.cat, _take)


def watch(
    optimizer: Any, monitor: Monitor, named_parameters: Iterable[tuple[str, Tensor]] = (), *, batch_size: float = 1
) -> RemovableHandle:
    """Look at an optimizer, before every so manieth of its steps.

    What is seen is the state after the steps taken, and the surprise of the gradients that the next step is about to take;
    with a closure these are not known yet, and the surprise is of what is in `param.grad`. Between two looks a step costs one
    comparison more, and no device is waited for. A look reads back once for each device, group and dtype. Sharded tensors are
    gathered: all processes must watch. A step in a CUDA graph calls no hooks.

    The hook is in no checkpoint and no copy of the optimizer. Steps are counted on from those that the state has when watching
    begins: load a checkpoint before.

    Args:
        optimizer: `vsgd.torch.VSGD` or `ConstantVSGD`.
        monitor: says when to look and writes what is seen.
        named_parameters: names for the parameters; others are called by their place in the optimizer.
        batch_size: how many examples a gradient is the mean of, in all processes and accumulated steps together; at 1 the
            noise scale counts batches.

    Returns:
        A handle: `remove()` ends it, and so does the end of a `with` block.

    Raises:
        TypeError: the optimizer is of another class.
        ValueError: `batch_size` is out of its range.

    Example:
        >>> from vsgd.torch import VSGD
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = VSGD([weight])
        >>> looks = []
        >>> handle = watch(optimizer, Monitor(looks, every=2), [("weight", weight)], batch_size=32)
        >>> for _ in range(3):
        ...     weight.grad = torch.ones(2)
        ...     optimizer.step()
        >>> handle.remove()
        >>> looks[0].step, list(looks[0].tensors)
        (2, ['weight'])
    """
    if not isinstance(optimizer, RuleOptimizer):
        raise TypeError(f"optimizer is {type(optimizer).__name__}, but must be VSGD or ConstantVSGD")
    core.validate(batch_size=batch_size)
    names = {param: name for name, param in named_parameters}

    def look(block: Block, places: Any) -> Any:
        return digest(block, places, _ARRAYS, batch_size).cpu().numpy()

    step = max((int(state["step"]) for state in optimizer.state.values() if state), default=0)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        nonlocal step
        if monitor.due(step) and (blocks := list(_blocks(optimizer, names))):
            monitor.record(summarize(step, blocks, look, batch_size))
        step += 1

    return optimizer.register_step_pre_hook(before_step)


@torch.no_grad()
def _blocks(optimizer: Any, names: dict[Tensor, str]) -> Iterator[Block]:
    """The state and gradients of all parameters that were stepped."""
    parts: dict[Any, list[tuple[str, Tensor]]] = {}
    place = 0
    for number, group in enumerate(optimizer.param_groups):
        for param in group["params"]:
            state = optimizer.state.get(param)
            if state and param.numel():
                key = (number, param.device, state["mu_g"].dtype, None if param.grad is None else param.grad.dtype)
                parts.setdefault(key, []).append((names.get(param, str(place)), param))
            place += 1
    for (number, *_), members in parts.items():
        for some in _cut(members):
            yield _block(optimizer, optimizer.param_groups[number], some)


def _cut(members: list[tuple[str, Tensor]]) -> Iterator[list[tuple[str, Tensor]]]:
    """In parts of no more than `_BLOCK` elements, or of one tensor."""
    some: list[tuple[str, Tensor]] = []
    count = 0
    for member in members:
        if some and count + member[1].numel() > _BLOCK:
            yield some
            some, count = [], 0
        some.append(member)
        count += member[1].numel()
    yield some


def _block(optimizer: Any, group: dict[str, Any], members: list[tuple[str, Tensor]]) -> Block:
    rule = optimizer._kind
    params = [param for _, param in members]
    states = [optimizer.state[param] for param in params]
    arrays = tuple(_flat([state[name] for state in states]) for name in rule.state_names)
    grads = [param.grad for param in params if param.grad is not None]
    flat = _flat(grads) if grads else None
    return Block(
        names=[name for name, _ in members],
        sizes=tuple(param.numel() * (2 if param.is_complex() else 1) for param in params),
        state=arrays,
        scales=scales_of(rule, group),
        grads=-flat if flat is not None and group["maximize"] else flat,
    )


def _flat(tensors: list[Tensor]) -> Tensor:
    """One vector of real numbers; sharded tensors gathered."""
    joined = torch.cat([_whole(tensor).reshape(-1) for tensor in tensors])
    real = torch.view_as_real(joined).reshape(-1) if joined.is_complex() else joined
    return real.to(torch.promote_types(real.dtype, torch.float32))


def _whole(tensor: Any) -> Tensor:
    return tensor if type(tensor) is Tensor or not hasattr(tensor, "full_tensor") else tensor.full_tensor()
