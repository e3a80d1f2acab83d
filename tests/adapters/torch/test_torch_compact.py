"""State in bfloat16 and parameters in bfloat16, rounded at random."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from adapters.torch.torch_optimizers import ENGINES, train  # noqa: E402
from drivers.emulation import emulate_step, round_all, words  # noqa: E402

from vsgd import core  # noqa: E402
from vsgd.torch import VSGD, ConstantVSGD  # noqa: E402

RULES = {VSGD: core.VSGD, ConstantVSGD: core.CONSTANT_VSGD}
optimizers = pytest.mark.parametrize("cls", [VSGD, ConstantVSGD])
engines = pytest.mark.parametrize("engine", ENGINES, ids=str)
SHAPES = [(70, 30), (33,), (), (300, 300), (0,)]


def make_params(dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def bfloat16(array: np.ndarray) -> np.ndarray:
    """Rounded to the nearest, by torch."""
    return torch.from_numpy(np.array(array)).bfloat16().float().numpy()


def emulate(cls: type, steps: int, dtype: torch.dtype, lr: float, decay: float, seed: int) -> list[Any]:
    """Parameters and states, flat, by NumPy and the definition: the noise is of seed, parameter, step and element."""
    rule = RULES[cls]
    params = [param.detach().float().numpy().ravel().copy() for param in make_params(dtype)]
    states = [
        tuple(bfloat16(np.full(p.shape, v, np.float32)) for v in rule.initial_state(rule.hyperparameters())) for p in params
    ]
    for step in range(1, steps + 1):
        torch_params = make_params(dtype)
        train(torch.optim.SGD(torch_params, lr=0.0), torch_params, range(step, step + 1))
        for number, (param, state, like) in enumerate(zip(params, states, torch_params, strict=True)):
            word = words(seed, number, step, param.shape)
            direction, states[number] = emulate_step(rule, step, like.grad.float().numpy().ravel(), state, word)
            new = core.descend(param, direction, np.float32(lr), np.float32(decay))
            params[number] = round_all([new], word, len(state))[0] if dtype is torch.bfloat16 else new
    return [params, states]


@engines
def test_blocks_and_layouts_have_the_noise_of_their_places(engine: dict[str, Any]) -> None:
    big = torch.randn(3, 70_000)
    views = {"one": big, "transposed": big.t().contiguous().t(), "gapped": torch.randn(3, 140_000)[:, ::2].copy_(big)}
    ends = {}
    for name, tensor in views.items():
        param = torch.nn.Parameter(tensor.clone(memory_format=torch.preserve_format) if name != "gapped" else tensor)
        optimizer = VSGD([param], **engine, state_dtype="bfloat16")
        train(optimizer, [param], range(3))
        ends[name] = optimizer.state[param]
    # The gaps are not in the state: it lies as the first one does.
    share = (ends["one"]["b_g"] == ends["gapped"]["b_g"]).float().mean()
    assert share > 0.999
    # That of the transposed one lies in another order, and is rounded with other noise.
    assert (ends["one"]["b_g"] == ends["transposed"]["b_g"]).float().mean() < 0.9


@pytest.mark.compiler
def test_the_compiled_step_rounds_as_the_eager_one() -> None:
    torch.compiler.reset()
    ends = []
    for compiled in (False, True):
        params = make_params()[:2]
        optimizer = VSGD(params, foreach=False, fused=False, state_dtype="bfloat16")
        step = torch.compile(optimizer.step) if compiled else optimizer.step
        generator = torch.Generator().manual_seed(0)
        for _ in range(5):
            for param in params:
                param.grad = torch.randn(param.shape, generator=generator)
            step()
        ends.append(torch.cat([optimizer.state[param]["b_ghat"].flatten() for param in params]))
    assert (ends[0] == ends[1]).float().mean() > 0.999
