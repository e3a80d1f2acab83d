"""Test when the monitor looks, what it averages, where it writes, and what the plots show."""

from __future__ import annotations

import csv
import io
import logging
import math
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vsgd.monitor import SAMPLE, CsvFile, Look, Monitor, Summary, plots, summaries


def look(step: int, trace: float = 8.0, norm: float = 4.0, surprise: float | None = None) -> Look:
    summary = Summary(0.25, 1.0, 2.0, 3.0, trace, norm, surprise)
    return Look(step, summary, {"a/b": summary._replace(gain=0.5)})


def test_it_looks_every_so_many_steps() -> None:
    every = Monitor(every=np.int64(4))  # type: ignore[arg-type]
    assert [step for step in range(10) if every.due(step)] == [4, 8]
    # When steps advance by more than one, each multiple that is passed causes one look.
    assert [step for step in range(0, 20, 3) if every.due(step, taken=3)] == [6, 9, 12, 18]


def test_trace_and_squared_norm_are_averaged_apart() -> None:
    traces, norms = [8.0, 2.0, 5.0], [4.0, -1.0, 3.0]
    smoothing = Monitor(every=1, smoothing=np.float32(0.5))  # type: ignore[arg-type]
    told = [smoothing.record(look(step, *pair)) for step, pair in enumerate(zip(traces, norms, strict=True))]
    for count in (1, 2, 3):
        weights = 0.5 ** np.arange(count)[::-1]
        for summary in (told[count - 1].overall, told[count - 1].tensors["a/b"]):
            assert summary.noise_trace == pytest.approx(np.average(traces[:count], weights=weights))
            assert summary.noise_squared_norm == pytest.approx(np.average(norms[:count], weights=weights))
            assert summary.noise_scale == pytest.approx(summary.noise_trace / summary.noise_squared_norm)
            assert type(summary.noise_trace) is float
    assert look(1, norm=0.0).overall.noise_scale == math.inf


class Sink:
    """A logger or writer that stores what it gets."""

    def __init__(self) -> None:
        self.seen: list[Any] = []


class Logger(Sink):
    def log(self, values: dict[str, float], step: int) -> None:
        self.seen.append((step, values))


class Writer(Sink):
    def add_scalar(self, tag: str, value: float, step: int) -> None:
        self.seen.append((tag, value, step))


VALUES = {
    **{"gain": 0.5, "momentum": 0.5, "snr_10": 1.0, "snr_50": 2.0, "snr_90": 3.0},
    **{"noise_trace": 8.0, "noise_squared_norm": 4.0, "noise_scale": 2.0, "surprise": 1.5},
}


def test_every_sink_gets_what_was_seen(tmp_path: Path) -> None:
    looks: deque[Look] = deque(maxlen=1)
    logger, writer, path = Logger(), Writer(), tmp_path / "gradients.csv"
    monitor = Monitor(looks, logger, writer, path)
    monitor.record(look(10, surprise=1.5))
    monitor.record(look(20, surprise=2.5))
    assert list(looks) == [look(20, surprise=2.5)]
    step, values = logger.seen[0]
    assert step == 10
    assert values == {
        **{f"{name}/a/b": value for name, value in VALUES.items()},
        **{f"{name}/overall": value for name, value in {**VALUES, "gain": 0.25, "momentum": 0.75}.items()},
    }
    assert writer.seen[:18] == [(tag, value, 10) for tag, value in values.items()]
    CsvFile(path).append(look(30))  # like a resumed run, without optional values
    rows = list(csv.DictReader(io.StringIO(path.read_text())))
    assert [(row["step"], row["tensor"]) for row in rows] == [
        (step, tensor) for step in ("10", "20", "30") for tensor in ("overall", "a/b")
    ]
    assert {name: float(rows[1][name]) for name in VALUES} == VALUES
    assert [row["surprise"] for row in rows] == ["1.5", "1.5", "2.5", "2.5", "", ""]
    assert "surprise/overall" not in look(1).scalars()


def test_bad_arguments_are_refused() -> None:
    for every in (0, -1, 2.5):
        with pytest.raises(ValueError, match="every is"):
            Monitor(every=every)  # type: ignore[arg-type]
    for smoothing in (1.0, -0.1, math.nan, "0.9", None, 0.5j):
        with pytest.raises(ValueError, match=r"smoothing is .*, but must be a number in \[0, 1\)"):
            Monitor(smoothing=smoothing)  # type: ignore[arg-type]
    for sink in (3, logging.getLogger("vsgd"), logging.LoggerAdapter(logging.getLogger("vsgd"))):
        with pytest.raises(TypeError, match=rf"a sink is {type(sink).__name__}, but must be .* log\(dict, step=...\)"):
            Monitor(sink)


def test_samples_are_evenly_spread_over_rows_and_columns() -> None:
    assert summaries.choose_evenly(SAMPLE).tolist() == list(range(SAMPLE))
    for columns in (2, 64, 1000, 1024):
        places = summaries.choose_evenly(1024 * columns)
        assert len(set(places)) == SAMPLE
        shares = np.histogram(places % columns, bins=2)[0] / SAMPLE
        np.testing.assert_allclose(shares, 0.5, atol=0.02)


# The plots.


@pytest.fixture
def panels() -> Iterator[Any]:
    figure = pytest.importorskip("matplotlib.figure").Figure()
    yield figure.subplots(1, 3)
    figure.draw_without_rendering()  # drawing causes no warning


def test_the_plots_show_what_was_seen(panels: Any) -> None:
    looks = [look(10), look(20, norm=-1.0), look(30, norm=2.0)]
    heat, scale, _ = panels
    plots.draw_heat_map(heat, looks, "gain")
    assert np.asarray(heat.collections[0].get_array()).ravel().tolist() == [0.5, 0.5, 0.5]
    assert [label.get_text() for label in heat.get_yticklabels()] == ["a/b"]
    plots.draw_noise_scale(scale, looks, batch_size=64)
    np.testing.assert_array_equal(scale.lines[0].get_ydata(), [2.0, np.nan, 4.0])
    legend = scale.get_legend()
    assert [text.get_text() for text in legend.get_texts()] == ["noise scale, all tensors", "batch size, 64"]
    assert legend.get_title().get_text() == "33% of the looks found no gradient in the noise"
    for seen, quantity, message in ((looks, "loss", "quantity is 'loss'"), (looks, "surprise", "looks contain no surprise")):
        with pytest.raises(ValueError, match=message):
            plots.draw_heat_map(heat, seen, quantity)
    with pytest.raises(ValueError, match="looks is empty"):
        plots.draw_noise_scale(scale, [])


def test_a_measured_noise_scale_has_a_band(panels: Any) -> None:
    errors = [1.0, None, 0.5]
    looks = [look(10 * place) for place in (1, 2, 3)]
    looks = [
        each._replace(overall=each.overall._replace(noise_scale_error=error)) for each, error in zip(looks, errors, strict=True)
    ]
    plots.draw_noise_scale(panels[0], looks)
    heights = [path.vertices[:, 1] for path in panels[0].collections[0].get_paths()]
    assert sorted((low.min(), low.max()) for low in heights) == [(1.0, 3.0), (1.5, 2.5)]


def test_heat_maps_share_an_axis_and_have_no_colours_for_rounding(panels: Any) -> None:
    panels[1].sharey(panels[0])
    looks = [look(10), look(20)]
    looks[0].tensors["a/b"] = looks[0].tensors["a/b"]._replace(gain=0.5 + 1e-7)  # type: ignore[index]
    for axes in panels[:2]:
        plots.draw_heat_map(axes, looks, "gain")
        # The first tensor is at the top.
        bottom, top = axes.get_ylim()
        assert bottom > top
    mesh = panels[0].collections[0]
    colours = mesh.norm(np.asarray(mesh.get_array())).ravel()
    assert colours[0] == pytest.approx(colours[1], abs=1e-3)


@pytest.mark.parametrize(
    ("low", "high", "labels"),
    [
        (0.25, 0.25, ["0.755", "0.75", "0.745"]),  # the values of Constant VSGD
        (0.3, 0.45, ["0.7", "0.65", "0.6", "0.55"]),
        (1e-3, 0.2, ["0.999", "0.997", "0.99", "0.97", "0.9"]),
        (1e-7, 1.0, ["$1 - 10^{-7}$", "$1 - 10^{-5}$", "0.999", "0.9"]),
    ],
)
def test_momenta_have_a_few_round_labels(panels: Any, low: float, high: float, labels: list[str]) -> None:
    plots.draw_momenta(panels[0], {"layer": np.geomspace(low, high, 50)})
    assert [label.get_text() for label in panels[0].get_xticklabels()] == labels
