"""What the posterior of the gradients says during training, every so many steps, for logs and plots.

A `Monitor` says when to look, smooths the noise scale, and writes to its sinks. What there is to see comes from the adapters:
`vsgd.torch_monitor.watch` looks before a torch optimizer's step, `vsgd.keras_monitor.MonitorCallback` after Keras' batches, and
`vsgd.optax_monitor.summarize` looks at an optax state.

Sums and means are over all elements. Medians and quantiles are over at most `SAMPLE` elements of a tensor, evenly spread, and
as many of all tensors together: exact for tensors of no more elements, else within a few percent in rank.
"""

from __future__ import annotations

import csv
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from itertools import pairwise
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vsgd import core
from vsgd.posterior import Array, NoiseScale, noise_scale, posterior, surprise

__all__ = ["SAMPLE", "CsvFile", "Look", "Monitor", "Summary"]

#: How many elements quantiles are of at most: a prime, so that no layout of rows and columns is sampled in a few columns only.
SAMPLE = 1021


class Summary(NamedTuple):
    """What is known of one tensor's gradient, or of all together.

    Attributes:
        gain: the median gain, the share of an innovation by which the mean moves.
        snr_10: of the signal to noise ratios `mean**2 / variance` the 10 % quantile.
        snr_50: the median.
        snr_90: the 90 % quantile.
        noise_trace: an estimate of the trace of the covariance of one example's gradient.
        noise_squared_norm: an estimate of the squared norm of the true gradient.
        surprise: the mean squared standardized innovation of the gradient about to be taken; None where it is not known.
    """

    gain: float
    snr_10: float
    snr_50: float
    snr_90: float
    noise_trace: float
    noise_squared_norm: float
    surprise: float | None

    @property
    def momentum(self) -> float:
        """The median effective momentum, `1 - gain`."""
        return 1 - self.gain

    @property
    def noise_scale(self) -> float:
        """The noise scale, in examples; negative or infinite where no gradient was found in the noise."""
        return self.noise_trace / self.noise_squared_norm if self.noise_squared_norm else math.inf

    def quantities(self) -> dict[str, float]:
        """All that is known, by name, in the order in which it is written."""
        return {name: value for name, value in zip(_QUANTITIES, _values(self), strict=True) if value is not None}


_QUANTITIES = (
    "gain", "momentum", "snr_10", "snr_50", "snr_90", "noise_trace", "noise_squared_norm", "noise_scale", "surprise",
)  # fmt: skip
_values = attrgetter(*_QUANTITIES)


class Look(NamedTuple):
    """What was seen after a step.

    Attributes:
        step: how many steps were taken before.
        overall: of all tensors together.
        tensors: of each tensor, by name.
    """

    step: int
    overall: Summary
    tensors: Mapping[str, Summary]

    def scalars(self) -> dict[str, float]:
        """All numbers by tags for a dashboard: `gain/overall`, `gain/layer.weight`, and so on."""
        return {
            f"{quantity}/{name}": value
            for name, summary in self.rows()
            for quantity, value in summary.quantities().items()
        }  # fmt: skip

    def rows(self) -> Iterator[tuple[str, Summary]]:
        """The summaries by name, the overall one first."""
        yield "overall", self.overall
        yield from self.tensors.items()


class Monitor:
    """Says when to look, smooths the noise scale over the looks, and writes what is seen to its sinks.

    The noise scale is the ratio of two estimates that are noisy step by step: trace and squared norm are averaged apart, with
    exponentially falling weights that sum to one from the first look on, as in arXiv 1812.06162, appendix A.1. All else is told
    as it is.

    Args:
        sinks: where to write, each one of: what has `append`, such as a list or a `collections.deque`, gets each `Look`; what
            has `add_scalar(tag, value, step)`, such as TensorBoard's `SummaryWriter`, and what has `log(dict, step=...)`, such
            as wandb's run, get `Look.scalars()`; a `str` or path is a CSV file, as by `CsvFile`.
        every: how many steps lie between two looks.
        smoothing: the weight of what was seen before, in [0, 1); 0: none.

    Raises:
        ValueError: an argument is out of its range.
        TypeError: nothing can be written to a sink.

    Example:
        >>> looks = []
        >>> monitor = Monitor(looks, every=5, smoothing=0.75)
        >>> seen = {
        ...     5: Summary(0.5, 0.1, 1.0, 3.0, noise_trace=8.0, noise_squared_norm=4.0, surprise=1.0),
        ...     10: Summary(0.2, 0.1, 0.9, 2.0, noise_trace=8.0, noise_squared_norm=0.5, surprise=1.1),
        ... }
        >>> for step in range(12):
        ...     if monitor.due(step):
        ...         look = monitor.record(Look(step, overall=seen[step], tensors={}))
        >>> [look.step for look in looks]
        [5, 10]
        >>> [look.overall.gain for look in looks]
        [0.5, 0.2]
        >>> [look.overall.noise_scale for look in looks]
        [2.0, 4.0]
    """

    def __init__(self, *sinks: Any, every: int = 10, smoothing: float = 0.9) -> None:
        if not (isinstance(every, (int, np.integer)) and every >= 1):
            raise ValueError(f"every is {every!r}, but must be an integer >= 1")
        if not (isinstance(smoothing, (int, float, np.floating)) and 0 <= smoothing < 1):
            raise ValueError(f"smoothing is {smoothing!r}, but must be a number in [0, 1)")
        self.every = int(every)
        self.smoothing = float(smoothing)
        self._writers = [_writer(sink) for sink in sinks]
        self._means: dict[str | None, tuple[float, float, float]] = {}

    def due(self, step: int, taken: int = 1) -> bool:
        """Whether to look now.

        Args:
            step: how many steps were taken.
            taken: how many of them since this was asked last.
        """
        return step // self.every != (step - taken) // self.every and step > 0

    def record(self, look: Look) -> Look:
        """Smooth the noise scale of what was seen, and write it.

        Args:
            look: what an adapter saw.

        Returns:
            What was written.
        """
        tensors = {name: self._smooth(name, summary) for name, summary in look.tensors.items()}
        look = Look(look.step, self._smooth(None, look.overall), tensors)
        for write in self._writers:
            write(look)
        return look

    def _smooth(self, name: str | None, summary: Summary) -> Summary:
        old, new = self.smoothing, 1 - self.smoothing
        weight, trace, norm = self._means.get(name, (0.0, 0.0, 0.0))
        weight = old * weight + new
        trace = old * trace + new * summary.noise_trace
        norm = old * norm + new * summary.noise_squared_norm
        self._means[name] = (weight, trace, norm)
        return summary._replace(noise_trace=trace / weight, noise_squared_norm=norm / weight)


def _writer(sink: Any) -> Callable[[Look], Any]:
    if isinstance(sink, (str, os.PathLike)):
        return CsvFile(sink).append
    if hasattr(sink, "append"):
        return sink.append
    if hasattr(sink, "add_scalar"):
        return lambda look: [sink.add_scalar(tag, value, look.step) for tag, value in look.scalars().items()]
    # Python's loggers take a level first.
    if hasattr(sink, "log") and not isinstance(sink, (logging.Logger, logging.LoggerAdapter)):
        return lambda look: sink.log(look.scalars(), step=look.step)
    allowed = "a path or have one of append(look), add_scalar(tag, value, step), log(dict, step=...)"
    raise TypeError(f"a sink is {type(sink).__name__}, but must be {allowed}")


class CsvFile:
    """A table with a row for each look and tensor, the first named `overall`; what is not known is left empty.

    Args:
        path: of the file; rows are added to one that exists, so that a resumed run goes on.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "gradients.csv"
        >>> CsvFile(path).append(Look(10, Summary(0.5, 1.0, 2.0, 3.0, 8.0, 4.0, None), {}))
        >>> print(path.read_text().strip())
        step,tensor,gain,momentum,snr_10,snr_50,snr_90,noise_trace,noise_squared_norm,noise_scale,surprise
        10,overall,0.5,0.5,1,2,3,8,4,2,
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    def append(self, look: Look) -> None:
        """Write what was seen.

        Args:
            look: what was seen.
        """
        with self.path.open("a", newline="", encoding="utf-8") as file:
            table = csv.writer(file, lineterminator="\n")
            if file.tell() == 0:
                table.writerow(("step", "tensor", *_QUANTITIES))
            # With what digits float32 has: all those of a Python float take several times as long.
            table.writerows(
                (look.step, name, *("" if value is None else f"{value:.9g}" for value in _values(each)))
                for name, each in look.rows()
            )


class Arrays(NamedTuple):
    """What summaries need of an array library.

    Attributes:
        sum: of the rows of a matrix, by `axis=1`.
        split: a matrix, into one of so many columns for each size.
        stack: a list of vectors to a matrix.
        concatenate: a list of vectors to one.
        take: elements of a vector, at the places that a NumPy array of integers says.
    """

    sum: Callable[..., Array]
    split: Callable[[Array, tuple[int, ...]], Sequence[Array]]
    stack: Callable[[Any], Array]
    concatenate: Callable[[Any], Array]
    take: Callable[[Array, Any], Array]


class Block(NamedTuple):
    """Tensors with the same hyperparameters, of one dtype and device, as vectors in which they follow each other.

    Attributes:
        names: of the tensors.
        sizes: how many real numbers each has, none 0.
        state: the state in the rule's order, float32 or float64.
        scales: `rule.variance_scales(hyper)`.
        grads: the gradients about to be taken, of the state's dtype, or None.
    """

    names: Sequence[str]
    sizes: tuple[int, ...]
    state: core.State
    scales: Sequence[Array]
    grads: Array | None


class _Sums(NamedTuple):
    """What is added up, of one tensor or several."""

    noise: NoiseScale
    surprise: float
    surprise_size: int


def summarize(step: int, blocks: Sequence[Block], look: Callable[[Block, Any], Any], batch_size: float) -> Look:
    """Look at some state: one transfer from the device for each block.

    Args:
        step: how many steps were taken.
        blocks: the state of all tensors.
        look: takes a block and places, and fetches its `digest` as a NumPy array.
        batch_size: that the digest was told.

    Returns:
        What is seen, the noise scale not smoothed.

    Raises:
        ValueError: `batch_size` is out of its range, or there is no state.
    """
    core.validate(batch_size=batch_size)
    if not blocks:
        raise ValueError("the optimizer has no state yet, but must have taken a step with a gradient")
    total = sum(sum(block.sizes) for block in blocks)
    names: list[str] = []
    sums: list[_Sums] = []
    quantiles: list[Any] = []
    everywhere = []
    offset = 0
    for block in blocks:
        places, sample = _places(block.sizes, offset, total), _sample(block.sizes)
        rows, sampled = _split(block, look(block, places))
        names += block.names
        sums += map(_sums, block.sizes, rows)
        quantiles += _quantiles(sampled, sample)
        everywhere.append(sampled[:, sample.ends[-1] :])
        offset += sum(block.sizes)
    (overall,) = _quantiles(np.concatenate(everywhere, axis=1), _sample((total,)))
    tensors = dict(zip(names, map(_summary, sums, quantiles), strict=True))
    return Look(step, _summary(_added(sums), overall), tensors)


def digest(block: Block, places: Any, arrays: Arrays, batch_size: float) -> Array:
    """All that is to be known of a block, as one vector on the device: the sums of each tensor, then the samples.

    Args:
        block: of tensors.
        places: of the samples.
        arrays: the library.
        batch_size: as for `summarize`.
    """
    known = posterior(block.state, block.scales)
    summands = [*noise_scale(known, batch_size, lambda value: value)]
    if block.grads is not None:
        summands.append(surprise(block.grads, block.state, block.scales))
    table = arrays.stack(summands)
    sums = [arrays.sum(part, axis=1) for part in arrays.split(table, block.sizes)]
    return arrays.concatenate([*sums, arrays.take(known.gain, places), arrays.take(known.snr, places)])


def _split(block: Block, fetched: Any) -> tuple[Any, Any]:
    """The sums, a row for each tensor, and the samples, of gain and of SNR, that `digest` laid out."""
    width = 2 if block.grads is None else 3
    count = width * len(block.sizes)
    return fetched[:count].reshape(-1, width).tolist(), fetched[count:].reshape(2, -1)


class _Sample(NamedTuple):
    """Where the samples of several tensors lie, one after the other, and the neighbours of their quantiles once sorted."""

    ends: list[int]
    low: Any
    high: Any
    share: Any


@cache
def _sample(sizes: tuple[int, ...]) -> _Sample:
    counts = np.minimum(sizes, SAMPLE)
    ends = np.cumsum(counts)
    ranks = np.outer(counts - 1, (0.1, 0.5, 0.9))
    starts = (ends - counts)[:, None]
    return _Sample(ends.tolist(), starts + np.floor(ranks).astype(int), starts + np.ceil(ranks).astype(int), ranks % 1)


@cache
def _places(sizes: tuple[int, ...], offset: int, total: int) -> Any:
    """Where in a block the samples of its tensors lie, and then those of all tensors together.

    Args:
        sizes: of the block's tensors.
        offset: how many elements are in the blocks before.
        total: how many elements are in all blocks.
    """
    starts = np.cumsum((0, *sizes))
    each = [start + spread(size) for start, size in zip(starts, sizes, strict=False)]
    everywhere = spread(total) - offset
    return np.concatenate([*each, everywhere[(everywhere >= 0) & (everywhere < starts[-1])]])


def spread(size: int) -> Any:
    """The places of at most `SAMPLE` elements, evenly spread over so many."""
    return np.arange(size) if size <= SAMPLE else np.arange(SAMPLE) * size // SAMPLE


def _sums(size: int, row: list[float]) -> _Sums:
    trace, norm, *surprises = row
    return _Sums(NoiseScale(trace, norm), sum(surprises), size if surprises else 0)


def _added(sums: Sequence[_Sums]) -> _Sums:
    noises, surprises, sizes = zip(*sums, strict=True)
    return _Sums(sum(noises[1:], noises[0]), sum(surprises), sum(sizes))


def _quantiles(sampled: Any, sample: _Sample) -> list[Any]:
    """Of gain and SNR, for each tensor; NumPy's own, tensor by tensor, took several times as long."""
    ordered = sampled[:, : sample.ends[-1]].copy()
    for start, end in pairwise((0, *sample.ends)):
        ordered[:, start:end].sort(axis=1)
    low, high = ordered[:, sample.low], ordered[:, sample.high]
    return (low + (high - low) * sample.share).swapaxes(0, 1).tolist()


def _summary(sums: _Sums, quantiles: list[list[float]]) -> Summary:
    (_, gain, _), snrs = quantiles
    unexpected = sums.surprise / sums.surprise_size if sums.surprise_size else None
    return Summary(gain, *snrs, *sums.noise, unexpected)  # type: ignore[call-arg]
