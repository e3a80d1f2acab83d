"""A prior in the units of a torch model's gradients."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vsgd import prior
from vsgd.torch.posterior import sum_shards
from vsgd.validation import document_options

# Elements of a gradient that are measured at once.
_BLOCK = 2**22

Gradients = Iterable[Tensor | None] | Mapping[Any, Tensor | None]


@document_options()
def prior_strength_from(gradients: Iterable[Gradients], scale: float = 10.0) -> float:
    """Compute a `prior_strength` in the units of a model's gradients, before training: see `docs/calibration.md`.

    The result is `5e-5 * scale` times the mean square of all gradient elements, over all parameters and mini-batches. Pass the
    gradients that the optimizer will see: those of the training loss, unscaled.

    The mini-batches are taken one after the other. A generator may free the gradients of one before it computes the next; it
    must do so if gradients are accumulated or zeroed in place, as `param.grad` may be. Sharded gradients are summed over all
    processes: every process must call this function.

    Args:
        gradients: for each of a few mini-batches, about 10, the gradients of the parameters: the result of
            `torch.autograd.grad`, `[param.grad for param in model.parameters()]`, or a dict. None is skipped.
        scale: {scale}

    Returns:
        A number for `prior_strength`.

    Raises:
        ValueError: `scale` is out of its range; the gradients are missing, all zero, not finite or not of numbers; or the
            result is not a valid prior strength.

    Example:
        >>> import torch
        >>> from vsgd.torch import VSGD, prior_strength_from
        >>> model = torch.nn.Linear(3, 1)
        >>> batches = [(torch.ones(4, 3), torch.ones(4, 1)), (torch.ones(4, 3), torch.zeros(4, 1))]
        >>> def gradients():
        ...     for x, y in batches:
        ...         loss = torch.nn.functional.mse_loss(model(x), y)
        ...         yield torch.autograd.grad(loss, list(model.parameters()))
        >>> optimizer = VSGD(model.parameters(), prior_strength=prior_strength_from(gradients()))
    """
    return prior.prior_strength_from(
        gradients, scale, prior.iterate_lists(_make_leaf), lambda magnitudes: sum_shards(magnitudes).item()
    )


def measure_gradients(params: Sequence[Tensor]) -> float:
    """Return the root mean square of all elements of the parameters' gradients, or 0 if they are all zero or not finite.

    Sharded gradients are measured over all processes, each of which must call this function: two reductions for each dimension
    of a mesh.

    Args:
        params: parameters that have a dense gradient.
    """
    numbers = sum(param.numel() * (2 if param.is_complex() else 1) for param in params)
    plain: dict[torch.device, list[Tensor]] = {}
    sharded: dict[Any, list[Tensor]] = {}
    param: Any
    for param in params:
        grad = param.grad
        mesh = getattr(param, "device_mesh", None)
        if mesh is None:
            plain.setdefault(grad.device, []).extend(_cut(grad))
            continue
        arrays = sharded.setdefault(mesh, [])
        coordinate = mesh.get_coordinate()
        grad = grad.redistribute(mesh, param.placements).to_local()
        # One of the processes that have equal shards counts them.
        first = all(not each.is_replicate() or index == 0 for each, index in zip(param.placements, coordinate, strict=True))
        if first:
            arrays.extend(_cut(grad))
    shards = [prior.Shards(arrays, _widen, _bring_home, _bring_home) for arrays in plain.values()]
    for mesh, arrays in sharded.items():
        operations = torch.distributed.ReduceOp.MAX, torch.distributed.ReduceOp.SUM
        shards.append(prior.Shards(arrays, _widen, *(partial(_reduce, mesh, operation) for operation in operations)))
    return float(prior.measure_unit(torch, shards, numbers))


def _reduce(mesh: Any, operation: Any, value: Any) -> Tensor:
    total = torch.as_tensor(value, dtype=torch.float64, device=mesh.device_type)
    for dimension in range(mesh.ndim):
        torch.distributed.all_reduce(total, operation, group=mesh.get_group(dimension))
    return _bring_home(total)


def _cut(grad: Tensor) -> Sequence[Tensor]:
    """Return blocks of a gradient as real numbers: temporaries stay small."""
    grad = grad.detach().resolve_conj()
    return (torch.view_as_real(grad) if grad.is_complex() else grad).reshape(-1).split(_BLOCK)


def _bring_home(value: Any) -> Tensor:
    return torch.as_tensor(value).cpu().double()  # where 0-d tensors go with those of every device


def _widen(array: Tensor) -> Tensor:
    return array.to(torch.promote_types(array.dtype, torch.float32))


def _make_leaf(name: str, grad: Any) -> prior.Gradient:
    if not isinstance(grad, Tensor) or grad.layout != torch.strided:
        found = f"a tensor of layout {grad.layout}" if isinstance(grad, Tensor) else type(grad).__name__
        raise ValueError(f"{name} is {found}, but must be a dense tensor")
    wide = torch.promote_types(grad.dtype, torch.complex64 if grad.is_complex() else torch.float32)
    return prior.Gradient(name, grad.detach().to(wide).abs(), grad.numel() * (2 if grad.is_complex() else 1))
