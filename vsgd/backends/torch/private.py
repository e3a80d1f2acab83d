"""Names of torch that are private or missing in older versions, with replacements, for torch 2.6 and newer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer, optimizer

try:
    from torch._C._dynamo.guards import TensorGuards
except ImportError:
    # Plans then look at each tensor themselves.
    TensorGuards = None  # type: ignore[assignment,misc]

__all__ = [
    "TensorGuards",
    "check_graph_capture",
    "choose_count_dtype",
    "get_storage_offset",
    "list_capturable_devices",
    "locate_shard",
    "make_0d",
    "run_with_grad_mode",
]


#: A decorator of `step`, in which gradients are on if the optimizer's first group is differentiable.
run_with_grad_mode: Callable[..., Any] = getattr(optimizer, "_use_grad_for_differentiable", torch.no_grad())


def check_graph_capture(self: Optimizer) -> None:
    """Warn of a step in a CUDA graph that is not capturable."""
    for name in ("_accelerator_graph_capture_health_check", "_cuda_graph_capture_health_check"):  # the second up to torch 2.10
        check = getattr(self, name, None)
        if check is not None:
            check()
            return


def list_capturable_devices() -> list[str]:
    """Return the types of devices with graphs."""
    find: Callable[[], list[str]] | None = getattr(optimizer, "_get_capturable_supported_devices", None)
    return ["cuda"] if find is None else find()


def choose_count_dtype() -> torch.dtype:
    """Return the dtype of step counts."""
    return torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32


def make_0d(value: Any) -> Any:
    """Return a tensor of one element without its dimensions; anything else as it is."""
    return value.squeeze() if isinstance(value, Tensor) and value.dim() != 0 else value


def get_storage_offset(tensor: Tensor) -> int:
    """Return where a tensor begins in its storage; 0 for all tensors of a compiled step, which cuts none into blocks."""
    # The compiler of torch 2.11 cannot trace the call.
    return 0 if torch.compiler.is_compiling() else int(tensor.storage_offset())


def locate_shard(array: Any) -> tuple[Sequence[int], Sequence[int]]:
    """Return the shape of a `DTensor`'s local part, and its first indices in the whole tensor."""
    # At the call, because a build of torch may lack `torch.distributed`.
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    place: tuple[Sequence[int], Sequence[int]] = compute_local_shape_and_global_offset(
        array.shape, array.device_mesh, array.placements
    )
    return place
