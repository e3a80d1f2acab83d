"""Test the Triton kernel in Triton's interpreter: `TRITON_INTERPRET=1 pytest torch_interpreted.py`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from adapters.torch.test_torch_engines import train_assorted
from adapters.torch.test_torch_triton import test_it_is_numpys_step_bit_for_bit, test_it_rounds_as_the_definition_says
from adapters.torch.torch_optimizers import classes
from drivers.rules import RULES
from drivers.torch_driver import TorchDriver

from vsgd import core, rounding
from vsgd.backends.torch import dispatch, fused_cuda, loop
from vsgd.backends.torch.leaves import Leaf, Noise, StepOptions
from vsgd.torch import VSGD

__all__ = ["test_it_is_numpys_step_bit_for_bit", "test_it_rounds_as_the_definition_says"]

kinds = pytest.mark.parametrize("kind", RULES)


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(dispatch.FUSED, "cpu", dispatch.FUSED["cuda"])
    monkeypatch.setattr("vsgd.torch.optimizer.list_capturable_devices", lambda: ["cpu"])
    # The interpreter also computes beyond the end of a tensor, where all values are 0.
    with np.errstate(invalid="ignore", divide="ignore"):
        yield


@pytest.mark.parametrize("first", [100, 101])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_alone(dtype: torch.dtype, first: int) -> None:
    """At any address, gradients and the memory around the tensors stay unchanged; a place beyond 32 bits has its noise."""
    rows = torch.rand(6, 3000, generator=torch.Generator().manual_seed(0)).to(dtype)
    after = []
    for engine in (fused_cuda.FusedCuda(), loop.Loop()):
        memory = rows.clone()
        param, grad, *state = (row[first:2700] for row in memory[:5])
        noise = Noise(rounding.base_key(0, 3), state[0].storage_offset() - (2**31 - 1000), True)
        grad = grad.float() if first % 2 else grad  # the gradient may have another dtype
        leaf = Leaf(param, grad, tuple(state), noise if dtype is torch.bfloat16 else None)
        assert engine.accepts(leaf)
        engine.step([leaf], 1, StepOptions(core.VSGD, core.VSGD.hyperparameters(), 0.1, 0.1))
        after.append(memory)
    changed = torch.zeros_like(rows, dtype=torch.bool)
    changed[[0, 2, 3, 4], first:2700] = True
    assert torch.equal(after[0][~changed], rows[~changed])
    # Torch's own roots on the CPU are not exact, which very rarely changes a rounding.
    torch.testing.assert_close(*after, rtol=2**-7 if dtype is torch.bfloat16 else 1e-6, atol=1e-6)
    assert dtype is torch.float32 or (after[0] == after[1]).float().mean() > 0.999


@pytest.mark.parametrize("lr", [0.02, torch.tensor(0.02, dtype=torch.float64)])
@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
@kinds
def test_capturable(kind: str, stored: str, lr: Any) -> None:
    """Counts and step size are tensors, and each parameter has its own count."""
    rng = np.random.default_rng(2)
    dtypes = (np.float64, np.float64, np.float32, np.float32)
    arrays = [rng.standard_normal(size).astype(dtype) for size, dtype in zip((5, 2500, 3, 2500), dtypes, strict=True)]
    flags: dict[str, Any] = {"weight_decay": 0.1, "state_dtype": stored, "seed": 3}
    ours = TorchDriver(kind, arrays, lr=lr, capturable=True, fused=True, **flags)
    eager = TorchDriver(kind, arrays, lr=0.02, foreach=False, **flags)
    for t in range(4):
        # One parameter of each dtype is unfrozen late, so that its count differs.
        grads = [rng.standard_normal(len(array)) if i in (0, 3) or t > 1 else None for i, array in enumerate(arrays)]
        ours.step(grads)
        eager.step(grads)
    assert [ours.optimizer.state[param]["step"].item() for param in ours.params] == [4, 2, 2, 4]
    for found, expected in zip(ours.read(), eager.read(), strict=True):
        param, theirs = found.pop("param"), expected.pop("param")
        bound = 1e-13 if param.dtype == np.float64 else 1e-6  # powers are torch's, or Python's
        if param.dtype == np.float32 and stored == "bfloat16":
            # A last bit very rarely changes a rounding, and the parameter then takes another path.
            assert all((found[name] == expected[name]).mean() > 0.999 for name in found)
            bound = 0.2 * 0.02
        np.testing.assert_allclose(param, theirs, rtol=bound, atol=bound)


@classes
def test_layouts(cls: type) -> None:
    """Through the adapter, the kernel steps dense layouts and complex numbers, and another engine the rest."""
    with mock.patch.object(fused_cuda.FusedCuda, "step", autospec=True, side_effect=fused_cuda.FusedCuda.step) as step:
        params, _ = train_assorted(cls, fused=True)
    others, _ = train_assorted(cls, foreach=False)
    del params[7], others[7]  # in bfloat16, which the interpreter truncates
    torch.testing.assert_close(params, others)
    taken = {tuple(leaf.param.shape) for call in step.call_args_list for leaf in call.args[1]}
    assert taken >= {(4, 3, 5, 5), (5, 2, 2)}  # channels last; complex
    assert (6, 4) not in taken  # with gaps


def test_tables() -> None:
    """Tables are kept exactly as long as the addresses stay the same, whatever else changes."""
    params, others = ([torch.nn.Parameter(torch.ones(size)) for size in (5, 2500)] for _ in range(2))
    optimizer, loops = VSGD(params, fused=True), VSGD(others, foreach=False)
    kept, lengths = fused_cuda._make_cached_table, fused_cuda._make_cached_chunks
    kept.cache_clear()
    lengths.cache_clear()
    old = grads = [torch.zeros_like(param) for param in params]
    for count, (hits, misses) in enumerate([(0, 1), (1, 1), (2, 1), (2, 2), (3, 2)], start=1):
        if count == 4:  # gradients elsewhere, while the old ones keep their memory
            grads = [torch.zeros_like(grad) for grad in old]
        for param, other, grad in zip(params, others, grads, strict=True):
            param.grad = other.grad = grad.normal_(generator=torch.Generator().manual_seed(count))
        for each in (optimizer, loops):
            each.param_groups[0]["lr"] = 0.1 / count
            each.step()
        torch.testing.assert_close(params, others)
        assert kept.cache_info()[:2] == (hits, misses)
        assert lengths.cache_info()[:2] == (count - 1, 1)
