"""Measure what state in bfloat16 costs in accuracy: `python -m benchmarks.compact` writes a table and a figure into the page.

The table has a ConvMixer's final losses on digits, over seeds. The figure shows how the noise estimate follows a
tenfold drop of the noise, with state rounded at random, to the nearest, and not at all.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from tqdm import tqdm

from reporting import digits
from reporting.pages import format_image, format_table, replace_section
from reporting.plots import INK, OPTIMIZERS, drawing
from vsgd.torch import VSGD

_STATES: dict[str, Callable[..., VSGD]] = {"float32": VSGD, "bfloat16": partial(VSGD, state_dtype="bfloat16")}
_STEPS, _DROP = 3000, 1000


def measure_scores(seeds: int, epochs: int) -> dict[str, list[dict[str, float]]]:
    """Train the ConvMixer with each state and seed; equal seeds give equal weights and batches.

    Args:
        seeds: how many, from 0.
        epochs: passes over the training data.

    Returns:
        The scores at the end, for each state and seed.
    """
    data = digits.load_data()

    def train(make: Callable[..., VSGD], seed: int) -> dict[str, float]:
        torch.manual_seed(seed)
        model = digits.make_conv_mixer()
        optimizer = make(model.parameters())
        for batch in digits.draw_batches(len(data.train_x), epochs, seed):
            optimizer.zero_grad()
            functional.cross_entropy(model(data.train_x[batch]), data.train_y[batch]).backward()
            optimizer.step()
        return digits.evaluate(model, data)

    return {name: [train(make, seed) for seed in tqdm(range(seeds), name)] for name, make in _STATES.items()}


def format_scores(scores: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """Format the scores, as mean ± standard deviation over the seeds, and their paired differences.

    Args:
        scores: of `measure_scores`.

    Returns:
        The Markdown table.
    """
    parts = ("train loss", "test loss", "test accuracy")
    rows = [
        [f"{name} state", *(_format_spread([run[part] for run in runs]) for part in parts)] for name, runs in scores.items()
    ]
    pairs = list(zip(scores["bfloat16"], scores["float32"], strict=True))
    rows.append(["difference", *(_format_spread([one[part] - other[part] for one, other in pairs]) for part in parts)])
    return format_table([f"{len(pairs)} seeds", *parts], rows)


def _format_spread(values: Sequence[float]) -> str:
    return f"{statistics.fmean(values):.2g} ± {statistics.stdev(values):.2g}"


def follow_noise() -> dict[str, list[float]]:
    """Return each state's mean noise variance after each step, while the noise's deviation drops from 1 to 0.1."""
    generator = torch.Generator().manual_seed(0)
    params = {name: torch.nn.Parameter(torch.zeros(4096)) for name in (*_STATES, "to the nearest")}
    optimizers = {name: _STATES.get(name, VSGD)([param], lr=0.0) for name, param in params.items()}
    estimates: dict[str, list[float]] = {name: [] for name in params}
    for step in range(_STEPS):
        grad = torch.randn(4096, generator=generator) * (1.0 if step < _DROP else 0.1)
        for name, param in params.items():
            param.grad = grad.clone()
            optimizers[name].step()
            estimates[name].append(optimizers[name].posterior(param).noise_variance.mean().item())
        state = optimizers["to the nearest"].state[params["to the nearest"]]
        for array in ("mu_g", "b_g", "b_ghat"):
            state[array].copy_(state[array].bfloat16())
    return estimates


def draw_estimates(estimates: Mapping[str, Sequence[float]], path: Path) -> None:
    """Draw the estimates and the true variance.

    Args:
        estimates: of `follow_noise`.
        path: of the image file.
    """
    styles = {"float32": "solid", "bfloat16": "dashed", "to the nearest": "dotted"}
    labels = {"bfloat16": "bfloat16, rounded at random", "to the nearest": "bfloat16, rounded to the nearest"}
    with drawing(path, height=4) as figure:
        axes = figure.subplots()
        for name, values in estimates.items():
            axes.plot(values, color=OPTIMIZERS["VSGD"], linestyle=styles[name], label=labels.get(name, name), linewidth=2)
        axes.step([0, _DROP, _STEPS], [1.0, 0.01, 0.01], color=INK, where="post", linewidth=1, label="the noise's variance")
        axes.set(yscale="log", xlabel="step", ylabel="noise variance", title="VSGD's noise estimate after a drop of the noise")
        axes.legend()


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the table and the figure into the page.

    Args:
        arguments: of the command line.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compact", description=__doc__)
    parser.add_argument("--seeds", type=int, default=5, help="at least 2 (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--page", type=Path, default=Path("docs/performance.md"))
    given: Any = parser.parse_args(arguments)
    if given.seeds < 2:
        parser.error(f"--seeds is {given.seeds}, but must be at least 2, for a standard deviation")
    figure = given.page.with_suffix("") / "compact-state.svg"
    figure.parent.mkdir(parents=True, exist_ok=True)
    draw_estimates(follow_noise(), figure)
    torch.set_num_threads(1)
    title = "The noise estimate of each state after a drop of the noise"
    parts = [format_scores(measure_scores(given.seeds, given.epochs)), format_image(title, figure, given.page)]
    replace_section(given.page, "compact", parts)


if __name__ == "__main__":
    main()
