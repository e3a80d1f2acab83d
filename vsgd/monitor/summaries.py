"""What a look at an optimizer's state reports: sums, means and quantiles, computed on the device and read back once.

Sums and means are over all elements. Medians and quantiles are over at most `SAMPLE` elements of a tensor, evenly spread, and
as many of all tensors together: exact for tensors of no more elements, else within a few percent in rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from itertools import pairwise
from operator import attrgetter
from typing import Any, NamedTuple

import numpy as np

from vsgd import core
from vsgd.posterior import Array, NoiseScale, noise_scale, posterior, surprise

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
        return {name: value for name, value in zip(QUANTITIES, quantity_values(self), strict=True) if value is not None}


QUANTITIES = (
    "gain", "momentum", "snr_10", "snr_50", "snr_90", "noise_trace", "noise_squared_norm", "noise_scale", "surprise",
)  # fmt: skip
quantity_values = attrgetter(*QUANTITIES)


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
