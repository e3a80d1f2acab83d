"""Draw the figures of `docs/how-it-works.md` and write its table of the filtered gradients.

To run it:

    python docs/how-it-works/figures.py
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")  # no display needed

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Circle, Rectangle
from numpy.typing import NDArray

import vsgd.numpy
from vsgd import core

Array = NDArray[np.float64]

# Okabe and Ito's colours suit colour-blind readers.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#E69F00", "#009E73", "#999999"

NOISES = (0.1, 1.0)  # standard deviation of each element's noise


class Filtered(NamedTuple):
    """VSGD's estimates of a gradient, in arrays of shape (steps, noises).

    Attributes:
        hidden: the true gradient.
        seen: the noisy gradients.
        mean: the posterior's mean.
        deviation: the posterior's standard deviation.
        gain: how far the mean moves towards each new gradient.
    """

    hidden: Array
    seen: Array
    mean: Array
    deviation: Array
    gain: Array


def make_gradients(steps: int, seed: int = 0) -> tuple[Array, Array]:
    """Make a decaying oscillation as the hidden gradient, and noisy copies of it."""
    rng = np.random.default_rng(seed)
    time = np.arange(1, steps + 1) / steps
    hidden = np.tile((np.cos(10 * time) * np.exp(-2 * time))[:, None], len(NOISES))
    return hidden, hidden + np.array(NOISES) * rng.standard_normal(hidden.shape)


def record_filtering(optimizer: Any, hidden: Array, seen: Array) -> Filtered:
    """Step an optimizer with the noisy gradients and record its posterior."""
    records = []
    for grad in seen:
        before = optimizer.posterior(0)  # a step's variance and gain depend on the state before it
        optimizer.step([grad])
        records.append((optimizer.posterior(0).mean, np.sqrt(before.variance), before.gain))
    return Filtered(hidden, seen, *map(np.array, zip(*records, strict=True)))


def filter_all(steps: int) -> dict[str, Filtered]:
    """Filter the same gradients by VSGD with two priors and by Constant VSGD."""
    hidden, seen = make_gradients(steps)
    strength = vsgd.numpy.prior_strength_from([grad] for grad in seen[:10])
    still = [np.zeros(len(NOISES))]
    optimizers = {
        "VSGD, prior from gradients": vsgd.numpy.VSGD(still, lr=0.0, prior_strength=strength, prior_shape=0.0),
        "VSGD, default prior": vsgd.numpy.VSGD(still, lr=0.0),
        "Constant VSGD": vsgd.numpy.ConstantVSGD(still, lr=0.0),
    }
    return {name: record_filtering(optimizer, hidden, seen) for name, optimizer in optimizers.items()}


def format_table(runs: dict[str, Filtered]) -> str:
    """Format the error of the mean and the gains at some steps, in Markdown."""
    steps = len(next(iter(runs.values())).gain)
    looks = [step for step in (1, 2, 10, 100, 500) if step <= steps]
    lines = [
        f"| optimizer | noise | error of the mean | within 2 sd | {' | '.join(f'gain, step {step}' for step in looks)} |",
        f"|---|{'---:|' * (3 + len(looks))}",
    ]
    for name, run in runs.items():
        error = np.abs(run.mean - run.hidden)
        root, inside = np.sqrt((error**2).mean(axis=0)), (error <= 2 * run.deviation).mean(axis=0)
        for place, noise in enumerate(NOISES):
            gains = " | ".join(f"{run.gain[step - 1, place]:.2g}" for step in looks)
            lines.append(f"| {name} | {noise} | {root[place]:.2g} | {inside[place]:.0%} | {gains} |")
    return "\n".join(lines) + "\n"


def draw_filtering(runs: dict[str, Filtered]) -> Figure:
    """Draw a row for each optimizer: both elements' hidden gradient, noisy gradients and posterior, and the gains."""
    figure, axes = plt.subplots(len(runs), 3, figsize=(10, 6.5), sharex=True, layout="constrained")
    for row, (title, run) in zip(axes, runs.items(), strict=True):
        steps = np.arange(1, len(run.seen) + 1)
        for place, (panel, noise) in enumerate(zip(row, NOISES, strict=False)):
            mean, deviation = run.mean[:, place], run.deviation[:, place]
            panel.plot(steps, run.seen[:, place], ".", color=GREY, markersize=2, label="mini-batch gradient")
            panel.plot(steps, run.hidden[:, place], color="black", label="hidden gradient")
            panel.fill_between(steps, mean - 2 * deviation, mean + 2 * deviation, color=BLUE, alpha=0.3, linewidth=0)
            panel.plot(steps, mean, color=BLUE, label="mean ± 2 sd")
            panel.set(title=f"{title}: noise {noise}", ylim=(-2.5, 2.5))
            row[2].plot(steps, run.gain[:, place], color=(GREEN, ORANGE)[place], label=f"noise {noise}")
        row[2].set(title=f"{title}: gain", yscale="log", ylim=(3e-4, 1))
    axes[0, 0].legend(fontsize=8)
    axes[0, 2].legend(fontsize=8)
    figure.supxlabel("step")
    return figure


def draw_model() -> Figure:
    """Draw the model as a graph: open circles are hidden, the filled one is observed, the dot is fixed, the frame repeats."""
    figure, axes = plt.subplots(figsize=(7, 3.4), layout="constrained")
    radius = 0.33
    fixed, drift, noise, hidden, seen = map(np.array, [(0.5, 1.0), (1.5, 2.4), (3.5, 2.4), (2.5, 1.0), (4.5, 1.0)])
    for start, end in [(fixed, hidden), (drift, hidden), (hidden, seen), (noise, seen)]:
        tip = end - radius * (end - start) / np.linalg.norm(end - start)
        axes.annotate("", tip, start, arrowprops={"arrowstyle": "-|>", "color": "black", "shrinkA": 0, "shrinkB": 0}, zorder=1)
    for centre, name in [(drift, r"$\tau_g$"), (noise, r"$\tau_{\hat g}$"), (hidden, "$g_t$"), (seen, r"$\hat g_t$")]:
        axes.add_patch(Circle(centre, radius, facecolor="#d9d9d9" if centre is seen else "white", edgecolor="black", zorder=2))
        axes.text(*centre, name, ha="center", va="center", fontsize=14, zorder=3)
    axes.add_patch(Circle(fixed, 0.07, color="black", zorder=2))
    axes.text(0.5, 0.65, r"$u_t = \mu_{t-1}$", ha="center", va="center", fontsize=12)
    axes.add_patch(Rectangle((-0.2, 0.3), 5.4, 1.3, fill=False, edgecolor=GREY))
    axes.text(5.1, 0.4, "each step $t$", ha="right", fontsize=10, color="#555555")
    axes.text(1.05, 2.4, "drift's precision", ha="right", va="center", fontsize=10)
    axes.text(3.95, 2.4, "noise's precision", ha="left", va="center", fontsize=10)
    axes.set(xlim=(-0.4, 5.6), ylim=(0.1, 2.9), aspect="equal")
    axes.axis("off")
    return figure


def draw_direction() -> Figure:
    """Draw the step divided by the learning rate as a function of the posterior mean divided by its standard deviation."""
    rule, hyper = core.VSGD, core.VSGD.hyperparameters(eps=0.0)
    ratio = np.linspace(-6, 6, 401)
    gain, sigma2 = 1 / 31, 1.0
    b_ghat = sigma2 * core.compute_shape(hyper) / gain
    state = (ratio, np.full_like(ratio, gain / (1 - gain) * b_ghat), np.full_like(ratio, b_ghat))
    # A gradient equal to the mean leaves the mean unchanged.
    direction, _ = rule.make_update(np)(ratio, state, rule.coefficients(2, hyper))
    figure, axes = plt.subplots(figsize=(6, 3.4), layout="constrained")
    axes.plot(ratio, ratio, color=GREY, linestyle=":", label=r"$\mu / \sigma$")
    axes.plot(ratio, np.sign(ratio), color=GREY, linestyle="--", label=r"sign($\mu$)")
    axes.plot(ratio, direction, color=BLUE, label=r"$\mu / \sqrt{\mu^2 + \sigma^2}$")
    axes.set(xlabel=r"mean over standard deviation, $\mu / \sigma$", ylabel="step / learning rate", ylim=(-1.2, 1.2))
    axes.legend(fontsize=9)
    return figure


def compute_weights(steps: int, kappa: float) -> Array:
    """Compute the weight of each step in a rate after the last step."""
    rho = np.arange(1, steps + 1) ** -kappa
    kept = np.append(np.cumprod((1 - rho)[:0:-1])[::-1], 1)
    return rho * kept


def draw_memory(steps: int) -> Figure:
    """Draw the memory of the two rates and the weight of each past step."""
    hyper = core.VSGD.hyperparameters()
    kappas = {r"$b_g$, $\kappa_1$": (hyper.kappa1, GREEN), r"$b_{\hat g}$, $\kappa_2$": (hyper.kappa2, ORANGE)}
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.4), layout="constrained")
    time = np.arange(1, steps + 1)
    for name, (kappa, colour) in kappas.items():
        axes[0].plot(time, time**kappa, color=colour, label=f"{name} = {kappa}")
        axes[1].plot(time, compute_weights(steps, kappa), color=colour, label=f"{name} = {kappa}")
    axes[0].plot(time, time, color=GREY, linestyle=":", label=r"$\kappa = 1$, a plain average")
    axes[1].axhline(1 / steps, color=GREY, linestyle=":", label=r"$\kappa = 1$, a plain average")
    axes[0].set(xscale="log", yscale="log", xlabel="step $t$", ylabel=r"memory $1 / \rho_t = t^\kappa$, steps")
    axes[1].set(xlabel="past step $s$", ylabel=f"its weight at step {steps}", ylim=(0, None))
    for panel in axes:
        panel.legend(fontsize=8)
    return figure


def draw_all(runs: dict[str, Filtered], folder: Path) -> None:
    """Draw all figures and save them as PNG."""
    figures: dict[str, Figure] = {
        "model": draw_model(),
        "filtering": draw_filtering(runs),
        "direction": draw_direction(),
        "memory": draw_memory(steps=1000),
    }
    for name, figure in figures.items():
        figure.savefig(folder / f"{name}.png", dpi=80, pil_kwargs={"optimize": True})
        plt.close(figure)


def main() -> None:
    """Draw the figures and write the table from the command line."""
    parser = argparse.ArgumentParser(description="Draw the figures and write the table of docs/how-it-works.md.")
    parser.add_argument("--steps", type=int, default=500, help="number of gradients (default: %(default)s)")
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).parent, help="folder to write to (default: the script's folder)"
    )
    arguments = parser.parse_args()
    if arguments.steps < 10:
        parser.error(f"--steps is {arguments.steps}, but must be at least 10")
    runs = filter_all(arguments.steps)
    text = format_table(runs)
    print(text, end="")
    (arguments.output / "filtering.txt").write_text(text, encoding="utf-8")
    draw_all(runs, arguments.output)


if __name__ == "__main__":
    main()
