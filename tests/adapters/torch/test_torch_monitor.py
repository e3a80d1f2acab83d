"""Watching a torch optimizer: what is told, when it looks, where it writes, and that it changes nothing."""

from __future__ import annotations

import copy
import io
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from contract.summaries import check
from drivers.rules import RULES

from vsgd.monitor import Look, Monitor

kinds = pytest.mark.parametrize("kind", RULES)


def problem(kind: str, dtypes: tuple[str, ...] = ("float32",), shapes: Any = ((7, 3), (), (0,), (11,)), **flags: Any) -> Any:
    """A stepped optimizer, and what steps it once more."""
    torch = pytest.importorskip("torch")
    import vsgd.torch

    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.ones(shape, dtype=getattr(torch, dtype))) for dtype in dtypes for shape in shapes]
    optimizer = getattr(vsgd.torch, kind)([{"params": params[:2]}, {"params": params[2:], "prior_strength": 1e-3}], **flags)

    def step() -> None:
        for param in params:
            param.grad = torch.randn(param.shape, dtype=param.dtype, generator=generator)
        optimizer.step()

    return optimizer, params, step


def watch(optimizer: Any, watching: Monitor, named: Any = (), **options: Any) -> Any:
    from vsgd.torch.monitor import watch

    return watch(optimizer, watching, named, **options)


ENGINES = {"fused": {"fused": True}, "foreach": {"foreach": True}, "loop": {"fused": False, "foreach": False}}


@kinds
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtypes", [("float32",), ("float64", "bfloat16"), ("complex64",)], ids="-".join)
@pytest.mark.parametrize("maximize", [False, True])
def test_what_is_seen_is_what_the_posterior_says(kind: str, engine: str, dtypes: tuple[str, ...], maximize: bool) -> None:
    if engine == "fused":
        pytest.importorskip("numba")
    optimizer, params, step = problem(kind, dtypes, **ENGINES[engine], maximize=maximize)
    looks: list[Look] = []
    told: list[Any] = []

    def tell(optimizer: Any, args: Any, kwargs: Any) -> None:
        known = {param: [to_numpy(optimizer.posterior(param))] for param in params}
        told.append((optimizer.noise_scale(batch_size=8), optimizer.surprise(), known))

    for _ in range(3):
        step()
    names = [(f"p{index}", param) for index, param in enumerate(params)]
    with watch(optimizer, Monitor(looks, every=4), names[:-1], batch_size=8):
        step()
        with optimizer.register_step_pre_hook(tell):
            step()
    (seen,), ((scales, surprises, known),) = looks, told
    names[-1] = (str(len(params) - 1), params[-1])  # which was given none
    assert seen.step == 4
    assert set(seen.tensors) == {name for name, param in names if param.numel()}
    for index, (name, param) in enumerate(names):
        if param.numel():
            check(seen.tensors[name], known[param], scales.tensors[index], surprises[index])
    if len(dtypes) == 1:
        sizes = np.array([param.numel() for param in params])
        each = np.array([float(surprises[index]) if param.numel() else 0.0 for index, param in enumerate(params)])
        check(seen.overall, [known[param][0] for param in params], scales.overall, (sizes * each).sum() / sizes.sum())


def to_numpy(known: Any) -> Any:
    return type(known)(*(part.numpy() for part in known))


def test_large_tensors_are_sampled_and_cut_into_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer, params, step = problem("VSGD", shapes=((300, 200), (99,), (50, 400)))
    import vsgd.torch.monitor

    monkeypatch.setattr(vsgd.torch.monitor, "_BLOCK", 25_000)
    looks: list[Look] = []
    for _ in range(2):
        step()
    with watch(optimizer, Monitor(looks, every=2)):
        known = [to_numpy(optimizer.posterior(param)) for param in params]
        scales = optimizer.noise_scale(batch_size=1)
        step()
    for summary, snr in [
        *zip(looks[0].tensors.values(), (each.snr for each in known), strict=True),
        (looks[0].overall, np.concatenate([each.snr.ravel() for each in known])),
    ]:
        for quantile, share in ((summary.snr_10, 0.1), (summary.snr_50, 0.5), (summary.snr_90, 0.9)):
            assert np.mean(snr < quantile) == pytest.approx(share, abs=0.05)
    assert looks[0].overall.noise_trace == pytest.approx(float(scales.overall.trace), rel=1e-5)  # of all elements


def test_a_parameter_without_gradient_has_no_surprise_and_one_without_state_is_left_out() -> None:
    optimizer, params, _ = problem("VSGD", shapes=((3,), (4,), (5,)))
    looks: list[Look] = []
    with watch(optimizer, Monitor(looks, every=1)):
        params[0].grad = params[1].grad = None
        params[2].grad = params[2].detach().clone()
        optimizer.step()  # nothing has state before
        step_without = params[2].grad
        params[2].grad = None
        params[1].grad = params[1].detach().clone()
        optimizer.step()
        params[2].grad = step_without
        params[1].grad = None
        optimizer.step()
    assert [list(each.tensors) for each in looks] == [["2"], ["1", "2"]]
    assert looks[0].tensors["2"].surprise is looks[0].overall.surprise is None
    assert looks[1].tensors["1"].surprise is None
    assert looks[1].tensors["2"].surprise == looks[1].overall.surprise


@pytest.mark.parametrize("engine", ENGINES)
@kinds
def test_watching_changes_no_bit(kind: str, engine: str) -> None:
    if engine == "fused":
        pytest.importorskip("numba")
    torch = pytest.importorskip("torch")
    watched, alone = (problem(kind, **ENGINES[engine]) for _ in range(2))
    looks: list[Look] = []
    with watch(watched[0], Monitor(looks, every=2)):
        for _ in range(7):
            watched[2]()
            alone[2]()
    assert len(looks) == 3
    for one, other in zip(watched[1], alone[1], strict=True):
        assert torch.equal(one, other)
        assert all(torch.equal(value, alone[0].state[other][name]) for name, value in watched[0].state[one].items())


def test_on_the_other_steps_nothing_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer, _, step = problem("VSGD")
    import vsgd.torch.monitor

    reads: list[int] = []
    summarize = vsgd.torch.monitor.summarize
    monkeypatch.setattr(vsgd.torch.monitor, "summarize", lambda step, *rest: reads.append(step) or summarize(step, *rest))
    with watch(optimizer, Monitor(every=5)):
        for _ in range(16):
            step()
    assert reads == [5, 10, 15]


def test_where_no_tensor_has_elements_there_is_nothing_to_see() -> None:
    optimizer, _, step = problem("VSGD", shapes=((0,),))
    looks: list[Look] = []
    with watch(optimizer, Monitor(looks, every=1)):
        for _ in range(3):
            step()
    assert not looks


def test_the_hook_ends_when_removed_and_is_in_no_copy() -> None:
    torch = pytest.importorskip("torch")
    optimizer, _, step = problem("VSGD")
    looks: list[Look] = []
    handle = watch(optimizer, Monitor(looks, every=1))
    step()
    step()
    assert len(looks) == 1
    copied = copy.deepcopy(optimizer)
    saved = io.BytesIO()
    torch.save(optimizer, saved)  # a hook could not be pickled: it is a closure
    saved.seek(0)
    loaded = torch.load(saved, weights_only=False)
    assert not loaded._optimizer_step_pre_hooks
    for other in (copied, loaded):
        for group in other.param_groups:
            for param in group["params"]:
                param.grad = torch.ones_like(param)
        other.step()
    assert len(looks) == 1
    handle.remove()
    step()
    assert len(looks) == 1


def test_a_resumed_run_goes_on_counting() -> None:
    optimizer, _, step = problem("VSGD")
    for _ in range(9):
        step()
    looks: list[Look] = []
    with watch(optimizer, Monitor(looks, every=10)):
        step()
        step()
    assert [each.step for each in looks] == [10]


def test_other_optimizers_and_batch_sizes_are_refused() -> None:
    torch = pytest.importorskip("torch")
    with pytest.raises(TypeError, match="optimizer is SGD, but must be VSGD or ConstantVSGD"):
        watch(torch.optim.SGD([torch.ones(1)], lr=0.1), Monitor())
    with pytest.raises(ValueError, match="batch_size must be"):
        watch(problem("VSGD")[0], Monitor(), batch_size=0)


@pytest.mark.compiler
def test_a_compiled_step_is_watched_too() -> None:
    torch = pytest.importorskip("torch")
    optimizer, _, step = problem("VSGD", shapes=((3,),))
    looks: list[Look] = []
    step()
    compiled = torch.compile(optimizer.step)
    with watch(optimizer, Monitor(looks, every=2)):
        for _ in range(4):
            compiled()
    assert [each.step for each in looks] == [2, 4]
    assert looks[0].tensors["0"].surprise > 0
    torch._dynamo.reset()


def test_tensorboard_reads_what_was_written(tmp_path: Path) -> None:
    if find_spec("tensorboard") is None:
        pytest.skip("tensorboard is not installed")
    pytest.importorskip("torch")
    from torch.utils.tensorboard import SummaryWriter

    optimizer, _, step = problem("VSGD")
    looks: list[Look] = []
    with SummaryWriter(str(tmp_path)) as writer, watch(optimizer, Monitor(looks, writer, every=2)):
        for _ in range(5):
            step()
    scalars = read_tensorboard(tmp_path)
    assert set(scalars) == set(looks[0].scalars())
    assert scalars["snr_50/0"] == [(each.step, pytest.approx(each.tensors["0"].snr_50)) for each in looks]


def read_tensorboard(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    return {tag: [(each.step, each.value) for each in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
