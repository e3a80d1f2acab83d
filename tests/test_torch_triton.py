"""The Triton kernel: interpreted, it is NumPy's step bit for bit; compiled, it moves no byte twice and rounds exactly.

Interpreting must be asked for before Triton is imported, so that each such test runs `tests/torch_interpreted.py`.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("triton")

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import vsgd.numpy
import vsgd.torch
from vsgd import core
from vsgd.backends import torch_engines, torch_triton

RULES = {"VSGD": core.VSGD, "ConstantVSGD": core.CONSTANT_VSGD}
INTERPRETED = ["bits", "alone", "half", "rounded", "capturable", "layouts", "tables"]


@pytest.mark.parametrize("name", INTERPRETED)
def test_interpreted(name: str) -> None:
    script = Path(__file__).with_name("torch_interpreted.py")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, str(script), name], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [name, "passed"]


def compiled(
    folder: Path, kind: str, param: Any, wide: Any, capability: int, *, aligned: bool = True
) -> tuple[Counter[str], int]:
    """How often each PTX instruction stands in the kernel, and how many scalars a step has."""
    rule = RULES[kind]
    types = (param, param, *(wide for _ in rule.state_names))
    count = len(rule.coefficients(1, rule.hyperparameters())) + 2
    constants = {
        "step": torch_triton.Step(rule, maximize=False),
        "types": types,
        "count": count,
        "aligned": aligned,
        "size": torch_triton.CHUNK,
    }
    source = ASTSource(
        torch_triton.kernel,
        signature={"tensors": "*i64", "chunks": "*i64", "scalars": f"*{wide}", **dict.fromkeys(constants, "constexpr")},
        constexprs=constants,
    )
    with triton.knobs.cache.scope():
        triton.knobs.cache.dir = str(folder)
        kernel = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=torch_triton.OPTIONS)
    assert kernel.asm["cubin"]
    return Counter(re.findall(r"^\s*(?:@!?%\w+\s+)?([a-z][\w.:]*)", kernel.asm["ptx"], flags=re.MULTILINE)), count


def moved(instructions: Counter[str], operation: str, *, vectors: bool) -> int:
    """Bytes that a thread's loads or stores move, in vectors or one by one."""
    pattern = re.compile(operation + r"\.global" + (r"\.v(\d)" if vectors else "()") + r"\.[bfsu](\d+)")
    found = ((pattern.fullmatch(name), times) for name, times in instructions.items())
    return sum(int(match[1] or 1) * int(match[2]) // 8 * times for match, times in found if match)


@pytest.mark.parametrize("capability", [80, 90, 120])
@pytest.mark.parametrize(
    ("kind", "param", "wide"),
    [
        ("VSGD", tl.float32, tl.float32),
        ("VSGD", tl.bfloat16, tl.float32),
        ("VSGD", tl.float64, tl.float64),
        ("ConstantVSGD", tl.float32, tl.float32),
    ],
    ids=str,
)
def test_compiled_it_moves_what_it_must_and_rounds_exactly(
    tmp_path: Path, kind: str, param: Any, wide: Any, capability: int
) -> None:
    instructions, scalars = compiled(tmp_path, kind, param, wide, capability)
    threads = 32 * torch_triton.OPTIONS["num_warps"]
    elements = torch_triton.CHUNK // threads
    narrow, state = param.primitive_bitwidth // 8, len(RULES[kind].state_names) * wide.primitive_bitwidth // 8
    read, written = elements * (2 * narrow + state), elements * (narrow + state)
    # A whole chunk in vectors; then, for the end of a tensor, each element by itself. Beside them the table: a chunk's two
    # numbers, a size and a row, an address for each array in either case; and the scalars.
    table = 8 * (2 + 2 + 2 * (2 + len(RULES[kind].state_names))) + scalars * wide.primitive_bitwidth // 8
    assert moved(instructions, "ld", vectors=True) == read
    assert moved(instructions, "ld", vectors=False) == read + table
    assert moved(instructions, "st", vectors=True) == moved(instructions, "st", vectors=False) == written
    assert not [name for name in instructions if re.search(r"shared|fma|approx|full|ftz", name)]
    size = wide.primitive_bitwidth
    assert instructions[f"div.rn.f{size}"] == 2 * elements * (2 if kind == "VSGD" else 1)
    assert instructions[f"sqrt.rn.f{size}"] == 2 * elements
    # Each with its rounding said, which keeps the assembler from contracting them.
    assert not [name for name in instructions if re.fullmatch(r"(add|sub|mul)\.f\d+", name)]
    assert instructions[f"mul.rn.f{size}"]
    if param is tl.bfloat16:
        assert [name for name in instructions if name.startswith("cvt.rn.bf16")]


def test_addresses_that_vectors_cannot_take_are_taken_one_by_one(tmp_path: Path) -> None:
    instructions, _ = compiled(tmp_path, "VSGD", tl.float32, tl.float32, 90, aligned=False)
    assert not [name for name in instructions if re.match(r"(ld|st)\.global\.v", name)]


def test_the_compiler_tells_an_edited_core_from_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(rule: core.Rule, maximize: bool) -> str:
        return str(torch_triton.Step(rule, maximize))

    versions = {version(rule, maximize) for rule in RULES.values() for maximize in (False, True)}
    assert len(versions) == 4
    assert version(core.VSGD, False) in versions
    monkeypatch.setattr("inspect.getsource", lambda module: "another")
    assert version(core.VSGD, False) not in versions


def test_without_triton_fused_on_cuda_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vsgd.backends.torch_triton", None)
    torch_engines._import_fused.cache_clear()
    with pytest.raises(ImportError, match=r"^fused=True on CUDA needs triton: pip install 'triton>=3.6'$"):
        torch_engines.fused_engine({"fused": True, "foreach": None}, "cuda", batches=False)
    assert torch_engines.fused_engine({"fused": None, "foreach": None}, "cuda", batches=False) is None
    torch_engines._import_fused.cache_clear()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("kind", RULES)
def test_on_a_gpu_it_is_numpys_step_bit_for_bit(kind: str, dtype: type) -> None:
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal(size).astype(dtype) for size in (5, 1024, 2500, 100_000)]
    params = [torch.nn.Parameter(torch.from_numpy(array).cuda()) for array in arrays]
    reference = getattr(vsgd.numpy, kind)(arrays, weight_decay=0.1)
    optimizer = getattr(vsgd.torch, kind)(params, weight_decay=0.1, fused=True)
    for _ in range(10):
        grads = [rng.standard_normal(array.shape).astype(dtype) for array in arrays]
        for param, grad in zip(params, grads, strict=True):
            param.grad = torch.from_numpy(grad).cuda()
        reference.step(grads)
        optimizer.step()
    for param, array, state in zip(params, arrays, reference.state, strict=True):
        np.testing.assert_array_equal(param.detach().cpu().numpy(), array)
        for name in RULES[kind].state_names:
            np.testing.assert_array_equal(optimizer.state[param][name].cpu().numpy(), state[name])


@pytest.mark.gpu
def test_later_steps_compile_nothing() -> None:
    params = [torch.nn.Parameter(torch.randn(size, device="cuda")) for size in (3, 5000)]
    optimizer = vsgd.torch.VSGD(params, fused=True)
    counts = []
    for _ in range(3):
        for param in params:
            param.grad = torch.randn_like(param)
        optimizer.param_groups[0]["lr"] *= 0.5
        optimizer.step()
        counts.append(len(torch_triton.kernel.device_caches[torch.cuda.current_device()][0]))
    assert counts[0] == counts[2] > 0
