"""Measure how often the posterior's intervals contain the true gradient, on noisy quadratics with known gradients.

Draws `calibration.svg` and writes the table `calibration.txt`, both for `docs/uncertainty.md`:

    python -m experiments.uncertainty.calibration
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

import vsgd.numpy
from reporting.pages import format_table
from reporting.plots import CYCLE, INK, drawing, find_colour

Array = NDArray[np.float64]

OUTPUT = Path("docs/uncertainty")
LEVELS = (0.5, 0.9, 0.99)
OPTIMIZERS = {"VSGD": vsgd.numpy.VSGD, "Constant VSGD": vsgd.numpy.ConstantVSGD}


class Regime(NamedTuple):
    """A loss (x - c_t)^2 / 2 for each element, whose gradient x - c_t is observed with noise.

    Attributes:
        lr: the step size; at 0 the parameters stay fixed.
        drift: the standard deviation of c_t's random walk at each step.
        noise: the noise's standard deviation at a step.
    """

    lr: float
    drift: float
    noise: Callable[[int], float]


REGIMES = {
    "stationary": Regime(0.0, 0.0, lambda step: 1.0),
    "slow drift": Regime(0.0, 0.1, lambda step: 1.0),
    "fast drift": Regime(0.0, 1.0, lambda step: 1.0),
    "decaying noise": Regime(0.0, 0.0, lambda step: 10 ** (-step / 5000)),
    "training": Regime(0.01, 0.0, lambda step: 1.0),
}


class Track(NamedTuple):
    """Measurements over the steps.

    Attributes:
        coverage: for each step and level, the share of elements whose interval contains the true gradient.
        noise_ratio: for each step, the mean noise variance of the posterior divided by the true one.
        error_ratio: for each step, the mean squared error of the posterior mean divided by the mean posterior variance.
        gain: the median gain at each step.
    """

    coverage: Array
    noise_ratio: Array
    error_ratio: Array
    gain: Array


def follow(name: str, regime: Regime, steps: int, elements: int, seed: int = 0) -> Track:
    """Run an optimizer at its defaults, and compare its posterior with the true gradient after each step."""
    rng = np.random.default_rng(seed)
    x, minimum = rng.standard_normal(elements), np.zeros(elements)
    optimizer = OPTIMIZERS[name]([x], lr=regime.lr)
    widths = np.array([[NormalDist().inv_cdf((1 + level) / 2)] for level in LEVELS])
    rows = []
    for step in range(1, steps + 1):
        minimum += regime.drift * rng.standard_normal(elements)
        grad, noise = x - minimum, regime.noise(step)
        optimizer.step([grad + noise * rng.standard_normal(elements)])
        posterior = optimizer.posterior(0)
        error = posterior.mean - grad
        covered = (np.abs(error) <= widths * np.sqrt(posterior.variance)).mean(axis=1)
        ratios = posterior.noise_variance.mean() / noise**2, (error**2).mean() / posterior.variance.mean()
        rows.append([*covered, *ratios, np.median(posterior.gain)])
    columns = np.array(rows).T
    return Track(columns[: len(LEVELS)], *columns[len(LEVELS) :])


def format_rows(tracks: Mapping[tuple[str, str], Track]) -> str:
    """Format a Markdown table of averages over the last tenth of the steps."""
    rows = []
    for (regime, name), track in tracks.items():
        coverage, noise, error, gain = (column[..., -(column.shape[-1] // 10) :].mean(axis=-1) for column in track)
        rows.append([regime, name, *(f"{c:.1%}" for c in coverage), f"{noise:.2f}", f"{error:.3g}", f"{gain:.2g}"])
    levels = [f"{level:.0%} interval" for level in LEVELS]
    ratios = ["noise variance / truth", "squared error / posterior variance"]
    return format_table(["regime", "optimizer", *levels, *ratios, "median gain"], rows, left=2) + "\n"


def draw_tracks(tracks: Mapping[tuple[str, str], Track], output: Path) -> None:
    """Draw a row for each regime: the coverage of each optimizer, and the ratio of estimated to true noise."""
    with drawing(output, height=10.5) as figure:
        axes = figure.subplots(len(REGIMES), 3, sharex=True, sharey="col")
        count = next(iter(tracks.values())).gain.size
        steps = np.unique(np.geomspace(1, count, 400).astype(int))  # equally dense on the logarithmic axis
        for row, regime in zip(axes, REGIMES, strict=True):
            row[0].set_ylabel(regime)
            for panel, name in zip(row, OPTIMIZERS, strict=False):
                track = tracks[regime, name]
                for level, covered, colour in zip(LEVELS, track.coverage[:, steps - 1], CYCLE, strict=False):
                    panel.axhline(100 * level, color=colour, linestyle="dotted", linewidth=1)
                    panel.plot(steps, 100 * covered, color=colour, label=f"{level:.0%} interval")
                panel.set_ylim(-2, 102)
                row[2].plot(steps, track.noise_ratio[steps - 1], color=find_colour(name), label=name)
            row[2].axhline(1, color=INK, linestyle="dotted", linewidth=1)
            row[2].set(xscale="log", yscale="log", xlim=(1, count))
            row[2].yaxis.tick_right()
        titles = (*(f"{name}:\ncoverage, %" for name in OPTIMIZERS), "noise variance\n/ truth")
        for panel, title in zip(axes[0], titles, strict=True):
            panel.set_title(title)
        for panel in axes[-1]:
            panel.set_xlabel("step")
        handles = [*axes[0, 0].get_legend_handles_labels()[0], *axes[0, 2].get_legend_handles_labels()[0]]
        figure.legend(handles=handles, title="dotted: what it should be", ncols=2, loc="outside lower center")


def main() -> None:
    """Run the command line: write the figure and the table."""
    parser = argparse.ArgumentParser(description="Measure the coverage of the gradient's posterior on noisy quadratics.")
    parser.add_argument("--steps", type=int, default=10_000, help="steps of each run (default: %(default)s)")
    parser.add_argument("--elements", type=int, default=1000, help="elements of the parameter (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder (default: %(default)s)")
    arguments = parser.parse_args()
    tracks = {
        (title, name): follow(name, regime, arguments.steps, arguments.elements)
        for title, regime in REGIMES.items()
        for name in OPTIMIZERS
    }
    draw_tracks(tracks, arguments.output / "calibration.svg")
    text = format_rows(tracks)
    (arguments.output / "calibration.txt").write_text(text, encoding="utf-8")
    print(text, end="")


if __name__ == "__main__":
    main()
