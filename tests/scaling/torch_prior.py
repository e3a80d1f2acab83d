"""What each rank runs in the test of a prior from sharded gradients."""

from __future__ import annotations

import torch
import torch.distributed as dist
from scaling.torch_problem import mesh_of
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from vsgd.torch import prior_strength_from


def strengths() -> dict[str, float]:
    """The prior strength of the same gradients, whole and placed in every way; shards even, uneven and empty."""
    generator = torch.Generator().manual_seed(0)
    whole = [torch.randn(shape, generator=generator) for shape in ((4, 6), (3, 5), (1,))]
    whole.append(torch.complex(whole[0], whole[0].flip(0)))
    mesh = mesh_of(dist.get_world_size())
    placed = {
        "rows": [distribute_tensor(grad, mesh, [Shard(0)]) for grad in whole],
        "columns": [distribute_tensor(grad, mesh, [Shard(grad.dim() - 1)]) for grad in whole],
        "replicated": [distribute_tensor(grad, mesh, [Replicate()]) for grad in whole],
        "partial": [DTensor.from_local((3, -1)[dist.get_rank()] * grad, mesh, [Partial()]) for grad in whole],
    }
    found = {name: prior_strength_from([grads]) for name, grads in placed.items()}
    return {"whole": prior_strength_from([whole]), "doubled": prior_strength_from([[2 * grad for grad in whole]]), **found}
