"""Measure the gradient noise scale of a torch training without bias: see `vsgd.monitor.noise_scale`."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.optim.optimizer import Optimizer

from vsgd.monitor.noise_scale import MeasuredNoiseScale, average_estimates, estimate_from_parts
from vsgd.posterior import NoiseScale
from vsgd.torch.posterior import view_as_real
from vsgd.validation import validate_numbers

__all__ = ["NoiseScaleMeter"]


class NoiseScaleMeter:
    """Measure the gradient noise scale from the micro-batches of each step, on one rank or several.

    Hooks on the parameters take the norm of each micro-batch's gradient, and a hook before `optimizer.step` takes the norm of
    `param.grad`. The meter copies no gradients, and reads nothing back from the device before `read`. With several ranks, it
    adds one reduction of two numbers to a step.

    A step must have at least two parts: its micro-batches on all ranks. Call `backward` once for each micro-batch. All parts
    must have the same size and the same weight in the loss. You may divide the loss by the number of micro-batches or not; only
    the units of trace and squared norm depend on it. You may rescale all gradients before the step, as `clip_grad_norm_` does:
    the meter finds the factor from one element of each gradient, and measures the gradients as they were before.

    The meter works with any torch optimizer, and with DDP. It does not support FSDP and tensor parallelism, whose hooks do not
    see a rank's own gradients, nor CUDA graphs, nor weights that several segments share under reentrant checkpointing.

    Args:
        optimizer: the optimizer whose parameters to measure, created before the meter.
        micro_batch_size: the number of examples in a micro-batch on one rank.
        window: the number of steps to average over. Steps whose gradients are not finite are left out.
        scaler: the `torch.amp.GradScaler` of the training; without it, trace and squared norm are in units of the scaled loss.
        process_group: the ranks that average their gradients; None: all ranks, if `torch.distributed` is initialized.

    Raises:
        TypeError: a parameter is a `DTensor`.
        ValueError: `micro_batch_size` or `window` is out of its range.

    Example:
        >>> from torch import nn
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Linear(3, 1)
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> with NoiseScaleMeter(optimizer, micro_batch_size=8) as meter:
        ...     for step in range(20):
        ...         for micro_batch in range(2):
        ...             x = torch.randn(8, 3)
        ...             (model(x) - x.sum(1, keepdim=True)).square().mean().div(2).backward()
        ...         optimizer.step()
        ...         optimizer.zero_grad()
        >>> measured = meter.read()
        >>> measured.steps, measured.scale > measured.error > 0
        (20, True)
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        micro_batch_size: float,
        window: int = 400,
        scaler: torch.amp.GradScaler | None = None,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        validate_numbers(micro_batch_size=micro_batch_size, window=window)
        params = [param for group in optimizer.param_groups for param in group["params"] if param.numel()]
        if any(hasattr(param, "full_tensor") for param in params):
            raise TypeError("a parameter of the optimizer is a DTensor, but must be a plain tensor: FSDP is not supported")
        self.micro_batch_size = micro_batch_size
        self._scaler = scaler
        self._group = process_group
        self._parts: dict[Tensor, list[Tensor]] = {param: [] for param in params if param.requires_grad}
        # The nodes that add to `param.grad`. Hooks on the tensors would also see the gradients of `torch.autograd.grad`.
        self._nodes = [get_gradient_edge(param).node for param in self._parts]
        self._found: deque[Tensor] = deque(maxlen=window)
        self._handles = [
            node.register_prehook(self._make_hook(param)) for node, param in zip(self._nodes, self._parts, strict=True)
        ]
        self._handles.append(optimizer.register_step_pre_hook(self._compare))

    def read(self) -> MeasuredNoiseScale:
        """Return the noise scale of the last steps, with its standard error; waits for the device.

        Raises:
            ValueError: no step with at least two parts has been seen.
        """
        if not self._found:
            raise ValueError(
                "the meter has seen no step with two or more parts, but must have seen one: accumulate micro-batches, or train "
                "on several ranks"
            )
        return average_estimates(NoiseScale(*torch.stack([*self._found]).cpu().double().numpy().T))

    def remove(self) -> None:
        """Remove the hooks; `read` still returns what was measured."""
        for handle in self._handles:
            handle.remove()

    def __enter__(self) -> NoiseScaleMeter:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def _make_hook(self, param: Tensor) -> Any:
        def note_part(grads: tuple[Tensor, ...]) -> None:
            if param.grad is None:  # the first micro-batch: forget those of a step that was skipped
                self._parts[param].clear()
            self._parts[param].append(_summarize(grads[0]))

        return note_part

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @torch.no_grad()
    def _compare(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        pairs = [(_summarize(param.grad), parts) for param, parts in self._parts.items() if param.grad is not None]
        self._parts = {param: [] for param in self._parts}
        micro_batches = max((len(parts) for _, parts in pairs), default=0)
        ranks = dist.get_world_size(self._group) if dist.is_available() and dist.is_initialized() else 1
        if micro_batches * ranks < 2:
            return
        device = pairs[0][0].device
        # A row for each parameter and micro-batch: the norms and elements of its part and of the whole.
        rows = [torch.cat([part, whole]).to(device) for whole, parts in pairs for part in parts]
        norms, elements, _, whole_elements = torch.stack(rows).unbind(1)
        # A part's own mean gradient, in units of the rank's sum, is its share of this sum times the number of shares.
        sums = torch.stack([micro_batches * norms.square().sum(), (elements * whole_elements).sum()])
        if ranks > 1:
            dist.all_reduce(sums, group=self._group)
            sums /= ranks
        part_square, elements_square = sums
        whole_square, whole_elements_square = torch.stack([whole.to(device) for whole, _ in pairs]).square().sum(0)
        factor = whole_elements_square / elements_square  # 1 unless the gradients were rescaled since `backward`
        estimates = estimate_from_parts(
            part_square,
            whole_square / factor.square(),
            parts=micro_batches * ranks,
            micro_batch_size=self.micro_batch_size,
        )
        loss_scale = 1 if self._scaler is None else self._scaler.scale(torch.ones((), device=device))
        self._found.append(torch.stack(estimates) / loss_scale**2)


def _summarize(grad: Tensor) -> Tensor:
    """Return the norm and one element of a gradient: the middle one, because padding and corners have no gradient."""
    real = view_as_real(grad)
    return torch.stack([torch.linalg.vector_norm(real), real[tuple(size // 2 for size in real.shape)]])
