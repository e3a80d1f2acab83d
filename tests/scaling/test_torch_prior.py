"""A prior from sharded gradients is that from whole ones, on every rank."""

from __future__ import annotations

from collections.abc import Callable

import pytest

torch = pytest.importorskip("torch")

if not torch.distributed.is_available():
    pytest.skip("this build of torch has no torch.distributed", allow_module_level=True)

from scaling import torch_prior  # noqa: E402
from scaling.ranks import Ranks  # noqa: E402


def test_a_prior_strength_is_that_of_the_whole_gradients(ranks: Callable[[int], Ranks], agreed: Callable[..., None]) -> None:
    one, other = ranks(2).run(torch_prior.strengths)
    assert one == other
    for name in ("rows", "columns", "replicated"):
        # Sums of 24 numbers in another order.
        agreed("prior_strength_from, sharded gradients", "torch, 2 processes", abs(one[name] / one["whole"] - 1), 5e-7)
    # 3 and -1 times a gradient are twice it: what is a part of a sum is summed before it is squared.
    agreed("prior_strength_from, partial gradients", "torch, 2 processes", abs(one["partial"] / one["doubled"] - 1), 5e-7)
