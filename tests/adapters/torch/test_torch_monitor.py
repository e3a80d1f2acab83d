"""Test watching a torch optimizer: what the monitor reports, when it looks, where it writes, and that it changes nothing."""

from __future__ import annotations

import copy
import io
from typing import Any

import numpy as np
import pytest
import torch
from adapters.torch.torch_optimizers import assert_same_state, classes, engines, train
from contract.summaries import check
from drivers.torch_driver import to_numpy
from torch.testing import assert_close

import vsgd.torch.monitor
from vsgd.monitor import Look, Monitor
from vsgd.posterior import Posterior
from vsgd.torch import VSGD
from vsgd.torch.monitor import watch


def start(
    cls: Any = VSGD, dtypes: Any = ("float32",), shapes: Any = ((7, 3), (), (0,), (11,)), steps: int = 3, **flags: Any
) -> Any:
    """Return parameters, and their optimizer after some steps."""
    params = [torch.nn.Parameter(torch.ones(shape, dtype=getattr(torch, dtype))) for dtype in dtypes for shape in shapes]
    optimizer = cls([{"params": params[:2]}, {"params": params[2:], "prior_strength": 1e-3}], **flags)
    train(optimizer, params, range(steps))
    return params, optimizer


@classes
@engines
@pytest.mark.parametrize("dtypes", [("float32",), ("float64", "bfloat16"), ("complex64",)], ids="-".join)
@pytest.mark.parametrize("maximize", [False, True])
def test_what_is_seen_is_what_the_posterior_says(
    cls: type, engine: dict[str, Any], dtypes: tuple[str, ...], maximize: bool
) -> None:
    params, optimizer = start(cls, dtypes, **engine, maximize=maximize)
    looks: list[Look] = []
    told: list[Any] = []

    def tell(optimizer: Any, args: Any, kwargs: Any) -> None:
        known = {param: [Posterior(*map(to_numpy, optimizer.posterior(param)))] for param in params}
        told.append((optimizer.noise_scale(batch_size=8), optimizer.surprise(), known))

    names = [(f"p{index}", param) for index, param in enumerate(params)]
    with watch(optimizer, Monitor(looks, every=4), names[:-1], batch_size=8):
        train(optimizer, params, range(3, 4))
        with optimizer.register_step_pre_hook(tell):
            train(optimizer, params, range(4, 5))
    (seen,), ((scales, surprises, known),) = looks, told
    names[-1] = (str(len(params) - 1), params[-1])  # this parameter has no name
    assert seen.step == 4
    assert set(seen.tensors) == {name for name, param in names if param.numel()}
    for index, (name, param) in enumerate(names):
        if param.numel():
            check(seen.tensors[name], known[param], scales.tensors[index], surprises[index])
    if len(dtypes) == 1:
        sizes = np.array([param.numel() for param in params])
        each = np.array([float(surprises[index]) if param.numel() else 0.0 for index, param in enumerate(params)])
        check(seen.overall, [known[param][0] for param in params], scales.overall, (sizes * each).sum() / sizes.sum())


def test_large_tensors_are_sampled_and_cut_into_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    params, optimizer = start(shapes=((300, 200), (99,), (50, 400)), steps=2)
    monkeypatch.setattr(vsgd.torch.monitor, "_BLOCK", 25_000)
    looks: list[Look] = []
    with watch(optimizer, Monitor(looks, every=2)):
        known = [Posterior(*map(to_numpy, optimizer.posterior(param))) for param in params]
        scales = optimizer.noise_scale(batch_size=1)
        optimizer.step()
    for summary, snr in [
        *zip(looks[0].tensors.values(), (each.snr for each in known), strict=True),
        (looks[0].overall, np.concatenate([each.snr.ravel() for each in known])),
    ]:
        for quantile, share in ((summary.snr_10, 0.1), (summary.snr_50, 0.5), (summary.snr_90, 0.9)):
            assert np.mean(snr < quantile) == pytest.approx(share, abs=0.05)
    assert looks[0].overall.noise_trace == pytest.approx(float(scales.overall.trace), rel=1e-5)  # over all elements


def test_what_has_no_gradient_has_no_surprise_and_what_has_no_state_or_elements_is_left_out() -> None:
    params, optimizer = start(shapes=((3,), (4,), (5,), (0,)), steps=0)
    looks: list[Look] = []
    with watch(optimizer, Monitor(looks, every=1)):
        for present in ([3], [2, 3], [1], [2]):  # a look comes before its step
            for index, param in enumerate(params):
                param.grad = torch.ones_like(param) if index in present else None
            optimizer.step()
    assert [list(each.tensors) for each in looks] == [["2"], ["1", "2"]]
    assert looks[0].tensors["2"].surprise is looks[0].overall.surprise is None
    assert looks[1].tensors["1"].surprise is None
    assert looks[1].tensors["2"].surprise == looks[1].overall.surprise


@engines
@classes
def test_watching_reads_the_state_every_so_many_of_its_steps_and_changes_no_bit(
    cls: type, engine: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    (params, watched), (others, alone) = (start(cls, **engine) for _ in range(2))
    reads: list[int] = []
    summarize = vsgd.torch.monitor.summarize
    monkeypatch.setattr(vsgd.torch.monitor, "summarize", lambda step, *rest: reads.append(step) or summarize(step, *rest))
    with watch(watched, Monitor(every=5)):
        train(watched, params, range(3, 16))
    train(alone, others, range(3, 16))
    assert reads == [5, 10, 15]
    assert_close(params, others, rtol=0, atol=0)
    assert_same_state(watched, alone)


def test_the_hook_ends_when_removed_and_is_in_no_copy() -> None:
    params, optimizer = start()
    looks: list[Look] = []
    handle = watch(optimizer, Monitor(looks, every=1))
    optimizer.step()
    assert len(looks) == 1
    saved = io.BytesIO()
    torch.save(optimizer, saved)  # a hook could not be pickled, because it is a closure
    saved.seek(0)
    for other in (copy.deepcopy(optimizer), torch.load(saved, weights_only=False)):
        train(other, [param for group in other.param_groups for param in group["params"]], range(1))
    handle.remove()
    train(optimizer, params, range(1))
    assert len(looks) == 1


def test_other_optimizers_and_batch_sizes_are_refused() -> None:
    with pytest.raises(TypeError, match="optimizer is SGD, but must be VSGD or ConstantVSGD"):
        watch(torch.optim.SGD([torch.ones(1)], lr=0.1), Monitor())
    with pytest.raises(ValueError, match="batch_size must be"):
        watch(start()[1], Monitor(), batch_size=0)


def test_a_look_has_the_loss_of_its_step_and_the_monitor_keeps_no_graph() -> None:
    (param, *_), optimizer = start(steps=0)
    looks: list[Look] = []
    monitor = Monitor(looks, every=2)
    with watch(optimizer, monitor):
        for step in range(5):
            monitor.loss = loss = step * param.sum() / param.sum().detach()
            assert monitor.loss.grad_fn is None
            loss.backward()
            optimizer.step()
    assert [(each.step, each.loss) for each in looks] == [(2, 2.0), (4, 4.0)]


@pytest.mark.compiler
def test_a_compiled_step_is_watched_too() -> None:
    torch.compiler.reset()
    params, optimizer = start(shapes=((3,),), steps=1)
    looks: list[Look] = []
    with watch(optimizer, Monitor(looks, every=2)):
        train(optimizer, params, range(4), torch.compile(optimizer.step))
    assert [each.step for each in looks] == [2, 4]
    assert looks[0].tensors["0"].surprise > 0
