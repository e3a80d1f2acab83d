"""State in bfloat16 and parameters in bfloat16, rounded at random."""

from __future__ import annotations

import copy
import io
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from emulation import emulate_step, round_all, words  # noqa: E402
from torch_optimizers import ENGINES, STATE_NAMES, assert_same_state, train  # noqa: E402

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


@optimizers
@engines
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_engine_follows_the_definition(cls: Any, engine: dict[str, Any], dtype: torch.dtype) -> None:
    lr, decay, seed = 0.01, 0.1, 5
    params = make_params(dtype)
    optimizer = cls(params, lr, weight_decay=decay, **engine, state_dtype="bfloat16", stochastic_rounding=True, seed=seed)
    train(optimizer, params, range(1, 21))
    expected_params, expected_states = emulate(cls, 20, dtype, lr, 1 - lr * decay, seed)
    same = total = 0
    for param, expected, states in zip(params, expected_params, expected_states, strict=True):
        for name, state in zip(STATE_NAMES[cls], states, strict=True):
            ours = optimizer.state[param][name]
            assert ours.dtype is torch.bfloat16
            assert ours.shape == param.shape
            same += int((ours.float().numpy().ravel() == state).sum())
            total += state.size
        if dtype is torch.bfloat16:
            same += int((param.detach().float().numpy().ravel() == expected).sum())
            total += expected.size
        # A bfloat16 step of a state, where float32's last bit tips one, moves a float32 parameter by far less than lr.
        np.testing.assert_allclose(param.detach().float().numpy().ravel(), expected, atol=0.2 * lr, rtol=2**-7)
    # Float32's last bit, which each engine rounds in its own order, tips a rounding once in some ten thousand.
    assert same > 0.999 * total


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


def test_a_bfloat16_state_has_six_bytes() -> None:
    param = torch.nn.Parameter(torch.zeros(1000))
    optimizer = VSGD([param], state_dtype="bfloat16")
    train(optimizer, [param], range(1))
    arrays = [value for name, value in optimizer.state[param].items() if name != "step"]
    assert sum(array.nbytes for array in arrays) == 6 * 1000


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64], ids=str)
def test_wide_and_complex_parameters_keep_their_precision(dtype: torch.dtype) -> None:
    params = {stored: torch.nn.Parameter(torch.ones(50, dtype=dtype)) for stored in ("float32", "bfloat16")}
    states = {}
    for stored, param in params.items():
        optimizer = VSGD([param], state_dtype=stored)
        train(optimizer, [param], range(3))
        states[stored] = optimizer.state[param]
    torch.testing.assert_close(states["bfloat16"], states["float32"], rtol=0, atol=0)


@engines
def test_a_resumed_run_is_the_uninterrupted_one(engine: dict[str, Any]) -> None:
    flags = {**engine, "state_dtype": "bfloat16", "stochastic_rounding": True, "seed": 9}
    params = make_params(torch.bfloat16)
    optimizer = VSGD(params, **flags)
    train(optimizer, params, range(5))
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    resumed_params = copy.deepcopy(params)
    resumed = VSGD(resumed_params)
    buffer.seek(0)
    resumed.load_state_dict(torch.load(buffer, weights_only=True))
    for each, of in ((optimizer, params), (resumed, resumed_params)):
        train(each, of, range(5, 10))
    assert_same_state(optimizer, resumed)
    assert optimizer.state[params[0]]["b_g"].dtype is torch.bfloat16
    torch.testing.assert_close(params, resumed_params, rtol=0, atol=0)


def test_seeds_and_parameters_have_noise_of_their_own() -> None:
    tensor = torch.randn(1000)
    ends = []
    for seed in (0, 1):
        params = [torch.nn.Parameter(tensor.clone()) for _ in range(2)]
        optimizer = VSGD(params, state_dtype="bfloat16", seed=seed)
        for _ in range(3):
            for param in params:
                param.grad = tensor.clone()
            optimizer.step()
        ends += [optimizer.state[param]["b_g"] for param in params]
    for index, one in enumerate(ends):
        for other in ends[:index]:
            assert (one == other).float().mean() < 0.9


@engines
def test_a_state_in_bfloat16_follows_a_drop_of_the_noise(engine: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(0)
    params = {name: torch.nn.Parameter(torch.zeros(512)) for name in ("float32", "random", "nearest")}
    optimizers = {
        "float32": VSGD([params["float32"]], lr=0.0, **engine),
        "random": VSGD([params["random"]], lr=0.0, **engine, state_dtype="bfloat16"),
        "nearest": VSGD([params["nearest"]], lr=0.0, **engine),
    }
    for step in range(3000):
        grad = torch.randn(512, generator=generator) * (1.0 if step < 1000 else 0.1)
        for name, param in params.items():
            param.grad = grad.clone()
            optimizers[name].step()
        state = optimizers["nearest"].state[params["nearest"]]
        for name in STATE_NAMES[VSGD]:
            state[name].copy_(state[name].bfloat16())
    b = {name: optimizers[name].state[param]["b_ghat"].float().mean().item() for name, param in params.items()}
    assert b["random"] == pytest.approx(b["float32"], rel=0.02)
    assert b["nearest"] > 1.5 * b["float32"]  # it froze


@engines
def test_a_small_decay_of_bfloat16_parameters_is_not_lost(engine: dict[str, Any]) -> None:
    start = torch.linspace(1.0, 1.9, 4096)
    ends = {}
    for rounds in (False, True):
        param = torch.nn.Parameter(start.bfloat16())
        optimizer = VSGD([param], lr=0.01, weight_decay=0.01, **engine, stochastic_rounding=rounds)  # lr * decay = 1e-4
        for _ in range(100):
            param.grad = torch.zeros_like(param)  # no step of its own
            optimizer.step()
        ends[rounds] = param.detach().double()
    begun = start.bfloat16().double()
    assert torch.equal(ends[False], begun)  # to the nearest, each decay is undone
    # The mean of 4096 elements; each strays by at most 100 roundings of 2**-7, some 0.03 in all.
    assert (ends[True] / begun).mean().item() == pytest.approx((1 - 1e-4) ** 100, abs=0.002)


@pytest.mark.parametrize(("name", "value"), [("state_dtype", "float16"), ("state_dtype", torch.bfloat16), ("seed", 0.5)])
def test_bad_storage_is_refused(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^Invalid {name} value: .* \({name} must be "):
        VSGD([torch.nn.Parameter(torch.zeros(1))], **{name: value})


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
