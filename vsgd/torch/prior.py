"""A prior in the units of a torch model's gradients."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from vsgd import prior
from vsgd.torch.posterior import sum_of_shards

Gradients = Iterable[Tensor | None] | Mapping[Any, Tensor | None]


def prior_strength_from(gradients: Iterable[Gradients], scale: float = 10.0) -> float:
    """A `prior_strength` in the units of a model's gradients, to be taken before training: see `docs/tuning.md`.

    It is `5e-5 * scale` times the mean of the squares of all elements, over all parameters and mini-batches together. So the
    first steps expect a variance of about `scale` times what a squared gradient is.

    The mini-batches are taken one after the other: a generator need not hold the gradients of more than one. It must, where
    gradients are accumulated or zeroed in place, as `param.grad` may be. Gradients are to be those that the optimizer will see,
    of the loss that is trained on, unscaled. Sharded ones are summed over all processes: every process must call it.

    Args:
        gradients: for each of a few mini-batches, 10 are advised, the gradients of the parameters: what `torch.autograd.grad`
            returns, `[param.grad for param in model.parameters()]`, or a dict. None is left out.
        scale: the variance to start with, over the mean squared gradient. Larger starts slower, far smaller is unsafe.

    Returns:
        A number for `VSGD` or `ConstantVSGD`.

    Raises:
        ValueError: `scale` is out of its range; there are no gradients, all are zero, one is not finite or none of numbers; or
            they are so small or large that what would be returned is no prior strength.

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
    return prior.prior_strength_from(gradients, scale, prior.of_list(_leaf), lambda sizes: sum_of_shards(sizes).item())


def _leaf(name: str, grad: Any) -> prior.Leaf:
    if not isinstance(grad, Tensor) or grad.layout != torch.strided:
        kind = f"a tensor of layout {grad.layout}" if isinstance(grad, Tensor) else type(grad).__name__
        raise ValueError(f"{name} is {kind}, but must be a dense tensor")
    wide = torch.promote_types(grad.dtype, torch.complex64 if grad.is_complex() else torch.float32)
    return prior.Leaf(name, grad.detach().to(wide).abs(), grad.numel() * (2 if grad.is_complex() else 1))
