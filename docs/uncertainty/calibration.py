"""How often the true gradient lies within the posterior's intervals, on noisy quadratics where it is known.

Draws `calibration.png` and writes the table `calibration.txt`, both for `docs/uncertainty.md`:

    python docs/uncertainty/calibration.py
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from statistics import NormalDist
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")  # no display needed

import matplotlib.pyplot as plt
import numpy as np
from numpy.typing import NDArray

import vsgd.numpy

Array = NDArray[np.float64]

LEVELS = (0.5, 0.9, 0.99)
KINDS = {"VSGD": vsgd.numpy.VSGD, "Constant VSGD": vsgd.numpy.ConstantVSGD}


class Regime(NamedTuple):
    """A loss (x - c_t)^2 / 2 for each element, whose gradient x - c_t is seen with noise.

    Attributes:
        lr: the step size; with 0 the parameters stand still.
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
    """What was found over the steps.

    Attributes:
        coverage: for each step and level, the share of elements whose true gradient was within the interval.
        noise_ratio: for each step, the mean noise variance of the posterior over the true one.
        error_ratio: for each step, the mean squared error of the posterior mean over the mean posterior variance.
        gain: the median gain at each step.
    """

    coverage: Array
    noise_ratio: Array
    error_ratio: Array
    gain: Array


def follow(kind: str, regime: Regime, steps: int, elements: int, seed: int = 0) -> Track:
    """Run an optimizer at its defaults and compare its posterior with the true gradient after each step."""
    rng = np.random.default_rng(seed)
    x, minimum = rng.standard_normal(elements), np.zeros(elements)
    optimizer = KINDS[kind]([x], lr=regime.lr)
    widths = np.array([[NormalDist().inv_cdf((1 + level) / 2)] for level in LEVELS])
    rows = []
    for step in range(1, steps + 1):
        minimum += regime.drift * rng.standard_normal(elements)
        grad, noise = x - minimum, regime.noise(step)
        optimizer.step([grad + noise * rng.standard_normal(elements)])
        known = optimizer.posterior(0)
        error = known.mean - grad
        covered = (np.abs(error) <= widths * np.sqrt(known.variance)).mean(axis=1)
        ratios = known.noise_variance.mean() / noise**2, (error**2).mean() / known.variance.mean()
        rows.append([*covered, *ratios, np.median(known.gain)])
    columns = np.array(rows).T
    return Track(columns[: len(LEVELS)], *columns[len(LEVELS) :])


def table(tracks: dict[tuple[str, str], Track]) -> str:
    """The averages over the last tenth of the steps, in Markdown."""
    levels = " | ".join(f"{level:.0%} interval" for level in LEVELS)
    lines = [
        f"| regime | optimizer | {levels} | noise variance / truth | squared error / posterior variance | median gain |",
        "|---|---|" + "---:|" * (len(LEVELS) + 3),
    ]
    for (regime, kind), track in tracks.items():
        coverage, noise, error, gain = (column[..., -(column.shape[-1] // 10) :].mean(axis=-1) for column in track)
        lines.append(
            f"| {regime} | {kind} | {' | '.join(f'{c:.1%}' for c in coverage)} | {noise:.2f} | {error:.3g} | {gain:.2g} |"
        )
    return "\n".join(lines) + "\n"


# Okabe and Ito's colours, which colour-blind readers tell apart.
COLOURS = ("#0072B2", "#E69F00", "#CC79A7")
KIND_COLOURS = {"VSGD": "#000000", "Constant VSGD": "#009E73"}


def draw(tracks: dict[tuple[str, str], Track], output: Path) -> None:
    """A column for each regime: the coverage of each optimizer, and the noise estimates beside the truth."""
    figure, axes = plt.subplots(3, len(REGIMES), figsize=(14, 7.5), sharex=True, sharey="row", layout="constrained")
    for column, regime in zip(axes.T, REGIMES, strict=True):
        column[0].set_title(regime)
        for panel, kind in zip(column, KINDS, strict=False):
            steps = np.arange(1, tracks[regime, kind].gain.size + 1)
            for level, covered, colour in zip(LEVELS, tracks[regime, kind].coverage, COLOURS, strict=True):
                panel.axhline(100 * level, color=colour, linestyle=":", linewidth=1)
                panel.plot(steps, 100 * covered, color=colour, label=f"{level:.0%} interval")
            column[2].plot(steps, tracks[regime, kind].noise_ratio, color=KIND_COLOURS[kind], label=kind)
        column[2].axhline(1, color="grey", linestyle=":", linewidth=1)
        column[2].set(xscale="log", yscale="log", xlabel="step", xlim=(1, steps[-1]))
    for panel, kind in zip(axes[:, 0], KINDS, strict=False):
        panel.set(ylabel=f"{kind}:\ncoverage (% of elements)", ylim=(-2, 102))
    axes[2, 0].set_ylabel("noise variance:\nestimate / truth")
    axes[0, 1].legend(frameon=False, title="dotted: nominal", loc="center")
    axes[2, 0].legend(frameon=False, title="dotted: truth")
    for panel in axes.flat:
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.25)
    figure.savefig(output, dpi=120)
    plt.close(figure)


def main() -> None:
    """Make the figure and the table from the command line."""
    parser = argparse.ArgumentParser(description="Coverage of the posterior of the gradient on noisy quadratics.")
    parser.add_argument("--steps", type=int, default=10_000, help="steps of each run (default: %(default)s)")
    parser.add_argument("--elements", type=int, default=1000, help="elements of the parameter (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent, help="folder (default: this file's)")
    arguments = parser.parse_args()
    tracks = {
        (name, kind): follow(kind, regime, arguments.steps, arguments.elements)
        for name, regime in REGIMES.items()
        for kind in KINDS
    }
    draw(tracks, arguments.output / "calibration.png")
    (arguments.output / "calibration.txt").write_text(table(tracks), encoding="utf-8")
    print(table(tracks), end="")


if __name__ == "__main__":
    main()
