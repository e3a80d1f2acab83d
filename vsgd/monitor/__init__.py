"""Log gradient posteriors during training: gain, signal-to-noise ratio, noise scale and surprise, every few steps.

A `Monitor` decides when to look, smooths the noise scale, and writes to its sinks. Each adapter looks at its own state:
`vsgd.torch.monitor.watch` before a torch optimizer's step, `vsgd.keras.monitor.MonitorCallback` after Keras' batches, and
`vsgd.optax.monitor.summarize` when you call it. `vsgd.monitor.plots` draws the looks.
"""

from __future__ import annotations

import csv
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from vsgd.monitor.summaries import QUANTITIES, SAMPLE, Look, Summary, get_quantities

__all__ = ["SAMPLE", "CsvFile", "Look", "Monitor", "Summary"]


class Monitor:
    """Decide when to look, smooth the noise scale over the looks, and write each look to sinks.

    The noise scale is the ratio of two estimates that are noisy step by step. The monitor averages trace and squared norm
    separately, with exponentially falling weights that sum to one from the first look on, as in arXiv 1812.06162, appendix A.1.
    It smooths nothing else, and no noise scale with a standard error, which is an average already.

    Args:
        sinks: where to write. An object with `append`, such as a list or a `collections.deque`, receives each `Look`. An object
            with `add_scalar(tag, value, step)`, such as TensorBoard's `SummaryWriter`, or with `log(dict, step=...)`, such as
            wandb's run, receives `Look.scalars()`. A `str` or path names a CSV file, see `CsvFile`.
        every: the number of steps between two looks.
        smoothing: the weight of earlier looks, in [0, 1); 0 smooths nothing.

    Raises:
        ValueError: an argument is out of its range.
        TypeError: a sink has none of these forms.

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
        self._writers = [_make_writer(sink) for sink in sinks]
        self._means: dict[str | None, tuple[float, float, float]] = {}

    def due(self, step: int, taken: int = 1) -> bool:
        """Return whether to look now.

        Args:
            step: the number of steps so far.
            taken: the number of steps since the last call.
        """
        return step // self.every != (step - taken) // self.every and step > 0

    def record(self, look: Look) -> Look:
        """Smooth the noise scale of a look, and write the look.

        Args:
            look: an adapter's look.

        Returns:
            The look as it was written.
        """
        tensors = {name: self._smooth(name, summary) for name, summary in look.tensors.items()}
        look = Look(look.step, self._smooth(None, look.overall), tensors)
        for write in self._writers:
            write(look)
        return look

    def _smooth(self, name: str | None, summary: Summary) -> Summary:
        if summary.noise_scale_error is not None:
            return summary
        old, new = self.smoothing, 1 - self.smoothing
        weight, trace, norm = self._means.get(name, (0.0, 0.0, 0.0))
        weight = old * weight + new
        trace = old * trace + new * summary.noise_trace
        norm = old * norm + new * summary.noise_squared_norm
        self._means[name] = (weight, trace, norm)
        return summary._replace(noise_trace=trace / weight, noise_squared_norm=norm / weight)


def _make_writer(sink: Any) -> Callable[[Look], Any]:
    if isinstance(sink, (str, os.PathLike)):
        return CsvFile(sink).append
    if hasattr(sink, "append"):
        return sink.append
    if hasattr(sink, "add_scalar"):
        return lambda look: [sink.add_scalar(tag, value, look.step) for tag, value in look.scalars().items()]
    # The `log` of Python's loggers takes a level first.
    if hasattr(sink, "log") and not isinstance(sink, (logging.Logger, logging.LoggerAdapter)):
        return lambda look: sink.log(look.scalars(), step=look.step)
    allowed = "a path or have one of append(look), add_scalar(tag, value, step), log(dict, step=...)"
    raise TypeError(f"a sink is {type(sink).__name__}, but must be {allowed}")


class CsvFile:
    """Write looks to a CSV file, one row per look and tensor, first the one named `overall`. A missing value is empty.

    Args:
        path: the file's path; rows are appended to an existing file, so that a resumed run continues it.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "gradients.csv"
        >>> CsvFile(path).append(Look(10, Summary(0.5, 1.0, 2.0, 3.0, 8.0, 4.0, None), {}))
        >>> print(path.read_text().strip())
        step,tensor,gain,momentum,snr_10,snr_50,snr_90,noise_trace,noise_squared_norm,noise_scale,noise_scale_error,surprise
        10,overall,0.5,0.5,1,2,3,8,4,2,,
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    def append(self, look: Look) -> None:
        """Append the rows of a look.

        Args:
            look: the look to write.
        """
        with self.path.open("a", newline="", encoding="utf-8") as file:
            table = csv.writer(file, lineterminator="\n")
            if file.tell() == 0:
                table.writerow(("step", "tensor", *QUANTITIES))
            # With float32's digits: all digits of a Python float take several times as long.
            table.writerows(
                (look.step, name, *("" if value is None else f"{value:.9g}" for value in get_quantities(each)))
                for name, each in look.rows()
            )
