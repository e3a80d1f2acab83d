"""What a look at an optimizer's state reports: sums, means and quantiles, computed on the device and read back once.

Sums and means cover all elements. Medians and quantiles cover at most `SAMPLE` evenly spread elements of a tensor, and as many
of all tensors together: they are exact for smaller tensors, and within a few percent in rank for others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from itertools import pairwise
from operator import attrgetter
from typing import Any, NamedTuple

import numpy as np

from vsgd import core, observer
from vsgd.posterior import Array, NoiseScale, Posterior, Scales, compute_posterior, compute_surprise, estimate_noise_scale
from vsgd.validation import validate_numbers

#: The largest number of elements in a quantile: a prime, so that every layout of rows and columns is sampled in many columns.
SAMPLE = 1021


class Summary(NamedTuple):
    """The summary of one tensor's gradient, or of all gradients together.

    Attributes:
        gain: the median gain; a gain is how far the mean moves towards each new gradient.
        snr_10: the 10 % quantile of the signal-to-noise ratios `mean**2 / variance`.
        snr_50: their median.
        snr_90: their 90 % quantile.
        noise_trace: an estimate of the trace of the covariance of one example's gradient. It and `noise_squared_norm` are from
            the state, and right only while the weights are held still, unless `noise_scale_error` is a number.
        noise_squared_norm: an estimate of the squared norm of the true gradient; NaN from an observer, whose state has none.
        surprise: the mean squared standardized innovation of the next step's gradient; None if that gradient is not available.
        noise_scale_error: the standard error of a `noise_scale` that was measured without bias, by `vsgd.monitor.noise_scale`;
            None for an estimate from the state.
        guarded: the number of steps since the last look that a guard scaled or skipped, as counted in `Monitor.guarded`; None
            if they are not counted.
    """

    gain: float
    snr_10: float
    snr_50: float
    snr_90: float
    noise_trace: float
    noise_squared_norm: float
    surprise: float | None
    noise_scale_error: float | None = None
    guarded: float | None = None

    @property
    def momentum(self) -> float:
        """The median effective momentum, `1 - gain`."""
        return 1 - self.gain

    @property
    def noise_scale(self) -> float:
        """The noise scale, in examples; negative or infinite where noise hides the gradient."""
        return self.noise_trace / self.noise_squared_norm if self.noise_squared_norm else math.inf

    def quantities(self) -> dict[str, float]:
        """Return all available quantities by name, in the order of the columns of a CSV file."""
        return {name: value for name, value in zip(QUANTITIES, get_quantities(self), strict=True) if value is not None}


#: The names of a summary's quantities, in the order of the columns of a CSV file.
QUANTITIES = (
    "gain", "momentum", "snr_10", "snr_50", "snr_90", "noise_trace", "noise_squared_norm", "noise_scale", "noise_scale_error",
    "surprise", "guarded",
)  # fmt: skip
#: `get_quantities(summary)` returns the values of `QUANTITIES`, with None for what is not available.
get_quantities = attrgetter(*QUANTITIES)


class Look(NamedTuple):
    """The summaries of one look.

    Attributes:
        step: the number of steps before the look.
        overall: the summary of all tensors together.
        tensors: the summary of each tensor, by name.
        loss: the loss, None where it is not logged.
    """

    step: int
    overall: Summary
    tensors: Mapping[str, Summary]
    loss: float | None = None

    def scalars(self) -> dict[str, float]:
        """Return all numbers by tags for a dashboard: `loss/overall`, `gain/overall`, `gain/layer.weight`, and so on."""
        return {
            **({} if self.loss is None else {"loss/overall": self.loss}),
            **{
                f"{quantity}/{name}": value
                for name, summary in self.rows()
                for quantity, value in summary.quantities().items()
            },
        }  # fmt: skip

    def rows(self) -> Iterator[tuple[str, Summary]]:
        """Yield the summaries by name, the overall one first."""
        yield "overall", self.overall
        yield from self.tensors.items()


class MonitorOps(NamedTuple):
    """The operations of an array library that `compute_digest` needs.

    Attributes:
        sum: sum the rows of a matrix, with `axis=1`.
        split: split a matrix into one with `size` columns for each of the sizes.
        stack: stack a list of vectors to a matrix.
        concatenate: join a list of vectors to one.
        take: select elements of a vector by a NumPy array of indices.
        fetch: return a vector as a NumPy array.
    """

    sum: Callable[..., Array]
    split: Callable[[Array, tuple[int, ...]], Sequence[Array]]
    stack: Callable[[Any], Array]
    concatenate: Callable[[Any], Array]
    take: Callable[[Array, Any], Array]
    fetch: Callable[[Array], Any]


class Block(NamedTuple):
    """Tensors with the same hyperparameters, dtype and device, joined to vectors.

    Attributes:
        names: the names of the tensors.
        sizes: how many elements of each tensor the vectors have, at least 1; a complex number counts as two.
        numbers: how many elements each tensor has: more than its size if an observer watches a part.
        sums: the names of the sums in the digest, in its order: of `Description.summands`.
        fetch_digest: `fetch_digest(indices)` returns the `compute_digest` with these indices of samples as a NumPy array.
    """

    names: Sequence[str]
    sizes: tuple[int, ...]
    numbers: tuple[int, ...]
    sums: tuple[str, ...]
    fetch_digest: Callable[[Any], Any]


class Description(NamedTuple):
    """The posterior of each element of a block, and what to sum.

    Attributes:
        posterior: the posterior.
        summands: what to sum over each tensor, by name: "noise_trace", "noise_squared_norm", "surprise"; the last two may be
            missing.
    """

    posterior: Posterior
    summands: dict[str, Array]


class _Sums(NamedTuple):
    """The sums over one tensor or several."""

    noise: NoiseScale
    surprise: float
    surprise_size: int


def summarize(step: int, blocks: Sequence[Block], batch_size: float) -> Look:
    """Summarize the state of an optimizer or observer, with one transfer from the device for each block.

    Args:
        step: the number of steps so far.
        blocks: the state of all tensors.
        batch_size: the batch size of the digests.

    Returns:
        A look whose noise scale is not smoothed.

    Raises:
        ValueError: `batch_size` is out of its range, or there is no state.
    """
    validate_numbers(batch_size=batch_size)
    if not blocks:
        raise ValueError("the optimizer has no state yet, but must have taken a step with a gradient")
    total = sum(sum(block.sizes) for block in blocks)
    names: list[str] = []
    sums: list[_Sums] = []
    quantiles: list[Any] = []
    overall_samples = []
    offset = 0
    for block in blocks:
        indices, layout = _choose_samples(block.sizes, offset, total), _lay_out_samples(block.sizes)
        fetched = block.fetch_digest(indices)
        count = len(block.sums) * len(block.sizes)
        samples = fetched[count:].reshape(2, -1)  # of gain and of SNR
        names += block.names
        rows = fetched[:count].reshape(-1, len(block.sums)).tolist()
        for size, number, row in zip(block.sizes, block.numbers, rows, strict=True):
            by_name = dict(zip(block.sums, row, strict=True))
            trace = by_name["noise_trace"] * (number / size)
            noise = NoiseScale(trace, by_name.get("noise_squared_norm", math.nan))
            sums.append(_Sums(noise, by_name.get("surprise", 0.0), size if "surprise" in by_name else 0))
        quantiles += _compute_quantiles(samples, layout)
        overall_samples.append(samples[:, layout.ends[-1] :])
        offset += sum(block.sizes)
    (overall,) = _compute_quantiles(np.concatenate(overall_samples, axis=1), _lay_out_samples((total,)))
    tensors = dict(zip(names, map(_make_summary, sums, quantiles), strict=True))
    noises, surprises, sizes = zip(*sums, strict=True)
    overall_sums = _Sums(sum(noises[1:], noises[0]), sum(surprises), sum(sizes))
    return Look(step, _make_summary(overall_sums, overall), tensors)


def describe_state(state: core.State, scales: Scales, grads: Array | None, batch_size: float) -> Description:
    """Describe each element by the state of VSGD.

    Args:
        state: the state in the rule's order, vectors in float32 or float64.
        scales: the factors of this state.
        grads: the gradients of the next step, in the state's dtype, or None.
        batch_size: the number of examples that a gradient averages.
    """
    posterior = compute_posterior(state, scales)
    trace, squared_norm = estimate_noise_scale(posterior, batch_size, lambda value: value)
    summands = {"noise_trace": trace, "noise_squared_norm": squared_norm}
    if grads is not None:
        summands["surprise"] = compute_surprise(grads, state, scales)
    return Description(posterior, summands)


def describe_observed(state: observer.State, batch_size: float) -> Description:
    """Describe each watched element by the state of a gradient observer, without the surprise.

    Args:
        state: the state, vectors in float32 or float64.
        batch_size: the number of examples that a gradient averages.
    """
    posterior = observer.compute_posterior(state)
    return Description(posterior, {"noise_trace": batch_size * posterior.noise_variance})


def make_block(
    names: Sequence[str], sizes: tuple[int, ...], numbers: tuple[int, ...], description: Description, ops: MonitorOps
) -> Block:
    """Return the block of tensors that have a description.

    Args:
        names: the names of the tensors.
        sizes: see `Block`.
        numbers: see `Block`.
        description: the description of their elements.
        ops: the operations of the array library.
    """

    def fetch_digest(indices: Any) -> Any:
        return ops.fetch(compute_digest(description, sizes, indices, ops))

    return Block(names, sizes, numbers, tuple(description.summands), fetch_digest)


def compute_digest(description: Description, sizes: tuple[int, ...], indices: Any, ops: MonitorOps) -> Array:
    """Return all that a look reports of a block as one vector on the device: the sums of each tensor, then the samples.

    Args:
        description: the description of its elements.
        sizes: the sizes of the tensors.
        indices: the indices of the samples.
        ops: the operations of the array library.
    """
    table = ops.stack([*description.summands.values()])
    sums = [ops.sum(part, axis=1) for part in ops.split(table, sizes)]
    posterior = description.posterior
    return ops.concatenate([*sums, ops.take(posterior.gain, indices), ops.take(posterior.snr, indices)])


def choose_evenly(size: int) -> Any:
    """Return the indices of at most `SAMPLE` elements, evenly spread over `size` elements."""
    return np.arange(size) if size <= SAMPLE else np.arange(SAMPLE) * size // SAMPLE


@cache
def _choose_samples(sizes: tuple[int, ...], offset: int, total: int) -> Any:
    """Return the indices in a block of its tensors' samples, then those of the samples of all tensors together.

    Args:
        sizes: the sizes of the block's tensors.
        offset: the number of elements in earlier blocks.
        total: the number of elements in all blocks.
    """
    starts = np.cumsum((0, *sizes))
    each = [start + choose_evenly(size) for start, size in zip(starts, sizes, strict=False)]
    overall = choose_evenly(total) - offset
    return np.concatenate([*each, overall[(overall >= 0) & (overall < starts[-1])]])


class _Layout(NamedTuple):
    """Where the samples of several tensors end, and, once they are sorted, where the neighbours of their quantiles are."""

    ends: list[int]
    low: Any
    high: Any
    share: Any


@cache
def _lay_out_samples(sizes: tuple[int, ...]) -> _Layout:
    counts = np.minimum(sizes, SAMPLE)
    ends = np.cumsum(counts)
    ranks = np.outer(counts - 1, (0.1, 0.5, 0.9))
    starts = (ends - counts)[:, None]
    return _Layout(ends.tolist(), starts + np.floor(ranks).astype(int), starts + np.ceil(ranks).astype(int), ranks % 1)


def _compute_quantiles(samples: Any, layout: _Layout) -> list[Any]:
    """Return the quantiles of gain and SNR of each tensor. NumPy's own, tensor by tensor, take several times as long."""
    ordered = samples[:, : layout.ends[-1]].copy()
    for start, end in pairwise((0, *layout.ends)):
        ordered[:, start:end].sort(axis=1)
    low, high = ordered[:, layout.low], ordered[:, layout.high]
    return (low + (high - low) * layout.share).swapaxes(0, 1).tolist()


def _make_summary(sums: _Sums, quantiles: list[list[float]]) -> Summary:
    (_, gain, _), snrs = quantiles
    surprise = sums.surprise / sums.surprise_size if sums.surprise_size else None
    return Summary(gain, *snrs, *sums.noise, surprise)  # type: ignore[call-arg]
