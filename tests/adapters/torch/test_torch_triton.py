"""Test the Triton kernel: interpreted, it equals NumPy's step bit for bit; compiled, it moves no byte twice and rounds exactly.

The interpreter must be enabled before Triton is imported, so `torch_interpreted.py` runs in a separate process.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections import Counter
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("triton", minversion="3.6")

import torch
import triton
import triton.language as tl
from contract.test_compact import share_rounded_otherwise
from drivers import DRIVERS, assert_equal
from drivers.numpy_driver import NumpyDriver
from drivers.processes import run_python
from drivers.rules import RULES
from drivers.torch_driver import TorchDriver
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import vsgd.torch
from vsgd import core, rounding
from vsgd.backends import kernels
from vsgd.backends.torch import dispatch, foreach, fused_cuda, loop

INTERPRETED = triton.knobs.runtime.interpret
#: Where the kernel runs: on a GPU, or interpreted in the process of `torch_interpreted.py`.
DEVICE = "cpu" if INTERPRETED else "cuda"
where_it_runs = (lambda test: test) if INTERPRETED else pytest.mark.gpu


def test_interpreted_it_is_numpys_step() -> None:
    path = str(Path(__file__).with_name("torch_interpreted.py"))
    done = run_python("torch", "-m", "pytest", "-p", "no:cacheprovider", path, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout


def wide(stored: Any) -> Any:
    """Return the arithmetic's dtype for state of this dtype."""
    return tl.float32 if stored is tl.bfloat16 else stored


def compiled(
    folder: Path, kind: str, param: Any, stored: Any, capability: int, *, rounds: bool = False, aligned: bool = True
) -> tuple[Counter[str], int]:
    """Return how often each PTX instruction occurs in the kernel, and how many scalars a step has."""
    rule = RULES[kind]
    types = (param, param, *(stored for _ in rule.state_names))
    count = len(rule.coefficients(1, rule.hyperparameters())) + 3
    constants = {
        "step": fused_cuda.Step(
            rule, round_param=rounds and param is tl.bfloat16, round_state=rounds and stored is tl.bfloat16
        ),
        "types": types,
        "count": count,
        "aligned": aligned,
        "size": fused_cuda.CHUNK,
    }
    pointers = {"tensors": "*i64", "chunks": "*i64", "scalars": f"*{wide(stored)}", "keys": "*i32"}
    if not rounds:
        constants["keys"] = None
    signature = {**pointers, **dict.fromkeys(constants, "constexpr")}
    source = ASTSource(fused_cuda.kernel, signature=signature, constexprs=constants)
    with triton.knobs.cache.scope():
        triton.knobs.cache.dir = str(folder)
        kernel = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=fused_cuda.OPTIONS)
    assert kernel.asm["cubin"]
    return Counter(re.findall(r"^\s*(?:@!?%\w+\s+)?([a-z][\w.:]*)", kernel.asm["ptx"], flags=re.MULTILINE)), count


def moved(instructions: Counter[str], operation: str, *, vectors: bool) -> int:
    """Return the bytes that a thread's loads or stores move, in vectors or one by one."""
    pattern = re.compile(operation + r"\.global" + (r"\.v(\d)" if vectors else "()") + r"\.[bfsu](\d+)")
    found = ((pattern.fullmatch(name), times) for name, times in instructions.items())
    return sum(int(match[1] or 1) * int(match[2]) // 8 * times for match, times in found if match)


@pytest.mark.parametrize("capability", [80, 90, 120])
@pytest.mark.parametrize(
    ("kind", "param", "stored", "rounds"),
    [
        ("VSGD", tl.float32, tl.float32, False),
        ("VSGD", tl.bfloat16, tl.float32, False),
        ("VSGD", tl.float64, tl.float64, False),
        ("VSGD", tl.float32, tl.bfloat16, True),
        ("VSGD", tl.bfloat16, tl.bfloat16, True),
        ("VSGD", tl.bfloat16, tl.float32, True),
        ("ConstantVSGD", tl.float32, tl.float32, False),
        ("ConstantVSGD", tl.float32, tl.bfloat16, True),
    ],
    ids=str,
)
def test_compiled_it_moves_what_it_must_and_rounds_exactly(
    tmp_path: Path, kind: str, param: Any, stored: Any, rounds: bool, capability: int
) -> None:
    instructions, scalars = compiled(tmp_path, kind, param, stored, capability, rounds=rounds)
    size = wide(stored).primitive_bitwidth
    threads = 32 * fused_cuda.OPTIONS["num_warps"]
    elements = fused_cuda.CHUNK // threads
    narrow, state = param.primitive_bitwidth // 8, len(RULES[kind].state_names) * stored.primitive_bitwidth // 8
    read, written = elements * (2 * narrow + state), elements * (narrow + state)
    # The kernel reads a whole chunk in vectors, or, for the end of a tensor, each element separately. It also reads the table:
    # a chunk's two numbers, a size and a row, an address for each array in either case; the scalars; for noise a key and, in
    # either case, a place.
    table = 8 * (2 + 2 + 2 * (2 + len(RULES[kind].state_names))) + scalars * size // 8 + (4 + 2 * 8) * rounds
    assert moved(instructions, "ld", vectors=True) == read
    assert moved(instructions, "ld", vectors=False) == read + table
    assert moved(instructions, "st", vectors=True) == moved(instructions, "st", vectors=False) == written
    assert not [name for name in instructions if re.search(r"shared|fma|approx|full|ftz", name)]
    assert instructions[f"div.rn.f{size}"] == 2 * elements * (2 if kind == "VSGD" else 1)
    assert instructions[f"sqrt.rn.f{size}"] == 2 * elements
    # Each instruction states its rounding, which keeps the assembler from contracting it.
    assert not [name for name in instructions if re.fullmatch(r"(add|sub|mul)\.f\d+", name)]
    assert instructions[f"mul.rn.f{size}"]
    if tl.bfloat16 in (param, stored):
        assert [name for name in instructions if name.startswith("cvt.rn.bf16")]
    # In 32 bits: the hash's two per element, and one per rounded array except the state's first, whose factor is 1.
    factors = (len(RULES[kind].state_names) - 1) * (stored is tl.bfloat16) + (param is tl.bfloat16)
    assert instructions["mul.lo.s32"] == 2 * elements * (2 + factors) * rounds


def test_addresses_that_vectors_cannot_take_are_taken_one_by_one(tmp_path: Path) -> None:
    instructions, _ = compiled(tmp_path, "VSGD", tl.float32, tl.float32, 90, aligned=False)
    assert not [name for name in instructions if re.match(r"(ld|st)\.global\.v", name)]


def test_the_compiler_tells_an_edited_core_from_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(*options: Any) -> str:
        return str(fused_cuda.Step(*options))

    versions = {version(*options) for options in product(RULES.values(), *[(False, True)] * 2)}
    assert len(versions) == 8
    assert version(core.VSGD) in versions
    source_of = inspect.getsource
    assert version(core.VSGD).endswith(kernels.hash_sources(fused_cuda))
    for edited in (core, rounding, fused_cuda):
        monkeypatch.setattr("inspect.getsource", lambda module, edited=edited: source_of(module) + "#" * (module is edited))
        assert not version(core.VSGD).endswith(kernels.hash_sources(fused_cuda))


def test_without_triton_fused_on_cuda_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "vsgd.backends.torch.fused_cuda")
    dispatch._import_fused.cache_clear()
    with pytest.raises(ImportError, match=r"fused step on cuda needs triton 3\.6 or newer, but found none: run pip install"):
        dispatch.load_fused("cuda", required=True)
    with pytest.warns(UserWarning, match="VSGD takes slow steps, because VSGD's fused step on cuda needs triton 3.6"):
        assert dispatch.load_fused("cuda", required=False) is None
    dispatch._import_fused.cache_clear()


def test_an_older_triton_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "__version__", "3.5.1")
    with pytest.raises(ImportError, match=r"needs triton 3\.6 or newer, but found 3\.5\.1"):
        dispatch.check_fused(["cuda"])


@where_it_runs
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("kind", RULES)
def test_it_is_numpys_step_bit_for_bit(kind: str, dtype: str, maximize: bool) -> None:
    rng = np.random.default_rng(0)

    def draw() -> list[np.ndarray]:
        # Shorter than a chunk, empty, whole chunks, and whole chunks with a rest.
        return [rng.standard_normal(size).astype(dtype) for size in (5, 0, 2048, 2500)]

    params = draw()
    ours = TorchDriver(kind, params, device=DEVICE, weight_decay=0.1, fused=True, maximize=maximize)
    reference = NumpyDriver(kind, params, weight_decay=0.1)
    for _ in range(10):
        grads = draw()
        ours.step(grads)
        reference.step([-grad if maximize else grad for grad in grads])
    assert_equal(ours.read(), reference.read())


@where_it_runs
@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", RULES)
def test_it_rounds_as_the_definition_says(kind: str, dtype: str, capturable: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    # Make the kernel take every step.
    monkeypatch.setattr(loop.Loop, "step", None)
    monkeypatch.setattr(foreach.Foreach, "step", None)
    flags = {"fused": True, "device": DEVICE, "capturable": capturable}
    monkeypatch.setitem(DRIVERS, "torch-triton", DRIVERS["torch-fused"]._replace(needs=("torch", "triton"), options=flags))
    assert share_rounded_otherwise("torch-triton", kind, dtype, seed=5) == 0


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
        counts.append(len(fused_cuda.kernel.device_caches[torch.cuda.current_device()][0]))
    assert counts[0] == counts[2] > 0
