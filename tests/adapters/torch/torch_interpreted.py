"""The Triton kernel in Triton's interpreter: with `TRITON_INTERPRET=1`, `python torch_interpreted.py [NAME ...]` runs checks.

Prints, as JSON, what became of each: "passed", or the traceback.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Sequence
from itertools import product
from typing import Any
from unittest import mock

import numpy as np
import torch
from adapters.torch.test_torch_compact import emulate, make_params
from adapters.torch.torch_optimizers import train
from drivers.emulation import ROUND, WORD
from drivers.rules import RULES

import vsgd.numpy
import vsgd.torch
import vsgd.torch.optimizer
from vsgd import core, rounding
from vsgd.backends.torch import dispatch, foreach, fused_cuda, loop
from vsgd.backends.torch.leaves import Leaf, Noise, StepOptions, get_arithmetic_dtype, list_tensors

# Shorter than a chunk, none at all, whole chunks, and whole chunks with a rest.
SIZES = (5, 0, 2048, 2500)
DECAY = 1 - 0.01 * 0.1
ENGINE = fused_cuda.FusedCuda()


def options(rule: core.Rule, lr: float = 0.01, weight_decay: float = 0.1, **others: Any) -> StepOptions:
    return StepOptions(rule, rule.hyperparameters(), lr, weight_decay, **others)


def leaves_of(rule: core.Rule, params: Sequence[torch.Tensor], grad_dtype: torch.dtype | None = None) -> list[Leaf]:
    """The parameters with gradients of zero and the state of the start."""
    values = rule.initial_state(rule.hyperparameters())
    wide = [torch.promote_types(param.dtype, torch.float32) for param in params]
    return [
        Leaf(param, torch.zeros_like(param, dtype=grad_dtype), tuple(torch.full_like(param, v, dtype=dtype) for v in values))
        for param, dtype in zip(params, wide, strict=True)
    ]


def same(one: torch.Tensor, other: torch.Tensor) -> None:
    """Equal in every bit, but that 0 is -0."""
    torch.testing.assert_close(one, other, rtol=0, atol=0)


def feed(leaves: Sequence[Leaf], rng: np.random.Generator) -> None:
    for leaf in leaves:
        leaf.grad.copy_(torch.from_numpy(rng.standard_normal(leaf.param.shape)))


def numpy_step(rule: core.Rule, leaf: Leaf, count: int, lr: float = 0.01, decay: float = DECAY) -> Leaf:
    """The core on NumPy's arrays, rounded to the leaf's dtypes: torch's own roots on the CPU are not exact."""
    c = rule.coefficients(count, rule.hyperparameters())
    param, grad, *state = (tensor.to(get_arithmetic_dtype(leaf)).numpy() for tensor in list_tensors(leaf))
    direction, new_state = rule.make_update(np)(grad, tuple(state), c)
    new = [*new_state, core.descend(param, direction, lr, decay)]
    if leaf.noise is not None:
        place = leaf.state[0].storage_offset() - leaf.noise.origin + np.arange(param.size)
        word = WORD(place.astype(np.int32), np.int32(rounding.host_key(leaf.noise.key, count)))
        chosen = [*(array.dtype is torch.bfloat16 for array in leaf.state), leaf.noise.round_param]
        new = [
            ROUND(x, word, m) if at_random else x for x, m, at_random in zip(new, rounding.MULTIPLIERS, chosen, strict=False)
        ]
    *arrays, stepped = (torch.from_numpy(x).to(old.dtype) for x, old in zip(new, (*leaf.state, leaf.param), strict=True))
    return Leaf(stepped, leaf.grad, tuple(arrays))


def bits() -> None:
    """Every bit of NumPy's step, in both precisions, up and down, also where addresses allow no vectors."""
    for kind, rule in RULES.items():
        for dtype in (torch.float32, torch.float64):
            for maximize in (False, True):
                rng = np.random.default_rng(0)
                memory = [torch.from_numpy(rng.standard_normal(size + 1)).to(dtype) for size in SIZES]
                params = [tensor[1:] if i % 2 else tensor[:-1] for i, tensor in enumerate(memory)]
                arrays = [param.numpy().copy() for param in params]
                reference = getattr(vsgd.numpy, kind)(arrays, weight_decay=0.1)
                leaves = leaves_of(rule, params)
                assert all(map(ENGINE.accepts, leaves))
                for count in (1, 2, 3):
                    feed(leaves, rng)
                    reference.step([(-leaf.grad if maximize else leaf.grad).numpy() for leaf in leaves])
                    ENGINE.step(leaves, count, options(rule, maximize=maximize))
                for leaf, array, state in zip(leaves, arrays, reference.state, strict=True):
                    for ours, theirs in zip((leaf.param, *leaf.state), (array, *map(state.get, rule.state_names)), strict=True):
                        same(ours, torch.from_numpy(theirs))


def alone() -> None:
    """Memory beside the tensors, and the gradients, stay as they are."""
    memory = torch.full((6, 3000), 7.0)
    param, grad, *state = (row[100:2700] for row in memory[:5])
    ENGINE.step([Leaf(param, grad, tuple(state))], 1, options(core.VSGD, 0.1, 0.0))
    assert (param != 7).all()
    assert (memory[1] == 7).all()
    for row in memory:
        assert (row[:100] == 7).all()
        assert (row[2700:] == 7).all()


def half() -> None:
    """Half precision, beside gradients of another dtype: float32 inside, one rounding of the parameter."""
    for dtype, grad_dtype in ((torch.float16, None), (torch.bfloat16, None), (torch.bfloat16, torch.float32)):
        # The interpreter cuts bfloat16 off, by less than a unit in the last place, where a GPU rounds.
        bound = 2**-7 if dtype is torch.bfloat16 else 0
        rng = np.random.default_rng(1)
        params = [torch.from_numpy(rng.standard_normal(size)).to(dtype) for size in SIZES]
        leaves = leaves_of(core.VSGD, params, grad_dtype)
        for count in (1, 2, 3):
            feed(leaves, rng)
            expected = [numpy_step(core.VSGD, leaf, count) for leaf in leaves]
            ENGINE.step(leaves, count, options(core.VSGD))
            for leaf, (param, _, state, _) in zip(leaves, expected, strict=True):
                torch.testing.assert_close(leaf.param, param, rtol=bound, atol=0)
                for ours, theirs in zip(leaf.state, state, strict=True):
                    same(ours, theirs)


def rounded() -> None:
    """State and parameters rounded at random, each by the definition, wherever a shard begins, beside what is not rounded."""
    kinds = [
        (torch.float32, torch.bfloat16, False),
        (torch.float16, torch.bfloat16, False),
        (torch.bfloat16, torch.bfloat16, True),
        (torch.bfloat16, torch.float32, True),
        (torch.float32, torch.float32, None),
    ]
    for rule in RULES.values():
        rng = np.random.default_rng(4)
        leaves = []
        for dtype, stored, of_param in kinds:
            params = [torch.from_numpy(rng.standard_normal(size)).to(dtype) for size in SIZES]
            for number, leaf in enumerate(leaves_of(rule, params)):
                # Within a larger array, and one that lies beyond what 32 bits count.
                state = [torch.nn.functional.pad(array.to(stored), (number, 0))[number:] for array in leaf.state]
                noise = (
                    None
                    if of_param is None
                    else Noise(rounding.base_key(0, number), number - (0, 0, 777, 2**31 - 1000)[number], of_param)
                )
                leaves.append(Leaf(leaf.param, leaf.grad, tuple(state), noise))
        assert all(map(ENGINE.accepts, leaves))
        for count in (1, 2, 3):
            feed(leaves, rng)
            expected = [numpy_step(rule, leaf, count) for leaf in leaves]
            ENGINE.step(leaves, count, options(rule))
            for leaf, (param, _, state, _) in zip(leaves, expected, strict=True):
                for ours, theirs in zip((leaf.param, *leaf.state), (param, *state), strict=True):
                    same(ours, theirs)


def compact() -> None:
    """Through the adapter, every bit of what NumPy and the definition of the rounding say."""
    _run_on_the_cpu()
    # So that the kernel takes every step.
    with mock.patch.object(loop.Loop, "step", None), mock.patch.object(foreach.Foreach, "step", None):
        _compact_equals_the_definition()


def _compact_equals_the_definition() -> None:
    for kind, rule in RULES.items():
        cls = getattr(vsgd.torch, kind)
        for dtype in (torch.float32, torch.bfloat16):
            params = make_params(dtype)
            optimizer = cls(
                params, 0.01, weight_decay=0.1, fused=True, state_dtype="bfloat16", stochastic_rounding=True, seed=5
            )
            train(optimizer, params, range(1, 4))
            expected, states = emulate(cls, 3, dtype, 0.01, DECAY, seed=5)
            for param, array, arrays in zip(params, expected, states, strict=True):
                for name, values in zip(rule.state_names, arrays, strict=True):
                    same(optimizer.state[param][name].float().flatten(), torch.from_numpy(values))
                same(param.detach().float().flatten(), torch.from_numpy(array))


def capturable() -> None:
    """Counts and step size as tensors, each parameter with its own count."""
    _run_on_the_cpu()
    for kind, rule in RULES.items():
        for stored, lr in product(("float32", "bfloat16"), (0.02, torch.tensor(0.02, dtype=torch.float64))):
            rng = np.random.default_rng(2)
            params = [torch.nn.Parameter(torch.from_numpy(rng.standard_normal(size))) for size in (5, 2500)]
            params += [torch.nn.Parameter(torch.from_numpy(rng.standard_normal(size)).float()) for size in (3, 2500)]
            twins = [torch.nn.Parameter(param.detach().clone()) for param in params]
            flags = {"weight_decay": 0.1, "state_dtype": stored, "seed": 3}
            optimizer = getattr(vsgd.torch, kind)(params, lr, capturable=True, fused=True, **flags)
            eager = getattr(vsgd.torch, kind)(twins, 0.02, foreach=False, **flags)
            for t in range(4):
                for i, (param, twin) in enumerate(zip(params, twins, strict=True)):
                    # Of each dtype one is unfrozen late, so that its count is another.
                    unfrozen = i in (0, 3) or t > 1
                    param.grad = torch.from_numpy(rng.standard_normal(param.shape)).to(param.dtype) if unfrozen else None
                    twin.grad = param.grad
                optimizer.step()
                eager.step()
            assert [optimizer.state[param]["step"].item() for param in params] == [4, 2, 2, 4]
            for param, twin in zip(params, twins, strict=True):
                bound = 1e-13 if param.dtype is torch.float64 else 1e-6  # powers are torch's, or Python's
                if param.dtype is torch.float32 and stored == "bfloat16":
                    # A last bit tips a rounding, if hardly ever: the parameter then goes another way.
                    for name in rule.state_names:
                        assert (optimizer.state[param][name] == eager.state[twin][name]).float().mean() > 0.999
                    bound = 0.2 * 0.02
                torch.testing.assert_close(param, twin, rtol=bound, atol=bound)


def layouts() -> None:
    """Through the adapter: the kernel takes dense layouts and complex numbers, another engine the rest."""
    _run_on_the_cpu()
    rng = np.random.default_rng(3)
    values = [rng.standard_normal(shape) for shape in ((4, 3, 2, 2), (6, 7), (5,))]
    params = [
        torch.from_numpy(values[0]).to(memory_format=torch.channels_last),
        torch.from_numpy(values[1])[:, ::2],
        torch.view_as_complex(torch.from_numpy(rng.standard_normal((5, 2)))),
    ]
    taken: list[int] = []
    step = fused_cuda.FusedCuda.step

    def spy(self: Any, leaves: Sequence[Leaf], *arguments: Any) -> None:
        taken.append(len(leaves))
        step(self, leaves, *arguments)

    fused_cuda.FusedCuda.step = spy
    twins = [torch.nn.Parameter(param.clone()) for param in params]
    params = [torch.nn.Parameter(param) for param in params]
    optimizer, eager = vsgd.torch.VSGD(params, fused=True), vsgd.torch.VSGD(twins, foreach=False)
    for _ in range(3):
        for param, twin in zip(params, twins, strict=True):
            param.grad = torch.randn_like(param)
            twin.grad = param.grad.clone()
        optimizer.step()
        eager.step()
    assert taken == [2, 2, 2]
    torch.testing.assert_close(params, twins)


def tables() -> None:
    """Tables are kept while addresses stay, whatever else changes, and no longer."""
    old = leaves = leaves_of(core.VSGD, [torch.ones(5), torch.ones(2500)])
    kept, lengths = fused_cuda._make_cached_table, fused_cuda._make_cached_chunks
    kept.cache_clear()
    lengths.cache_clear()
    for count, (hits, misses) in enumerate([(0, 1), (1, 1), (2, 1), (2, 2), (3, 2)], start=1):
        if count == 4:  # gradients elsewhere, while the old ones keep their memory
            leaves = [leaf._replace(grad=torch.zeros_like(leaf.grad)) for leaf in old]
        feed(leaves, np.random.default_rng(count))
        lr = 0.1 / count
        expected = [numpy_step(core.VSGD, leaf, count, lr, 1 - lr * 0.1).param for leaf in leaves]
        ENGINE.step(leaves, count, options(core.VSGD, lr))
        assert kept.cache_info()[:2] == (hits, misses)
        assert lengths.cache_info()[:2] == (count - 1, 1)
        for leaf, param in zip(leaves, expected, strict=True):
            same(leaf.param, param)


def _run_on_the_cpu() -> None:
    dispatch.FUSED["cpu"] = dispatch.FUSED["cuda"]
    vsgd.torch.optimizer._get_capturable_supported_devices = lambda: ["cpu"]


CHECKS = {check.__name__: check for check in (bits, alone, half, rounded, compact, capturable, layouts, tables)}


def _outcome(name: str) -> str:
    try:
        # The interpreter computes beyond the end of a tensor, too, where all is 0.
        with np.errstate(invalid="ignore", divide="ignore"):
            CHECKS[name]()
    except Exception:
        return traceback.format_exc()
    return "passed"


if __name__ == "__main__":
    print(json.dumps({name: _outcome(name) for name in sys.argv[1:] or CHECKS}))
