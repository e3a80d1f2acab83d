"""Measure a gradient observer's cost in time and memory, next to a training step: `python -m benchmarks.observer`."""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional

from benchmarks.timing import Limits, compute_paired_ratio, compute_spread, interleave, select_taken
from vsgd.torch import GradientObserver

_WIDTH, _DEPTH, _VOCABULARY = 384, 6, 1024


class _Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(_VOCABULARY, _WIDTH)
        layer = nn.TransformerEncoderLayer(_WIDTH, 6, 4 * _WIDTH, dropout=0.0, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, _DEPTH, enable_nested_tensor=False)
        self.head = nn.Linear(_WIDTH, _VOCABULARY)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.blocks(self.embedding(tokens)))
        return logits


def _make_training(tokens: torch.Tensor, max_elements: int | None) -> tuple[Callable[[int], None], GradientObserver | None]:
    """Return a function that takes `count` steps of AdamW, and the observer of at most `max_elements`; 0: none."""
    torch.manual_seed(0)
    model = _Transformer()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    observer = None
    if max_elements != 0:
        observer = GradientObserver(model.named_parameters(), max_elements=max_elements)
        observer.attach(optimizer)

    def step(count: int) -> None:
        for _ in range(count):
            optimizer.zero_grad()
            logits = model(tokens)
            functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
            optimizer.step()

    return step, observer


def _count_bytes(observer: GradientObserver) -> int:
    """Return the bytes of the state and of the indices."""
    arrays = [array for state in observer.state_dict()["state"].values() for array in state.values()]
    elements = [watched.elements for block in observer.list_blocks() for watched in block.members]
    return sum(array.nbytes for array in [*arrays, *elements] if isinstance(array, torch.Tensor))


def _time_alone(observer: GradientObserver) -> float:
    """Return the seconds of observing the gradients of the last step: smaller than the noise of a step's time."""
    seconds = []
    for _ in range(51):
        start = time.perf_counter()
        observer.observe()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def main() -> None:
    """Measure and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--batch", type=int, default=16, help="sequences (default: %(default)s)")
    parser.add_argument("--length", type=int, default=256, help="tokens of each (default: %(default)s)")
    arguments = parser.parse_args()
    tokens = torch.randint(_VOCABULARY, (arguments.batch, arguments.length), generator=torch.Generator().manual_seed(0))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    trainings = {"without": _make_training(tokens, 0)}
    trainings["without"][0](2)
    peak = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    trainings["without, again"] = _make_training(tokens, 0)  # shows the measurement's error
    for max_elements in (4096, 16384, 65536):
        trainings[f"{max_elements} elements"] = _make_training(tokens, max_elements)
    limits = Limits(arguments.rounds, sample_seconds=0.0, competitor_seconds=float("inf"))
    samples = interleave({name: step for name, (step, _) in trainings.items()}, limits, lambda: None)
    size = sum(param.numel() for param in _Transformer().parameters())
    print(f"a transformer of {size:,} parameters, {tokens.numel()} tokens a step, peak memory {peak / 2**20:.0f} MiB")
    for name, seconds in samples.items():
        ratio = compute_paired_ratio(seconds, samples["without"])
        median = 1e3 * compute_spread(select_taken(seconds)).median
        observer = trainings[name][1]
        print(f"{name:16} {median:.1f} ms, {ratio.median:.4f} ({ratio.low:.4f} to {ratio.high:.4f}) of that without")
        if observer is not None:
            held, alone = _count_bytes(observer), 1e3 * _time_alone(observer)
            print(f"{'':16} alone {alone:.1f} ms ({alone / median:.2%}), {held / 2**20:.1f} MiB ({held / peak:.2%})")


if __name__ == "__main__":
    main()
