"""What the posterior of the gradients says during training, every so many steps, for logs and plots.

A `Monitor` says when to look, smooths the noise scale, and writes to its sinks. What there is to see comes from the adapters:
`vsgd.torch.monitor.watch` looks before a torch optimizer's step, `vsgd.keras.monitor.MonitorCallback` after Keras' batches, and
`vsgd.optax.monitor.summarize` looks at an optax state.
"""

from __future__ import annotations

import csv
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from vsgd.monitor.summaries import QUANTITIES, SAMPLE, Look, Summary, quantity_values

__all__ = ["SAMPLE", "CsvFile", "Look", "Monitor", "Summary"]


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
                table.writerow(("step", "tensor", *QUANTITIES))
            # With what digits float32 has: all those of a Python float take several times as long.
            table.writerows(
                (look.step, name, *("" if value is None else f"{value:.9g}" for value in quantity_values(each)))
                for name, each in look.rows()
            )
