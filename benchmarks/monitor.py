"""Compare a step with a monitor to one without, on the quickstart's model: `python -m benchmarks.monitor`."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn import functional

from benchmarks.quickstart import load
from benchmarks.timing import Limits, interleave, paired_ratio, spread, taken
from vsgd.monitor import Monitor
from vsgd.torch import VSGD
from vsgd.torch.monitor import watch

_EVERY = 10


def _make_training(model: torch.nn.Module, *, batch: int, monitor: Monitor | None) -> Callable[[int], None]:
    optimizer = VSGD(model.parameters())
    if monitor is not None:
        watch(optimizer, monitor, model.named_parameters(), batch_size=batch)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 1, 8, 8, generator=generator)
    labels = torch.randint(10, (batch,), generator=generator)

    def step(count: int) -> None:
        # A monitor records once in `_EVERY` steps, so time that many together.
        for _ in range(count * _EVERY):
            optimizer.zero_grad()
            functional.cross_entropy(model(images), labels).backward()
            optimizer.step()

    return step


def main() -> None:
    """Time the steps and print their ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=101)
    parser.add_argument("--batch", type=int, default=64)
    arguments = parser.parse_args()
    conv_mixer = load().conv_mixer
    torch.set_num_threads(1)  # as in the quickstart
    with tempfile.TemporaryDirectory() as folder:
        monitors = {
            "without": None,
            "without, again": None,  # shows the error of the ratios
            "into a list": Monitor([], every=_EVERY),
            "into a CSV file": Monitor(Path(folder) / "gradients.csv", every=_EVERY),
        }
        steps = {
            name: _make_training(conv_mixer(), batch=arguments.batch, monitor=monitor) for name, monitor in monitors.items()
        }
        limits = Limits(arguments.rounds, sample_seconds=0.0, competitor_seconds=float("inf"))
        samples = interleave(steps, limits, lambda: None)
    print(f"a step of the quickstart's model, batches of {arguments.batch}, a look every {_EVERY} steps")
    for name, seconds in samples.items():
        ratio = paired_ratio(seconds, samples["without"])
        median = 1e3 * spread(taken(seconds)).median / _EVERY
        print(f"{name:16} {median:.3f} ms, {ratio.median:.4f} ({ratio.low:.4f} to {ratio.high:.4f}) of that without")


if __name__ == "__main__":
    main()
