"""Watch a torch optimizer: see `vsgd.monitor`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer
from torch.utils.hooks import RemovableHandle

from vsgd.monitor import Monitor
from vsgd.monitor.summaries import Block, MonitorOps, describe_observed, describe_state, make_block, summarize
from vsgd.observer import State
from vsgd.torch.noise_scale import NoiseScaleMeter
from vsgd.torch.observer import GradientObserver, Watched
from vsgd.torch.optimizer import RuleOptimizer
from vsgd.torch.posterior import Stepped
from vsgd.validation import validate_numbers

__all__ = ["watch"]

# Small tensors are joined up to this many elements, for a look's temporary memory is several times theirs.
_BLOCK = 2**22


_OPS = MonitorOps(
    sum=torch.sum,
    split=lambda table, sizes: table.split(sizes, dim=1),
    stack=torch.stack,
    concatenate=torch.cat,
    take=lambda values, indices: values[torch.from_numpy(indices).to(values.device)],
    fetch=lambda values: values.cpu().numpy(),
)


def watch(
    optimizer: Any,
    monitor: Monitor,
    named_parameters: Iterable[tuple[str, Tensor]] = (),
    *,
    batch_size: float = 1,
    noise_scale: NoiseScaleMeter | None = None,
    observer: GradientObserver | None = None,
) -> RemovableHandle:
    """Report the state of an optimizer, or of an observer of its gradients, to a monitor every `monitor.every` steps.

    A look reports the state after the steps so far, and the surprise of the gradients that the next step will take. With a
    closure these gradients are not computed yet, so the surprise is that of `param.grad`. Between two looks a step costs one
    comparison more, and waits for no device. A look reads back once per device, group and dtype. It gathers sharded tensors:
    all processes must watch. A step in a CUDA graph calls no hooks.

    To log the loss, assign `monitor.loss = loss` before the step; only a look reads it.

    The hook is part of no checkpoint and no copy of the optimizer. Steps are counted from the optimizer's state when watching
    begins: load a checkpoint before you watch.

    Args:
        optimizer: a `vsgd.torch.VSGD` or `ConstantVSGD`; any torch optimizer with an `observer`.
        monitor: decides when to look, and writes the looks.
        named_parameters: names of the parameters; the default is the optimizer's names, else the parameters' indices.
        batch_size: the number of examples that a gradient averages, over all processes and accumulated steps; with 1 the
            noise scale counts batches.
        noise_scale: a meter of this optimizer. Its measurement replaces the noise scale of all tensors together. Without a
            meter the noise scale is estimated from the state, and right only while the weights are held still.
        observer: an observer of this optimizer's gradients. The looks then report its state under its own names, with the
            surprise of the last gradients that it observed. Each process reports its own shard of a sharded parameter.

    Returns:
        A handle: `remove()` ends watching, and so does the end of a `with` block.

    Raises:
        TypeError: the optimizer is of another class, and there is no observer.
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
    if observer is None and not isinstance(optimizer, RuleOptimizer):
        raise TypeError(f"optimizer is {type(optimizer).__name__}, but must be VSGD or ConstantVSGD, or have an observer")
    validate_numbers(batch_size=batch_size)
    names = {param: name for name, param in named_parameters}

    if observer is None:
        step = max((int(state["step"]) for state in optimizer.state.values() if state), default=0)
    else:
        step = max((each.step for block in observer.list_blocks() for each in block.members), default=0)

    def list_blocks() -> list[Block]:
        found = _iterate_blocks(optimizer, names, batch_size) if observer is None else _iterate_observed(observer, batch_size)
        return list(found)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def look_if_due(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        nonlocal step
        if monitor.due(step) and (blocks := list_blocks()):
            look = summarize(step, blocks, batch_size)
            if noise_scale is not None:
                trace, squared_norm, error, _ = noise_scale.read()
                noise = {"noise_trace": trace, "noise_squared_norm": squared_norm, "noise_scale_error": error}
                look = look._replace(overall=look.overall._replace(**noise))
            monitor.record(look)
        step += 1

    return optimizer.register_step_pre_hook(look_if_due)


@torch.no_grad()
def _iterate_blocks(optimizer: Any, names: dict[Tensor, str], batch_size: float) -> Iterator[Block]:
    """Yield the state and gradients of all parameters that have been stepped."""
    groups: dict[Any, list[Stepped]] = {}
    for stepped in optimizer._iterate_stepped():
        param = stepped.param
        if param.numel():
            dtypes = optimizer.state[param]["mu_g"].dtype, None if param.grad is None else param.grad.dtype
            groups.setdefault((stepped.group_index, param.device, *dtypes), []).append(stepped)
    for members in groups.values():
        for some in _cut(members):
            yield _make_block(optimizer, some, [names.get(each.param, str(each.name)) for each in some], batch_size)


def _cut(members: Sequence[Stepped]) -> Iterator[list[Stepped]]:
    """Yield lists of one tensor, or of tensors with at most `_BLOCK` elements together."""
    some: list[Stepped] = []
    count = 0
    for member in members:
        if some and count + member.param.numel() > _BLOCK:
            yield some
            some, count = [], 0
        some.append(member)
        count += member.param.numel()
    yield some


def _make_block(optimizer: Any, members: Sequence[Stepped], names: Sequence[str], batch_size: float) -> Block:
    params, group = [member.param for member in members], members[0].group
    grads = [param.grad for param in params if param.grad is not None]
    flat = _flatten(grads) if grads else None
    sizes = tuple(param.numel() * (2 if param.is_complex() else 1) for param in params)
    state = tuple(_flatten([optimizer.state[param][name] for param in params]) for name in optimizer._plain_rule.state_names)
    flat = -flat if flat is not None and group["maximize"] else flat
    described = describe_state(state, optimizer._compute_scales(group), flat, batch_size)
    return make_block(names, sizes, sizes, described, _OPS)


@torch.no_grad()
def _iterate_observed(observer: GradientObserver, batch_size: float) -> Iterator[Block]:
    """Yield the blocks of all parameters with an observed gradient."""
    for block in observer.list_blocks():
        members = [each for each in block.members if each.step and each.size]
        if members:
            yield _make_observed_block(members, batch_size)


def _make_observed_block(members: Sequence[Watched], batch_size: float) -> Block:
    state = State(*(torch.cat(arrays) for arrays in zip(*(each.state for each in members), strict=True)))
    described = describe_observed(state, batch_size)
    surprises = [each.innovations.surprise.expand(each.size) for each in members if each.innovations is not None]
    if len(surprises) == len(members):
        described.summands["surprise"] = torch.cat(surprises)
    sizes, numbers = tuple(each.size for each in members), tuple(each.numbers for each in members)
    return make_block([each.name for each in members], sizes, numbers, described, _OPS)


def _flatten(tensors: Sequence[Any]) -> Tensor:
    """Return one vector of real numbers; sharded tensors are gathered."""
    whole = [tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor for tensor in tensors]
    joined = torch.cat([tensor.reshape(-1) for tensor in whole])
    real = torch.view_as_real(joined).reshape(-1) if joined.is_complex() else joined
    return real.to(torch.promote_types(real.dtype, torch.float32))
