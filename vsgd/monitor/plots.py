"""Plots of a monitor's looks, with matplotlib: `pip install matplotlib`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vsgd.monitor.summaries import Look
from vsgd.posterior import Array

__all__ = ["draw_heat_map", "draw_loss", "draw_momenta", "draw_noise_scale", "draw_surprise"]

_LABELS = {
    "gain": "median gain",
    "snr_10": "signal to noise $\\mu^2 / \\sigma^2$, 10 % quantile",
    "snr_50": "median signal to noise $\\mu^2 / \\sigma^2$",
    "snr_90": "signal to noise $\\mu^2 / \\sigma^2$, 90 % quantile",
    "surprise": "surprise, 1 where the model fits",
}
_MOST_TICKS = 6


def draw_heat_map(axes: Any, looks: Sequence[Look], quantity: str, bar_location: str = "right") -> None:
    """Draw a quantity of each tensor over training, in colours on a logarithmic scale.

    Args:
        axes: the matplotlib axes to draw into.
        looks: the looks of a monitor.
        quantity: "gain", "snr_10", "snr_50", "snr_90" or "surprise".
        bar_location: the side of the colour bar: "left", "right", "top" or "bottom".

    Raises:
        ValueError: the quantity is another one, there are no looks, or no look contains it: Keras' looks contain no surprise.
    """
    if quantity not in _LABELS:
        raise ValueError(f"quantity is {quantity!r}, but must be one of {', '.join(_LABELS)}")
    steps = _get_steps(looks)
    names = list(dict.fromkeys(name for look in looks for name in look.tensors))
    values = np.full((len(names), len(looks)), np.nan)
    for column, look in enumerate(looks):
        for row, name in enumerate(names):
            value = getattr(look.tensors[name], quantity) if name in look.tensors else None
            values[row, column] = value if value is not None and 0 < value < math.inf else np.nan
    if np.isnan(values).all():
        raise ValueError(f"looks contain no {quantity}, but at least one must contain a finite positive one")
    # Each look's cell ends half way to its neighbours.
    middles = (steps[1:] + steps[:-1]) / 2
    first, last = (middles[0] - steps[0], steps[-1] - middles[-1]) if len(steps) > 1 else (0.5, 0.5)
    edges = np.concatenate([[steps[0] - first], middles, [steps[-1] + last]])
    low, high = np.nanmin(values), np.nanmax(values)
    if high < 1.02 * low:  # do not magnify rounding errors
        low, high = 0.9 * low, 1.1 * high
    mesh = axes.pcolormesh(edges, np.arange(len(names) + 1), values, norm="log", vmin=low, vmax=high, cmap="viridis")
    bar = axes.figure.colorbar(mesh, ax=axes, label=_LABELS[quantity], location=bar_location)
    if high < 20 * low:  # too narrow for powers of ten
        bar.long_axis.set_major_formatter("{x:.3g}")
        bar.long_axis.set_minor_formatter("{x:.3g}")
    axes.set_yticks(np.arange(len(names)) + 0.5, names, fontsize="small")
    axes.tick_params(axis="y", length=0)
    # Not `invert_yaxis`, which panels that share an axis would call twice.
    axes.set(xlabel="step", ylabel="tensor, in the optimizer's order", ylim=(len(names), 0))


def draw_noise_scale(axes: Any, looks: Sequence[Look], batch_size: float | None = None) -> None:
    """Draw the noise scale of all tensors together over training, with gaps where it is not positive, and the batch size.

    If the noise scale was measured, a band shows its standard error.

    Args:
        axes: the matplotlib axes to draw into.
        looks: the looks of a monitor that was given the batch size.
        batch_size: the batch size to draw as a line; None draws none.

    Raises:
        ValueError: there are no looks.
    """
    steps = _get_steps(looks)
    scales = np.array([look.overall.noise_scale for look in looks])
    found = np.isfinite(scales) & (scales > 0)
    axes.plot(steps, np.where(found, scales, np.nan), marker=".", label="noise scale, all tensors")
    errors = np.array([look.overall.noise_scale_error for look in looks], np.float64)  # None becomes NaN
    if np.isfinite(errors[found]).any():
        # A band cannot reach zero on a logarithmic axis.
        low, high = np.maximum(scales - errors, scales / 10), scales + errors
        axes.fill_between(steps, low, high, where=found & np.isfinite(errors), alpha=0.25, label="± standard error")
    if batch_size is not None:
        axes.axhline(batch_size, color="C1", linestyle="--", label=f"batch size, {batch_size:g}")
    axes.set(yscale="log", xlabel="step", ylabel="noise scale, examples", xlim=(0, steps[-1]))
    axes.grid(alpha=0.25)
    note = None if found.all() else f"{1 - found.mean():.0%} of the looks found no gradient in the noise"
    axes.legend(frameon=False, title=note)


def draw_loss(axes: Any, looks: Sequence[Look]) -> None:
    """Draw the loss over training, on a logarithmic scale if it is positive.

    Args:
        axes: the matplotlib axes to draw into.
        looks: the looks of a monitor that was given the loss.

    Raises:
        ValueError: there are no looks, or no look contains a finite loss.
    """
    steps = _get_steps(looks)
    losses = _get_numbers([look.loss for look in looks], "loss")
    axes.plot(steps, losses, marker=".", label="loss")
    scale = "log" if np.nanmin(losses) > 0 else "linear"
    axes.set(yscale=scale, xlabel="step", ylabel="loss", xlim=(0, steps[-1]))
    axes.grid(alpha=0.25)


def draw_surprise(axes: Any, looks: Sequence[Look]) -> None:
    """Draw the surprise of all tensors together over training, and mark looks after steps that a guard scaled or skipped.

    Args:
        axes: the matplotlib axes to draw into.
        looks: the looks of a monitor.

    Raises:
        ValueError: there are no looks, or no look contains a finite surprise: Keras' looks contain none.
    """
    steps = _get_steps(looks)
    surprises = _get_numbers([look.overall.surprise for look in looks], "surprise")
    axes.plot(steps, np.where(surprises > 0, surprises, np.nan), marker=".", label="surprise, all tensors")
    axes.axhline(1, color="C1", linestyle="--", label="1, where the model fits")
    guarded = np.array([look.overall.guarded or 0 for look in looks])
    if guarded.any():
        # At the top of the axes, because a guarded step may have no surprise.
        marks = steps[guarded > 0]
        label = f"looks with guarded steps, {guarded.sum():.0f} steps"
        transform = axes.get_xaxis_transform()
        axes.plot(marks, np.full(len(marks), 0.97), "v", color="C1", transform=transform, clip_on=False, label=label)
    axes.set(yscale="log", xlabel="step", ylabel="surprise", xlim=(0, steps[-1]))
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)


def draw_momenta(axes: Any, gains: Mapping[str, Array], bins: int = 60) -> None:
    """Draw a histogram of the effective momenta of all elements, one outline for each name.

    Args:
        axes: the matplotlib axes to draw into.
        gains: the `gain` of posteriors by name, real arrays that NumPy can read.
        bins: the number of bins.
    """
    flat = {name: np.ravel(np.asarray(gain)) for name, gain in gains.items()}
    low, high = (extreme([extreme(gain) for gain in flat.values()]) for extreme in (np.min, np.max))
    edges = np.geomspace(0.98 * low, 1.02 * high, bins + 1)
    for name, gain in flat.items():
        axes.hist(gain, edges, weights=np.full(gain.size, 100 / gain.size), histtype="step", linewidth=1.5, label=name)
    # Momenta near 1 differ in their distance from 1: the axis is the gain's, with momenta as labels.
    axes.set(xscale="log", xlim=(edges[-1], edges[0]))
    ticks = choose_ticks(edges[0], edges[-1])
    axes.set_xticks(ticks, [_format_momentum(gain) for gain in ticks])
    axes.set_xticks([], minor=True)
    axes.set(xlabel="effective momentum, 1 - gain", ylabel="share of the elements, %")
    axes.legend(frameon=False)


def choose_ticks(low: float, high: float) -> list[float]:
    """Return a few round numbers between two positive ones, spread over a logarithmic axis.

    Args:
        low: the lower end of the axis.
        high: the upper end.

    Example:
        >>> choose_ticks(2, 150)
        [3.0, 10.0, 30.0, 100.0]
    """
    powers = [10.0**power for power in range(math.floor(math.log10(low)), math.floor(math.log10(high)) + 1)]
    for digits in ((1, 2, 3, 5), (1, 3), (1,)):
        ticks = [digit * power for power in powers for digit in digits if low <= digit * power <= high]
        if len(ticks) <= _MOST_TICKS:
            break
    if len(ticks) < 3:  # a range within a small factor: choose as on a linear axis
        from matplotlib.ticker import MaxNLocator

        return [tick for tick in MaxNLocator(5, steps=(1, 2, 5, 10)).tick_values(low, high) if low <= tick <= high]
    return ticks[:: -(-len(ticks) // _MOST_TICKS)]


def _format_momentum(gain: float) -> str:
    """Return a momentum as a label: 0.9, 0.99 and so on, as a power where there would be many digits."""
    power = math.log10(gain)
    return f"$1 - 10^{{{power:.0f}}}$" if power < -4.5 and math.isclose(power, round(power)) else f"{1 - gain:.9g}"


def _get_numbers(values: Sequence[float | None], quantity: str) -> Any:
    """Return numbers with NaN for what is missing or infinite."""
    numbers = np.array(values, np.float64)  # None becomes NaN
    numbers[np.isinf(numbers)] = np.nan
    if np.isnan(numbers).all():
        raise ValueError(f"looks contain no {quantity}, but at least one must contain a finite one")
    return numbers


def _get_steps(looks: Sequence[Look]) -> Any:
    if not looks:
        raise ValueError("looks is empty, but must hold at least one")
    return np.array([look.step for look in looks])
