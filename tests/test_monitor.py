"""The monitor: what it tells equals what the posterior says, when it looks, where it writes, and that it changes nothing."""

from __future__ import annotations

import copy
import csv
import io
import math
from collections import deque
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vsgd import core, monitor
from vsgd.monitor import SAMPLE, CsvFile, Look, Monitor, Summary

KINDS = {"VSGD": core.VSGD, "ConstantVSGD": core.CONSTANT_VSGD}
kinds = pytest.mark.parametrize("kind", KINDS)


def look(step: int, trace: float = 8.0, norm: float = 4.0, surprise: float | None = None) -> Look:
    summary = Summary(0.25, 1.0, 2.0, 3.0, trace, norm, surprise)
    return Look(step, summary, {"a/b": summary._replace(gain=0.5)})


def test_it_looks_every_so_many_steps() -> None:
    every = Monitor(every=4)
    assert [step for step in range(10) if every.due(step)] == [4, 8]
    # In leaps, one look for each leap over a multiple.
    assert [step for step in range(0, 20, 3) if every.due(step, taken=3)] == [6, 9, 12, 18]


def test_trace_and_squared_norm_are_averaged_apart() -> None:
    traces, norms = np.array([8.0, 2.0, 5.0]), np.array([4.0, -1.0, 3.0])
    smoothing = Monitor(every=1, smoothing=0.5)
    told = [smoothing.record(look(step, *pair)) for step, pair in enumerate(zip(traces, norms, strict=True))]
    for count in (1, 2, 3):
        weights = 0.5 ** np.arange(count)[::-1]
        for summary in (told[count - 1].overall, told[count - 1].tensors["a/b"]):
            assert summary.noise_trace == pytest.approx(np.average(traces[:count], weights=weights))
            assert summary.noise_squared_norm == pytest.approx(np.average(norms[:count], weights=weights))
            assert summary.noise_scale == pytest.approx(summary.noise_trace / summary.noise_squared_norm)


def test_of_no_gradient_at_all_the_noise_scale_is_infinite() -> None:
    assert look(1, norm=0.0).overall.noise_scale == math.inf


class Logger:
    def __init__(self) -> None:
        self.logged: list[Any] = []

    def log(self, values: dict[str, float], step: int) -> None:
        self.logged.append((step, values))


class Writer:
    def __init__(self) -> None:
        self.written: list[Any] = []

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        self.written.append((tag, value, step))


def test_every_sink_gets_what_was_seen(tmp_path: Path) -> None:
    looks: deque[Look] = deque(maxlen=1)
    logger, writer, path = Logger(), Writer(), tmp_path / "gradients.csv"
    told = Monitor(looks, logger, writer, path)
    told.record(look(10, surprise=1.5))
    told.record(look(20, surprise=2.5))
    assert list(looks) == [look(20, surprise=2.5)]
    step, values = logger.logged[0]
    assert step == 10
    assert (values["gain/overall"], values["gain/a/b"], values["momentum/a/b"], values["surprise/overall"]) == (
        0.25,
        0.5,
        0.5,
        1.5,
    )
    assert len(values) == 18
    assert writer.written[:18] == [(tag, value, 10) for tag, value in values.items()]
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["step"], row["tensor"]) for row in rows] == [
        ("10", "overall"),
        ("10", "a/b"),
        ("20", "overall"),
        ("20", "a/b"),
    ]
    assert {key: float(value) for key, value in rows[1].items() if key not in ("step", "tensor")} == {
        "gain": 0.5, "momentum": 0.5, "snr_10": 1.0, "snr_50": 2.0, "snr_90": 3.0,
        "noise_trace": 8.0, "noise_squared_norm": 4.0, "noise_scale": 2.0, "surprise": 1.5,
    }  # fmt: skip


def test_a_csv_file_goes_on_and_leaves_empty_what_is_not_known(tmp_path: Path) -> None:
    path = tmp_path / "gradients.csv"
    for step in (1, 2):  # as a resumed run
        CsvFile(path).append(look(step))
    rows = list(csv.DictReader(io.StringIO(path.read_text())))
    assert [(row["step"], row["surprise"]) for row in rows] == [("1", ""), ("1", ""), ("2", ""), ("2", "")]
    assert "surprise/overall" not in look(1).scalars()


def test_bad_arguments_are_refused() -> None:
    for every in (0, -1, 2.5):
        with pytest.raises(ValueError, match="every is"):
            Monitor(every=every)  # type: ignore[arg-type]
    for smoothing in (1.0, -0.1, math.nan):
        with pytest.raises(ValueError, match="smoothing is"):
            Monitor(smoothing=smoothing)
    with pytest.raises(TypeError, match="a sink is int, but must be"):
        Monitor(3)


def test_samples_are_evenly_spread_over_rows_and_columns() -> None:
    assert monitor.spread(SAMPLE).tolist() == list(range(SAMPLE))
    for columns in (2, 64, 1000, 1024):
        places = monitor.spread(1024 * columns)
        assert len(set(places)) == SAMPLE
        shares = np.histogram(places % columns, bins=2)[0] / SAMPLE
        np.testing.assert_allclose(shares, 0.5, atol=0.02)


# The torch adapter.


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
    from vsgd.torch_monitor import watch

    return watch(optimizer, watching, named, **options)


def check(found: Summary, posteriors: list[Any], scale: Any, surprise: float | None) -> None:
    """Against what the adapter's doors say."""
    gains, snrs = (np.concatenate([np.ravel(getattr(each, field)) for each in posteriors]) for field in ("gain", "snr"))
    if np.iscomplexobj(gains):
        gains, snrs = (each.view(each.real.dtype) for each in (gains, snrs))
    assert found.gain == pytest.approx(np.median(gains), rel=1e-5)
    assert found.momentum == pytest.approx(1 - np.median(gains), rel=1e-5)
    np.testing.assert_allclose((found.snr_10, found.snr_50, found.snr_90), np.quantile(snrs, (0.1, 0.5, 0.9)), rtol=1e-5)
    assert found.noise_trace == pytest.approx(float(scale.trace), rel=1e-5)
    assert found.noise_squared_norm == pytest.approx(float(scale.squared_norm), rel=1e-4, abs=1e-5)
    assert found.surprise == (None if surprise is None else pytest.approx(float(surprise), rel=1e-5))


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
    for name, param in names:
        if param.numel():
            check(seen.tensors[name], known[param], scales.tensors[param], surprises[param])
    if len(dtypes) == 1:
        sizes = np.array([param.numel() for param in params])
        each = np.array([float(surprises[param]) if param.numel() else 0.0 for param in params])
        check(seen.overall, [known[param][0] for param in params], scales.overall, (sizes * each).sum() / sizes.sum())


def to_numpy(known: Any) -> Any:
    return type(known)(*(part.numpy() for part in known))


def test_large_tensors_are_sampled_and_cut_into_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer, params, step = problem("VSGD", shapes=((300, 200), (99,), (50, 400)))
    import vsgd.torch_monitor

    monkeypatch.setattr(vsgd.torch_monitor, "_BLOCK", 25_000)
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
    import vsgd.torch_monitor

    reads: list[int] = []
    summarize = vsgd.torch_monitor.summarize
    monkeypatch.setattr(vsgd.torch_monitor, "summarize", lambda step, *rest: reads.append(step) or summarize(step, *rest))
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


# The optax adapter.


@kinds
@pytest.mark.parametrize("dtype", ["float32", "complex64"])
def test_an_optax_state_tells_what_its_posterior_says(kind: str, dtype: str) -> None:
    jax = pytest.importorskip("jax")
    optax = pytest.importorskip("optax")
    import vsgd.optax as ours
    from vsgd.optax_monitor import summarize

    make: Callable[..., Any] = {"VSGD": ours.vsgd, "ConstantVSGD": ours.constant_vsgd}[kind]
    rng = np.random.default_rng(0)
    shapes = {"layer": [(3, 4), ()], "head": (5,)}

    imaginary = 1j if dtype == "complex64" else 0

    def draw() -> Any:
        def one(shape: Any) -> Any:
            return jax.numpy.asarray(rng.standard_normal(shape) + imaginary * rng.standard_normal(shape), dtype)

        return jax.tree.map(one, shapes, is_leaf=lambda node: isinstance(node, tuple))

    params = draw()
    labels = {"layer": ["a", "a"], "head": "b"}
    solver = optax.multi_transform({"a": make(0.1), "b": optax.chain(optax.identity(), make(0.1))}, labels)
    state = solver.init(params)
    for _ in range(3):
        _, state = solver.update(draw(), state, params)
    grads = draw()
    seen = summarize(3, state, grads, batch_size=8)
    known, scales, surprises = ours.posterior(state), ours.noise_scale(state, batch_size=8), ours.surprise(grads, state)

    def flat(tree: Any, kind: Any) -> list[Any]:
        return jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, kind))

    found = [seen.tensors[name] for name in ("head", "layer.0", "layer.1")]
    posteriors = [type(each)(*map(np.asarray, each)) for each in flat(known, ours_posterior())]
    means = flat(surprises, ())
    for each in zip(found, [[one] for one in posteriors], flat(scales.tensors, type(scales.overall)), means, strict=True):
        check(*each)
    sizes = np.array([5, 12, 1])
    check(seen.overall, posteriors, scales.overall, (sizes * np.array(means)).sum() / sizes.sum())
    assert summarize(3, state).overall.surprise is None


def ours_posterior() -> type:
    from vsgd.posterior import Posterior

    return Posterior


def test_an_optax_state_in_bfloat16_is_surprised_by_the_gradient_as_it_is() -> None:
    jnp = pytest.importorskip("jax.numpy")
    pytest.importorskip("optax")
    import vsgd.optax as ours
    from vsgd.optax_monitor import summarize

    solver = ours.scale_by_constant_vsgd(state_dtype="bfloat16")
    # Not a number of bfloat16: rounded, it would be off by much of its distance to the mean.
    grads = {"a": jnp.full(5, 1.001, jnp.float32)}
    state = solver.init(grads)
    for _ in range(30):
        _, state = solver.update(grads, state)
    expected = float(ours.surprise(grads, state)["a"])
    assert summarize(30, state, grads).tensors["a"].surprise == pytest.approx(expected, rel=1e-5)


# The plots.


@pytest.fixture
def panels() -> Iterator[Any]:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3)
    yield axes
    figure.draw_without_rendering()  # what is drawn warns of nothing
    plt.close(figure)


def test_the_plots_show_what_was_seen(panels: Any) -> None:
    from vsgd.monitor_plots import draw_heat_map, draw_momenta, draw_noise_scale

    looks = [look(10), look(20, norm=-1.0), look(30, norm=2.0)]
    heat, scale, momenta = panels
    draw_heat_map(heat, looks, "gain")
    assert np.asarray(heat.collections[0].get_array()).ravel().tolist() == [0.5, 0.5, 0.5]
    assert [label.get_text() for label in heat.get_yticklabels()] == ["a/b"]
    draw_noise_scale(scale, looks, batch_size=64)
    np.testing.assert_array_equal(scale.lines[0].get_ydata(), [2.0, np.nan, 4.0])
    assert [text.get_text() for text in scale.get_legend().get_texts()] == [
        "noise scale, all tensors", "33% of the looks found no gradient in the noise", "batch size, 64",
    ]  # fmt: skip
    draw_momenta(momenta, {"layer": np.geomspace(0.01, 0.5, 100)})
    assert {"0.99", "0.9"} <= {label.get_text() for label in momenta.get_xticklabels()}
    with pytest.raises(ValueError, match="quantity is 'loss'"):
        draw_heat_map(heat, looks, "loss")
    with pytest.raises(ValueError, match="looks is empty"):
        draw_noise_scale(scale, [])


def test_heat_maps_that_share_their_axis_have_the_first_tensor_above(panels: Any) -> None:
    from vsgd.monitor_plots import draw_heat_map

    panels[1].sharey(panels[0])
    for axes in panels[:2]:
        draw_heat_map(axes, [look(10), look(20)], "gain")
        bottom, top = axes.get_ylim()
        assert bottom > top


def test_a_heat_map_has_no_colours_for_rounding(panels: Any) -> None:
    from vsgd.monitor_plots import draw_heat_map

    looks = [look(10), look(20)]
    looks[0].tensors["a/b"] = looks[0].tensors["a/b"]._replace(gain=0.5 + 1e-7)  # type: ignore[index]
    draw_heat_map(panels[0], looks, "gain")
    mesh = panels[0].collections[0]
    colours = mesh.norm(np.asarray(mesh.get_array())).ravel()
    assert colours[0] == pytest.approx(colours[1], abs=1e-3)


def test_a_heat_map_says_what_no_look_tells(panels: Any) -> None:
    from vsgd.monitor_plots import draw_heat_map

    with pytest.raises(ValueError, match="looks tell no surprise"):
        draw_heat_map(panels[0], [look(10)], "surprise")


@pytest.mark.parametrize(
    ("low", "high", "labels"),
    [
        (0.25, 0.25, ["0.755", "0.75", "0.745"]),  # Constant VSGD's
        (0.3, 0.45, ["0.7", "0.65", "0.6", "0.55"]),
        (1e-3, 0.2, ["0.999", "0.997", "0.99", "0.97", "0.9"]),
        (1e-7, 1.0, ["$1 - 10^{-7}$", "$1 - 10^{-5}$", "0.999", "0.9"]),
    ],
)
def test_momenta_have_a_few_round_labels(panels: Any, low: float, high: float, labels: list[str]) -> None:
    from vsgd.monitor_plots import draw_momenta

    draw_momenta(panels[0], {"layer": np.geomspace(low, high, 50)})
    assert [label.get_text() for label in panels[0].get_xticklabels()] == labels
