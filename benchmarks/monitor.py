"""Measure a monitor's cost: the time of a step with a monitor, divided by that without one: `python -m benchmarks.monitor`."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn import functional

from benchmarks.timing import Limits, compute_paired_ratio, compute_spread, interleave, select_taken
from reporting.digits import make_conv_mixer
from vsgd.monitor import Monitor
from vsgd.torch import VSGD
from vsgd.torch.monitor import watch

_EVERY = 10


def _make_training(model: torch.nn.Module, *, batch: int, watching: Monitor | None) -> Callable[[int], None]:
    """Return a function that takes `count` times `_EVERY` steps, with one look of the monitor every `_EVERY` steps."""
    optimizer = VSGD(model.parameters())
    if watching is not None:
        watch(optimizer, watching, model.named_parameters(), batch_size=batch)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 1, 8, 8, generator=generator)
    labels = torch.randint(10, (batch,), generator=generator)

    def step(count: int) -> None:
        for _ in range(count * _EVERY):
            optimizer.zero_grad()
            functional.cross_entropy(model(images), labels).backward()
            optimizer.step()

    return step


def main() -> None:
    """Measure and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=101)
    parser.add_argument("--batch", type=int, default=64)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        monitors = {
            "without": None,
            "without, again": None,  # shows the measurement's error
            "into a list": Monitor([], every=_EVERY),
            "into a CSV file": Monitor(Path(folder) / "gradients.csv", every=_EVERY),
        }
        steps = {
            name: _make_training(make_conv_mixer(), batch=arguments.batch, watching=watching)
            for name, watching in monitors.items()
        }
        limits = Limits(arguments.rounds, sample_seconds=0.0, competitor_seconds=float("inf"))
        samples = interleave(steps, limits, lambda: None)
    print(f"a step of the ConvMixer, batches of {arguments.batch}, a look every {_EVERY} steps")
    for name, seconds in samples.items():
        ratio = compute_paired_ratio(seconds, samples["without"])
        median = 1e3 * compute_spread(select_taken(seconds)).median / _EVERY
        print(f"{name:16} {median:.3f} ms, {ratio.median:.4f} ({ratio.low:.4f} to {ratio.high:.4f}) of that without")


if __name__ == "__main__":
    main()
