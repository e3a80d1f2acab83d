"""Draw the figures of `docs/how-it-works.md` and write its table of the filtered gradients.

To run it:

    python docs/how-it-works/figures.py
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

sys.path.append(str(Path(__file__).parents[2]))

import vsgd.numpy
from reporting.plots import CYCLE, INK, drawing, style_optimizers
from vsgd import core

Array = NDArray[np.float64]

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


def draw_filtering(figure: Any, runs: dict[str, Filtered]) -> None:
    """Draw a row for each optimizer: both elements' hidden gradient, noisy gradients and posterior; and a row of the gains."""
    axes = figure.subplots(len(runs) + 1, len(NOISES), sharex=True, sharey="row")
    styles = style_optimizers(runs)
    for row, (name, run) in zip(axes, runs.items(), strict=False):
        steps = np.arange(1, len(run.seen) + 1)
        colour = styles[name]["color"]
        for place, panel in enumerate(row):
            mean, deviation = run.mean[:, place], run.deviation[:, place]
            panel.plot(steps, run.seen[:, place], ".", color=INK, alpha=0.6, markersize=1.5, rasterized=True)
            panel.plot(steps, run.hidden[:, place], color=INK, linewidth=1)
            panel.fill_between(steps, mean - 2 * deviation, mean + 2 * deviation, color=colour, alpha=0.3, linewidth=0)
            panel.plot(steps, mean, color=colour)
            panel.set_ylim(-4.5, 4.5)  # the first steps' deviations are larger
            axes[-1, place].plot(steps, run.gain[:, place], label=name, **styles[name])
        row[0].set_title(name, loc="left")
    for panel, noise in zip(axes[-1], NOISES, strict=True):
        panel.set(xlabel=f"step, noise {noise}", yscale="log")
    axes[-1, 0].set_title("gain", loc="left")
    handles, _ = axes[-1, 0].get_legend_handles_labels()
    title = "grey: hidden gradient and mini-batch gradients\ncoloured: the posterior's mean ± 2 sd"
    figure.legend(handles=handles, title=title, loc="outside lower center")


def draw_model(figure: Any) -> None:
    """Draw the model as a graph: open circles are hidden, the filled one is observed, the dot is fixed, the frame repeats."""
    from matplotlib.patches import Circle, Rectangle

    axes = figure.subplots()
    radius = 0.36
    fixed, drift, noise, hidden, seen = map(np.array, [(0.5, 1.0), (1.5, 2.4), (3.5, 2.4), (2.5, 1.0), (4.5, 1.0)])
    for start, end in [(fixed, hidden), (drift, hidden), (hidden, seen), (noise, seen)]:
        way = radius * (end - start) / np.linalg.norm(end - start)
        arrow = {"arrowstyle": "-|>", "color": INK, "shrinkA": 0, "shrinkB": 0}
        axes.annotate("", end - way, start if start is fixed else start + way, arrowprops=arrow)
    for centre, name in [(drift, r"$\tau_g$"), (noise, r"$\tau_{\hat g}$"), (hidden, "$g_t$"), (seen, r"$\hat g_t$")]:
        axes.add_patch(Circle(centre, radius, facecolor=f"{INK}50" if centre is seen else "none", edgecolor=INK))
        axes.text(*centre, name, ha="center", va="center", fontsize=16)
    axes.add_patch(Circle(fixed, 0.07, color=INK))
    axes.text(0.55, 0.6, r"$u_t = \mu_{t-1}$", ha="center", va="center", fontsize=14)
    axes.add_patch(Rectangle((-0.3, 0.2), 5.6, 1.4, fill=False, edgecolor=INK))
    axes.text(5.2, 0.3, "each step $t$", ha="right")
    axes.text(1.02, 2.4, "precision\nof the drift", ha="right", va="center")
    axes.text(3.98, 2.4, "precision\nof the noise", ha="left", va="center")
    axes.set(xlim=(-0.4, 5.4), ylim=(0.1, 2.9), aspect="equal")
    axes.axis("off")


def draw_direction(figure: Any) -> None:
    """Draw the step divided by the learning rate as a function of the posterior mean divided by its standard deviation."""
    rule, hyper = core.VSGD, core.VSGD.hyperparameters(eps=0.0)
    ratio = np.linspace(-6, 6, 401)
    gain, sigma2 = 1 / 31, 1.0
    b_ghat = sigma2 * core.compute_shape(hyper) / gain
    state = (ratio, np.full_like(ratio, gain / (1 - gain) * b_ghat), np.full_like(ratio, b_ghat))
    # A gradient equal to the mean leaves the mean unchanged.
    direction, _ = rule.make_update(np)(ratio, state, rule.coefficients(2, hyper))
    axes = figure.subplots()
    near = np.abs(ratio) < 1.15
    axes.plot(ratio[near], ratio[near], color=INK, linestyle="dotted", label=r"$\mu / \sigma$")
    axes.plot(ratio, np.sign(ratio), color=INK, linestyle="dashed", label=r"sign($\mu$)")
    axes.plot(ratio, direction, label=r"$\mu / \sqrt{\mu^2 + \sigma^2}$")
    axes.set(xlabel=r"mean over standard deviation, $\mu / \sigma$", title="step / learning rate", ylim=(-1.25, 1.25))
    axes.legend()


def compute_weights(steps: int, kappa: float) -> Array:
    """Compute the weight of each step in a rate after the last step."""
    rho = np.arange(1, steps + 1) ** -kappa
    kept = np.append(np.cumprod((1 - rho)[:0:-1])[::-1], 1)
    return rho * kept


def draw_memory(figure: Any, steps: int) -> None:
    """Draw the memory of the two rates and the weight of each past step."""
    hyper = core.VSGD.hyperparameters()
    kappas = {r"$b_g$, $\kappa_1$": hyper.kappa1, r"$b_{\hat g}$, $\kappa_2$": hyper.kappa2}
    memory, weights = figure.subplots(2, 1)
    time = np.arange(1, steps + 1)
    for (name, kappa), colour in zip(kappas.items(), CYCLE, strict=False):
        memory.plot(time, time**kappa, color=colour, label=f"{name} = {kappa}")
        weights.plot(time, compute_weights(steps, kappa), color=colour)
    memory.plot(time, time, color=INK, linestyle="dotted", label=r"$\kappa = 1$, a plain average")
    weights.axhline(1 / steps, color=INK, linestyle="dotted")
    memory.set(xscale="log", yscale="log", xlabel="step $t$", title=r"memory $1 / \rho_t = t^\kappa$, in steps")
    weights.set(xlabel="past step $s$", title=f"weight of step $s$ at step {steps}", ylim=(0, None))
    memory.legend()


def draw_all(runs: dict[str, Filtered], folder: Path) -> None:
    """Draw all figures and save them as SVG."""
    figures: dict[str, tuple[float, Callable[[Any], None]]] = {
        "model": (2.9, draw_model),
        "filtering": (10.5, lambda figure: draw_filtering(figure, runs)),
        "direction": (3.6, draw_direction),
        "memory": (6.5, lambda figure: draw_memory(figure, steps=1000)),
    }
    for name, (height, draw) in figures.items():
        with drawing(folder / f"{name}.svg", height) as figure:
            draw(figure)


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
